"""The runner: every trial ends once, whoever dies; with runs that are small scripts instead of trainings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.sweep import runner, trials
from tfm_jax.sweep.space import grid, named

# A run as `train` behaves: one at a time in its folder, a step at a time, saving when told to stop.
RUN = """
import json, pathlib, signal, sys, time
run, kind, pause = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def status(word, **more): (run / "status.json").write_text(json.dumps({"state": word, **more}))
with open(run / "starts", "a") as out: out.write("x")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
status("running")
if kind == "fails": status("failed", reason="the loss is not finite"); sys.exit(1)
if kind == "mistake": print("error: no such thing"); sys.exit(2)
if kind == "dies": import os; os.kill(os.getpid(), 9)
at = run / "step"
step = int(at.read_text()) if at.exists() else 0
while step < 5:
    if told: status("preempted"); sys.exit(75)
    time.sleep(pause)
    step += 1
    at.write_text(str(step))
    with open(run / "metrics.jsonl", "a") as out: out.write(json.dumps({"step": step, "eval/v/loss": 10.0 - step}) + "\\n")
(run / "result.json").write_text(json.dumps({"step": 5, "eval/v/loss": 5.0}))
status("finished")
"""


def starter(pause=0.0, kinds=None):
    def start(trial, run, lock, slot):
        command = [sys.executable, "-c", RUN, str(run), (kinds or {}).get(trial.name, "trains"), str(pause)]
        with open(run / "train.log", "ab") as log:
            return runner.Process(subprocess.Popen(command, pass_fds=(lock,), stdout=log, stderr=log))

    return start


LISTED = named(grid({"optim.lr": [0.1, 0.2, 0.3, 0.4, 0.5]}))


def states(folder):
    return {trial.name: trials.state(folder / trial.name).word for trial in LISTED}


def test_all_end_and_the_finished_are_kept(tmp_path):
    """Some fail in their ways, the rest finishes; a second call does nothing; a third tries what failed again."""
    kinds, said = {"lr=0.2": "fails", "lr=0.3": "mistake", "lr=0.4": "dies"}, []
    runner.run(runner.Listed(LISTED, tmp_path), tmp_path, starter(kinds=kinds), parallel=2, say=said.append, wait=0.01)
    want = {"lr=0.1": "finished", "lr=0.2": "failed", "lr=0.3": "failed", "lr=0.4": "failed", "lr=0.5": "finished"}
    assert states(tmp_path) == want and len(said) == 5
    reasons = [trials.state(tmp_path / name).reason for name in ("lr=0.2", "lr=0.3", "lr=0.4")]
    assert reasons == ["the loss is not finite", "no such thing", "exit code -9"]
    starts = {trial.name: (tmp_path / trial.name / "starts").read_text() for trial in LISTED}
    assert starts == {"lr=0.1": "x", "lr=0.2": "x", "lr=0.3": "x", "lr=0.4": "xxx", "lr=0.5": "x"}
    runner.run(runner.Listed(LISTED, tmp_path), tmp_path, starter(), wait=0.01)
    assert states(tmp_path) == want
    runner.run(runner.Listed(LISTED, tmp_path, retry=True), tmp_path, starter(), wait=0.01)
    assert set(states(tmp_path).values()) == {"finished"}
    assert (tmp_path / "lr=0.1" / "starts").read_text() == "x"


LAUNCHER = """
import sys
from pathlib import Path
from tests.sweep.test_runner import LISTED, runner, starter
runner.run(runner.Listed(LISTED, Path(sys.argv[1])), Path(sys.argv[1]), starter(pause=0.05), parallel=2, wait=0.01)
"""


def test_launchers_that_die_and_share(tmp_path, command_env):
    """Two launchers at once and one killed: each step of each trial is made once."""
    env = command_env()

    def launch():
        return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], env=env)

    first, second = launch(), launch()
    while not list(tmp_path.glob("*/step")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(60) == 0
    assert set(states(tmp_path).values()) == {"finished"}
    for trial in LISTED:
        lines = [json.loads(x)["step"] for x in (tmp_path / trial.name / "metrics.jsonl").read_text().splitlines()]
        assert lines == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted on Linux")
def test_looking_at_what_another_launcher_runs_leaves_no_file_open(tmp_path):
    source, slot = runner.Listed(LISTED[:1], tmp_path), runner._Slot(0)
    with trials.held(tmp_path, LISTED[0].name):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            runner._fill(slot, source, tmp_path, starter())
        assert slot.trial is None and len(os.listdir("/proc/self/fd")) == before


def test_a_folder_of_another_sweep(tmp_path):
    record = {"config": "a.py", "overrides": {}}
    trials.open_folder(tmp_path, record)
    trials.list_trials(tmp_path, LISTED[:2])
    trials.open_folder(tmp_path, record)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with says(f"{tmp_path}/run is a run. A sweep needs a folder of its own: --workdir=sweeps/NAME."):
        trials.open_folder(tmp_path / "run", {})
    with says(f"{tmp_path} belongs to another sweep:\n  config: 'a.py' -> 'b.py'\nUse another --workdir."):
        trials.open_folder(tmp_path, {**record, "config": "b.py"})
    trials.list_trials(tmp_path, LISTED)
    assert trials.read_folder(tmp_path) == (record, list(LISTED))
    with says(
        f"{tmp_path} belongs to another sweep: it has the trial lr=0.2, which is not among the 1. A sweep may become longer, as"
        " long as its trials keep their names. Use another --workdir."
    ):
        trials.list_trials(tmp_path, LISTED[:1])


def test_damaged_trials_are_failed_ones_and_the_rest_goes_on(tmp_path):
    """Each file of a trial damaged in its turn: said, and no other trial is hindered."""
    runner.Listed(LISTED, tmp_path)
    trials.open_folder(tmp_path, {"config": "a.py"})
    (tmp_path / "lr=0.1" / "status.json").write_text("{")
    for damaged in ("", "[]", "{}"):
        (tmp_path / "lr=0.2" / "trial.json").write_text(damaged)
        runner.Listed(LISTED, tmp_path)
        assert trials.read_folder(tmp_path)[1] == list(LISTED)
    (tmp_path / "lr=0.2" / "trial.json").write_text("{}")
    (tmp_path / "lr=0.3" / "result.json").write_text("[]")
    (tmp_path / "lr=0.4" / "metrics.jsonl").write_bytes(b"\xff\n")
    assert [trial.name for trial in trials.read_folder(tmp_path)[1]].count("lr=0.2") == 1
    runner.run(runner.Listed(LISTED, tmp_path), tmp_path, starter(), wait=0.01, say=lambda line: None)
    assert states(tmp_path) == {t.name: "failed" if t.name in ("lr=0.1", "lr=0.4") else "finished" for t in LISTED}
    for name, file in (("lr=0.1", "status.json"), ("lr=0.4", "metrics.jsonl")):
        assert trials.state(tmp_path / name).reason.startswith(f"{file} is damaged: ")
    runner.run(runner.Listed(LISTED, tmp_path, retry=True), tmp_path, starter(), wait=0.01, say=lambda line: None)
    assert set(states(tmp_path).values()) == {"finished"}
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"^sweep\.json is damaged: .* Delete it, and type the command"):
        trials.read_folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are shared out on Linux")
def test_cores_and_gpus_are_shared_out(tmp_path, monkeypatch):
    """Each of two has its own half, in a session of its own, with a trial's overrides after the common ones."""
    seen = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **options: seen.append((command, options)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5")
    start = runner.local("a.py", 2, {"optim.lr": "1", "train.steps": "3"})
    (tmp_path / "x").mkdir()
    for slot in (0, 1):
        start(LISTED[0], tmp_path / "x", 5, slot)
    (command, options), (_, other) = seen
    assert command[-2:] == ["--config.optim.lr=0.1", "--config.train.steps=3"] and options["start_new_session"]
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "0" and other["env"]["CUDA_VISIBLE_DEVICES"] == "1,5"
    assert [runner._share([3, 4, 7], slot, 2) for slot in (0, 1)] == [[3], [4, 7]]
    assert [runner._share([3, 4], slot, 3) for slot in (0, 1, 2)] == [[3], [4], [3]]
    # A system that does not say which cores there are shares none out.
    monkeypatch.delattr(os, "sched_getaffinity")
    runner.local("a.py", 2, {})(LISTED[0], tmp_path / "x", 5, 1)
    assert len(seen) == 3


def test_gpus_by_their_order_and_memory_for_all(tmp_path, monkeypatch):
    """A container that was given the second and the fourth has those that CUDA calls 0 and 1."""
    for name in ("nvidia1", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(runner, "DEVICES", tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", *runner.MEMORY):
        monkeypatch.delenv(name, raising=False)
    assert runner._on_gpus(0, 1) == {}
    assert [runner._on_gpus(slot, 2) for slot in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in (0, 1)]
    # Of five one GPU has three.
    shared = [runner._on_gpus(slot, 5) for slot in range(5)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["0", "1", "0", "1", "0"]
    assert {one["XLA_CLIENT_MEM_FRACTION"] for one in shared} == {"0.250"}
    # JAX refuses both names of it.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
    assert runner._on_gpus(4, 5) == {"CUDA_VISIBLE_DEVICES": "0"}
    # A user's own names are shared out as they are.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f,MIG-7a")
    assert [runner._on_gpus(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["GPU-5f", "MIG-7a"]
    assert runner._on_gpus(0, 1) == {}


PARENT = """
import sys, time, types
from pathlib import Path
from tfm_jax.sweep import runner
from tests.sweep.test_runner import LISTED
child = "import os, time; print(os.getpid(), len(os.sched_getaffinity(0)), flush=True); time.sleep(60)"
runner.job = lambda arguments: types.SimpleNamespace(command=lambda python: [python, "-c", child])
run = Path(sys.argv[1])
with open(run / "lock", "w") as lock:
    runner.local("a.py", 2, {})(LISTED[0], run, lock.fileno(), 1)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children on Linux")
def test_a_run_ends_with_its_launcher(tmp_path, command_env):
    """However that went: SIGKILL leaves it no time to say so. Until then it has its share of the cores."""
    parent, log = (
        subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=command_env()),
        tmp_path / "train.log",
    )
    while not log.is_file() or not log.read_text().endswith("\n"):
        time.sleep(0.01)
    child, cores = map(int, log.read_text().split())
    there = len(os.sched_getaffinity(0))
    assert cores == (there - there // 2 if there > 1 else 1)
    parent.kill()
    parent.wait()
    for _ in range(500):
        if not _runs(child):
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it outlived its launcher")


def _runs(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # whoever adopts it may be slow to bury it

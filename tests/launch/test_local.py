"""Processes of this machine: a run that loses one, and the numbers that cannot be."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tfm_jax.launch import local
from tfm_jax.paths import flatten
from tfm_jax.train.log import read_metrics
from tfm_jax.train.restore import load_params
from tfm_jax.train.run import train


@pytest.mark.journey
@pytest.mark.timeout(900)  # five process starts, which a busy machine stretches
def test_a_killed_process_is_named_and_the_run_goes_on_to_the_same_end(
    start_command, command_env, config_file, make_config, tmp_path
):
    """2 processes of 2 devices, one of them told to stop; again 2, one of them killed; then one; beside one of 8 devices."""
    changes = {"train.steps": 100, "train.eval_every": 0}
    run, quiet = tmp_path / "run", tmp_path / "quiet"
    env = command_env()
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=1 ", "")
    launcher = start_command(
        "launch", "--backend=local", "--processes=2", "--devices=2", "--elastic=1", "--restarts=2", "--json", "--",
        f"--config={config_file}", f"--workdir={run}", *(f"--config.{key}={value}" for key, value in changes.items()),
        env=env,
    )  # fmt: skip
    said = []

    def started():
        """Process ids of the next attempt."""
        while "launch: started" not in (line := launcher.stderr.readline()):
            assert line, said
            said.append(line)
        return [int(pid) for pid in re.findall(r"\d+", line.partition("pid")[2])]

    pids = started()
    wait_for_step(run, launcher, 6)
    os.kill(pids[1], signal.SIGTERM)
    pids = started()
    told = re.search(r"checkpoint of step (\d+); 1 restarts", said[-1])
    assert said[-2] == "launch: told to stop, and saved.\n" and told, said
    assert read_status(run) == ("preempted", f"stopped by SIGTERM after step {told[1]}")
    wait_for_step(run, launcher, int(told[1]) + 6)
    os.kill(pids[1], signal.SIGKILL)
    newest, began = max(steps(run)), time.monotonic()
    while Path(f"/proc/{pids[0]}").exists():
        time.sleep(0.05)
    assert time.monotonic() - began < 60
    train(make_config(changes | {"checkpoint.every": 0}), quiet)  # meanwhile
    errors, out = launcher.stderr.read(), launcher.stdout.read()
    assert launcher.wait() == 0 and json.loads(out.splitlines()[-1]) == {"exit_code": 0}, errors
    assert re.search(rf"launch: Process 1 \(\S+ pid {pids[1]}\) died\.\n", errors), errors
    again = re.search(r"launch: starting again from the checkpoint of step (\d+); 0 restarts are left\.", errors)
    assert again and int(again[1]) >= newest and f"continued at step {again[1]}." in errors, errors
    assert "launch: going on with 1 of 2 processes." in errors
    losses, wanted = (
        [(r["step"], r["train/loss"]) for r in read_metrics(r) if "train/loss" in r] for r in (run, quiet)
    )
    assert [step for step, _ in losses] == [step for step, _ in wanted] == list(range(1, 101))
    np.testing.assert_allclose([x for _, x in losses], [x for _, x in wanted], rtol=1e-5)
    ours, theirs = (flatten(load_params(r)[0]) for r in (run, quiet))
    assert ours.keys() == theirs.keys()
    # A key's bias moves all scores of a row alike: its gradient is rounding, which Adam makes as large as any.
    for path in [path for path in ours if not path.endswith("attention/key/bias")]:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-4, atol=1e-5, err_msg=path)


def wait_for_step(run, launcher, step):
    """Until there is a checkpoint of a step, or a later one."""
    while max(steps(run), default=0) < step:
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.01)


def read_status(run):
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["reason"]


def steps(run):
    folder = run / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def test_numbers_that_cannot_be(a_job, says, monkeypatch):
    with says("--processes=0: must be at least 1."):
        local.launch(a_job, processes=0)
    with says("--elastic=3 is more than --processes=2."):
        local.launch(a_job, processes=2, elastic=3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with says("--processes times --devices is 4 GPUs, but CUDA_VISIBLE_DEVICES=4,5,6 has 3."):
        local.launch(a_job, processes=2, devices=2, platform="cuda")


def test_dry_run_shows_each_process(a_job, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert local.launch(a_job, processes=2, devices=2, platform="cuda", host_timeout=20, dry_run=True) == 0
    first, second = capsys.readouterr().out.splitlines()
    for line, index, gpus in ((first, 0, "4,5"), (second, 1, "6,7")):
        assert line.startswith(
            f"TFM_JAX_HOST_TIMEOUT=20 JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES={gpus} JAX_COORDINATOR_ADDRESS=127.0.0.1:12355"
            f" JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index} "
        )
        assert line.endswith(f"-m experiments.train --config=configs/gpt_stdlib.py --workdir={a_job.run}")


@pytest.mark.parametrize(
    ("codes", "code", "reason"),
    [
        ([0, 0], 0, "finished."),
        ([75, 75], 75, "told to stop, and saved."),
        ([75, 2], 2, "stopped by a mistake that starting again would repeat; see above."),
        ([75, -9], 1, "Process 1 of 2 was ended by SIGKILL."),
        ([75, 3], 1, "Process 1 of 2 ended with exit code 3."),
    ],
)
def test_how_an_attempt_ended(a_job, codes, code, reason):
    assert local._ended(a_job, codes, 1, False, time.time()) == (code, reason, False)


def test_the_reason_is_the_watchdogs_where_there_is_one(a_job):
    a_job.run.mkdir()
    (a_job.run / "status.json").write_text('{"state": "failed", "reason": "Process 5 (b pid 7) died."}')
    assert local._ended(a_job, [75, -9], 1, False, time.time() - 5).reason == "Process 5 (b pid 7) died."
    assert "SIGKILL" in local._ended(a_job, [75, -9], 1, False, time.time() + 5).reason  # of an earlier attempt

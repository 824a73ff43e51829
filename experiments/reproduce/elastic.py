"""2 and 4 processes of 2 devices beside one process: losses, a process killed and the run restarted, other numbers on resuming.

The losses must be those of one process; when a process is killed, the others must be down within 60 s and the launcher must
name it, restart from the newest checkpoint and arrive at the undisturbed run's parameters bit for bit; and a run resumed
with 1, 2 and 4 processes must load the same global batches. Writes `results/elastic.json`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import cli
from experiments.reproduce import recorded
from experiments.reproduce.kills import finished_steps, same_state
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError
from tfm_jax.train.log import read_metrics

EXAMPLES = """\
  python -m experiments.reproduce.elastic"""
STEPS, EVERY, RESUMED = 60, 10, 30
SECONDS = 3600  # of a run, before it counts as hanging


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--workdir", type=Path, default=Path("runs/elastic"))
    flags, _ = cli.parse(made, argv)
    shutil.rmtree(flags.workdir, ignore_errors=True)
    runs = {count: flags.workdir / f"undisturbed_{count}" for count in (1, 2, 4)}
    for count, run in runs.items():
        _finish(_start(run, count))
        print(f"{count} x 2 devices: undisturbed run finished.", flush=True)
    losses = {count: _losses(run) for count, run in runs.items()}
    apart = {str(count): _apart(losses[count], losses[1]) for count in (2, 4)}
    killed = [_killed(flags.workdir, count, victim, runs[count]) for count, victim in ((2, 1), (2, 0), (4, 2), (4, 0))]
    resumed = {count: _resumed(flags.workdir, count, runs[2]) for count in (1, 2, 4)}
    rows = {count: recorded.read(_rows(run)) for count, run in resumed.items()}
    steps = range(RESUMED, STEPS)
    whole = recorded.read(_rows(runs[1]))
    differences = {str(count): _apart(_losses(run), losses[1]) for count, run in resumed.items()}
    identical = all(found[step] == whole[step] for found in rows.values() for step in steps)
    result = {
        "loss_largest_relative_difference": apart,
        "killed": [case._asdict() for case in killed],
        "most_seconds_until_the_others_were_down": max(case.seconds_until_down for case in killed),
        "resumed_batches_identical": identical,
        "resumed_loss_largest_relative_difference": differences,
    }
    write_result("elastic", result, config=" ".join(_command(Path("RUN"), 2)[1:]), seed=0)
    print(f"Losses apart by {apart}; batches identical when resumed: {identical}, losses apart by {differences}.")
    if flags.json:
        cli.print_json(result)
    close = max(*apart.values(), *differences.values()) < 1e-5
    return 0 if close and identical and all(_good(case) for case in killed) else 1


class Killed(NamedTuple):
    """What became of a run of which one process was killed."""

    processes: int
    killed: int
    seconds_until_down: float
    named: bool
    from_newest_checkpoint: bool
    steps_lost: int
    bit_identical: bool


def _good(case: Killed) -> bool:
    return case.seconds_until_down < 60 and case.named and case.from_newest_checkpoint and case.bit_identical


def _command(run: Path, processes: int) -> list[str]:
    return [
        sys.executable, "-m", "experiments.launch", "--backend=local", f"--processes={processes}", "--devices=2",
        "--restarts=1", "--", "--config=configs/gpt_stdlib.py:smoke", f"--workdir={run}",
        "--config.data.name=experiments.reproduce.recorded:make", f"--config.train.steps={STEPS}",
        "--config.train.eval_every=0", f"--config.checkpoint.every={EVERY}", "--config.checkpoint.keep=100",
        "--config.optim.name=adamw", "--config.optim.lr=1e-3", "--config.model.dropout=0.1", "--config.log.every=1",
        "--config.log.tensorboard=False",
    ]  # fmt: skip


def _rows(run: Path) -> Path:
    return run.parent / f"{run.name}_rows"


def _start(run: Path, processes: int) -> subprocess.Popen[bytes]:
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "launch.log", "wb") as log:
        env = os.environ | {recorded.FOLDER: str(_rows(run).absolute())}
        return subprocess.Popen(_command(run, processes), env=env, stdout=log, stderr=log)


def _finish(launcher: subprocess.Popen[bytes]) -> None:
    if launcher.wait(SECONDS):
        raise UserError(f"{' '.join(map(str, launcher.args))} ended with exit code {launcher.returncode}.")  # type: ignore[arg-type]


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(run) if "train/loss" in line}


def _apart(losses: dict[int, float], wanted: dict[int, float]) -> float:
    if losses.keys() != wanted.keys():
        raise UserError(f"Steps {sorted(losses.keys() ^ wanted.keys())} are in one run's log only.")
    return max(abs(losses[step] / wanted[step] - 1) for step in wanted)


def _killed(folder: Path, count: int, victim: int, undisturbed: Path) -> Killed:
    """Kill one process in mid-run; the launcher does the rest."""
    run = folder / f"killed_{victim}_of_{count}"
    launcher = _start(run, count)
    deadline = time.monotonic() + SECONDS
    while max(finished_steps(run), default=0) < 2 * EVERY:
        if time.monotonic() > deadline or launcher.poll() is not None:
            raise UserError(f"{run} does not get on; see launch.log there.")
        time.sleep(0.01)
    found = re.search(r"started \d+ processes, pid ([\d, ]+)\.", (run / "launch.log").read_text())
    assert found is not None
    pids = [int(pid) for pid in found[1].split(", ")]
    newest, killed_at = max(finished_steps(run)), time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.02)
    seconds = time.monotonic() - killed_at
    reached = max(_losses(run))
    _finish(launcher)
    text = (run / "launch.log").read_text()
    again = re.search(r"starting again from the checkpoint of step (\d+)", text)
    step = int(again[1]) if again else 0
    named = re.search(rf"launch: Process {victim} \(\S+( pid {pids[victim]})?\) died\.", text) is not None
    equal, _ = same_state(undisturbed, run)
    case = Killed(count, victim, round(seconds, 1), named, step >= newest, max(0, reached - step), equal)
    print(case, flush=True)
    return case


def _resumed(folder: Path, count: int, source: Path) -> Path:
    """The second half of a run, with another number of processes."""
    run = folder / f"resumed_{count}"
    shutil.copytree(source, run)
    (run / "result.json").unlink()
    for step in finished_steps(run):
        if step > RESUMED:
            shutil.rmtree(run / "checkpoints" / str(step))
    _finish(_start(run, count))
    print(f"resumed at step {RESUMED} with {count} processes.", flush=True)
    return run


if __name__ == "__main__":
    cli.run(main)

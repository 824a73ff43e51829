"""What every backend launches, and the loop of those that start it again themselves.

A backend is a file here whose `launch(job, **settings) -> int` starts a job, or says what it would start, and returns an
exit code; `my_lab.cluster:launch` is one too. Its keyword arguments are the command's flags.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tfm_jax.errors import UserError
from tfm_jax.files import read_status
from tfm_jax.train.rundir import checkpoint_steps

FINISHED, FAILED, MISTAKE, PREEMPTED = 0, 1, 2, 75


class Job(NamedTuple):
    """Arguments of `experiments.train`, and the run directory that is among them."""

    arguments: tuple[str, ...]
    run: Path

    def command(self, python: str) -> list[str]:
        return [python, "-m", "experiments.train", *self.arguments]


class Ended(NamedTuple):
    """How an attempt ended: its exit code, why in words, and whether somebody told the launcher to stop."""

    code: int
    reason: str
    stopped: bool


def job(arguments: Sequence[str]) -> Job:
    """The job that training flags describe.

    Raises:
      UserError: no run directory is among them.
    """
    found = None
    for i, here in enumerate(arguments):
        if here == "--workdir":
            found = "".join(arguments[i + 1 : i + 2])
        elif here.startswith("--workdir="):
            found = here.partition("=")[2]
    if not found:
        raise UserError(
            "--workdir is not among the training flags: all processes and all attempts share a run directory."
        )
    return Job(tuple(arguments), Path(found))


def at_least(least: int, **settings: int | None) -> None:
    """Refuse a setting below its least value."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: must be at least {least}.")


def newest_step(run: Path) -> int | None:
    """The step of the newest whole checkpoint."""
    return max(checkpoint_steps(run), default=None)


def recorded(run: Path, since: float) -> str:
    """The reason in `status.json`, if the run has failed since then (seconds of `time.time`)."""
    path = run / "status.json"
    if not path.is_file() or path.stat().st_mtime < since:
        return ""
    status = read_status(run)
    return str(status["reason"]) if status["state"] == "failed" else ""


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def supervise(run: Path, attempt: Callable[[Ended | None], Ended], restarts: int) -> int:
    """Call `attempt`, with how the one before ended, until the run has finished or was stopped; returns its exit code.

    A user's mistake is not tried again: it would be made again.
    """
    at_least(0, restarts=restarts)
    ended: Ended | None = None
    for left in reversed(range(restarts + 1)):
        ended = attempt(ended)
        if ended.code == FINISHED:
            break
        say(ended.reason)
        if ended.stopped or ended.code == MISTAKE:
            break
        if left:
            step = newest_step(run)
            place = "the beginning" if step is None else f"the checkpoint of step {step}"
            say(f"starting again from {place}; {left - 1} restarts are left.")
        elif restarts:
            say(f"{restarts} restarts were not enough.")
    assert ended is not None
    return ended.code

"""Trials as jobs of a Slurm cluster, which go on when their launcher ends; the next one finds them by their names."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tfm_jax.errors import UserError
from tfm_jax.files import path_id, write_atomic
from tfm_jax.launch import slurm
from tfm_jax.launch.job import FAILED, FINISHED, MISTAKE, PREEMPTED, job
from tfm_jax.sweep import runner, trials, words
from tfm_jax.sweep.space import Trial

# Asking more often is unkind to a cluster's controller.
EVERY = 5.0


def starter(
    config: str,
    common: Mapping[str, str],
    settings: Mapping[str, Any],
    every: float = EVERY,
    clock: Callable[[], float] = time.monotonic,
) -> runner.Start:
    """Start trials as jobs.

    Args:
      common: overrides of all trials, as texts; a trial's own come after them.
      settings: keyword arguments of `launch.slurm.launch`.
      every: seconds between questions to the queue.
    """

    def start(trial: Trial, run: Path, lock: int, slot: int) -> runner.Running:
        kept, name = run / slurm.NUMBER, job_name(run)
        if kept.is_file() and queued(kept.read_text()):
            return Submitted(run, kept.read_text(), every, clock)
        # By its name: a launcher that was killed right after `sbatch` has not kept the number.
        if numbers := _named(name, every):
            write_atomic(kept, numbers[0])
        else:
            own = {**settings, "sbatch": [*settings.get("sbatch", ()), f"--job-name={name}"]}
            slurm.launch(job(runner.arguments(trial, run, config, common)), **own)
        return Submitted(run, kept.read_text(), every, clock)

    if named := [one for one in settings.get("sbatch", ()) if one.startswith(("--job-name", "-J"))]:
        raise UserError(f"--sbatch={named[0]}: a sweep names its jobs itself, to find them again.")
    return start


def job_name(run: Path) -> str:
    """The run's name, made unique by its path; without commas, which part the names that squeue is asked for."""
    return f"{re.sub('[^A-Za-z0-9.=_-]', '_', run.name)}-{path_id(run)}"


def _named(name: str, every: float) -> list[str]:
    """The numbers of jobs of a name; a controller that does not answer is asked again, a dozen times.

    Raises:
      UserError: it never does.
    """
    for _ in range(12):
        found = _squeue(f"--name={name}")
        if not found.returncode:
            return found.stdout.split()
        time.sleep(every)
    raise UserError(f"squeue does not say whether {name} is submitted already: {found.stderr.strip()}")


def queued(number: str) -> bool:
    """Whether a job waits or runs; a controller that does not answer is taken to be busy."""
    done = _squeue(f"--jobs={number}")
    return number in done.stdout.split() if done.returncode == 0 else "Invalid job id" not in done.stderr


def _squeue(which: str) -> subprocess.CompletedProcess[str]:
    """Numbers of jobs that wait or run."""
    try:
        return subprocess.run(["squeue", "--noheader", "--format=%i", which], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("There is no squeue here; Slurm's client programs have it (slurm-client on Debian).") from None


class Submitted:
    """A run as a job."""

    lasting = True

    def __init__(self, run: Path, number: str, every: float, clock: Callable[[], float]) -> None:
        self._run, self._number, self._every, self._clock = run, number, every, clock
        self._asked = clock()

    def poll(self) -> int | None:
        if self._clock() - self._asked < self._every:
            return None
        self._asked = self._clock()
        if queued(self._number):
            return None
        word = trials.said(self._run)[0]
        if word in (trials.FINISHED, "preempted"):
            return FINISHED if word == trials.FINISHED else PREEMPTED
        # What is wrong before a run has begun its folder does not tell.
        wrong = words.mistake(words.own_lines(self._run / f"slurm-{self._number}.log"))
        return MISTAKE if wrong else FAILED

    def stop(self) -> None:
        subprocess.run(["scancel", self._number], capture_output=True)

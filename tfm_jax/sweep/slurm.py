"""Trials as jobs of a Slurm cluster, which go on when their launcher ends; the next one finds them by their numbers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
        path = run / slurm.NUMBER
        if not path.is_file() or not queued(path.read_text()):
            slurm.launch(job(runner.arguments(trial, run, config, common)), **settings)
        return Submitted(run, path.read_text(), every, clock)

    return start


def queued(number: str) -> bool:
    """Whether a job waits or runs; a controller that does not answer is taken to be busy."""
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={number}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return number in done.stdout.split() if done.returncode == 0 else "Invalid job id" not in done.stderr


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

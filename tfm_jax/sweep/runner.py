"""Run a sweep's trials, a few at a time, until each has an end.

Nothing is kept in memory that a launcher's death would lose: what a trial has come to stands in its run directory, who works on
it is told by a lock that the kernel frees, and a run whose launcher dies is told to stop, saves, and is gone on with by the next.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tfm_jax.files import write_atomic
from tfm_jax.launch.job import MISTAKE, PREEMPTED, job
from tfm_jax.sweep import trials
from tfm_jax.sweep.space import Trial
from tfm_jax.sweep.trials import FAILED, State
from tfm_jax.sweep.words import last_words

# A user's mistake is not tried again: it would be made again.
ATTEMPTS = 3
DEVICES = Path("/dev")


class Source(Protocol):
    """Where trials come from: a list, or a study that draws them."""

    def candidates(self) -> Sequence[Trial]:
        """Those that are known and have no end yet, in the order in which they should start."""

    def draw(self) -> Trial | None:
        """One more; None where there are no more."""

    def should_stop(self, trial: Trial) -> bool:
        """Whether what a running trial has logged so far is not worth going on; its file `pruned` then says so."""

    def ended(self, trial: Trial, state: State) -> None:
        """A trial has finished, failed, or was stopped."""


class Running(Protocol):
    """A trial at work.

    Attributes:
      lasting: whether it goes on without its launcher, and the next one finds it again.
    """

    lasting: bool

    def poll(self) -> int | None:
        """Its exit code, None while it runs; a cluster is not asked at each call, so that a code may be told once."""

    def stop(self) -> None:
        """Make it save and end."""


Start = Callable[[Trial, Path, int, int], Running]


@dataclass
class _Slot:
    """One of the places in which trials run."""

    number: int
    trial: Trial | None = None
    running: Running | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    stopped: bool = False


def run(
    source: Source,
    folder: Path,
    start: Start,
    *,
    parallel: int = 1,
    say: Callable[[str], None] = print,
    wait: float = 0.3,
) -> None:
    """Start trials, stop those that are not worth it, and come back when each has an end.

    A trial that another launcher works on is left to it, and waited for. A run that dies without saying why is started again,
    and has failed the third time.

    Args:
      start: `(trial, run, lock file descriptor, slot) -> Running`.
      parallel: trials at a time.
      wait: seconds between looks.
    """
    slots, deaths = [_Slot(number) for number in range(parallel)], dict[str, int]()
    try:
        while True:
            for slot in slots:
                if slot.running is not None and (code := slot.running.poll()) is not None:
                    _empty(slot, code, source, folder, deaths, say)
                if slot.trial is None:
                    _fill(slot, source, folder, start)
                elif not slot.stopped and source.should_stop(slot.trial):
                    _stop(slot)
            if all(slot.trial is None for slot in slots) and not source.candidates():
                return
            time.sleep(wait)
    except BaseException:
        ending = [slot for slot in slots if slot.running is not None and not slot.running.lasting]
        for slot in ending:
            _stop(slot)
        while any(slot.running is not None and slot.running.poll() is None for slot in ending):
            time.sleep(wait)
        for slot in slots:
            slot.stack.close()
        raise


def _stop(slot: _Slot) -> None:
    if slot.running is not None:
        slot.running.stop()
        slot.stopped = True


def _fill(slot: _Slot, source: Source, folder: Path, start: Start) -> None:
    """Start a trial in an empty slot: one that somebody has left, or a new one."""
    for trial in source.candidates():
        if _started(slot, trial, source, folder, start):
            return
    while (drawn := source.draw()) is not None:
        if _started(slot, drawn, source, folder, start):
            return


def _started(slot: _Slot, trial: Trial, source: Source, folder: Path, start: Start) -> bool:
    file = slot.stack.enter_context(trials.held(folder, trial.name))
    if file is None:
        # At every look: what is not closed now stays open.
        slot.stack.close()
        return False
    state = trials.state(folder / trial.name)
    if state.word in trials.ENDED:
        # It has ended since it was looked for, its launcher had no time to say so, or its files are damaged.
        if state.word == FAILED:
            write_atomic(folder / trial.name / FAILED, state.reason)
        source.ended(trial, state)
        slot.stack.close()
        return False
    slot.trial, slot.stopped = trial, False
    slot.running = start(trial, folder / trial.name, file.fileno(), slot.number)
    return True


def _empty(
    slot: _Slot, code: int, source: Source, folder: Path, deaths: dict[str, int], say: Callable[[str], None]
) -> None:
    """Take note of how a slot's trial has ended."""
    assert slot.trial is not None
    trial, run = slot.trial, folder / slot.trial.name
    state = trials.state(run)
    deaths[trial.name] = deaths.get(trial.name, 0) + (code != PREEMPTED)
    ended = state.word in trials.ENDED
    if not ended and (code == MISTAKE or deaths[trial.name] >= ATTEMPTS):
        # It had no time to say so itself.
        state, ended = State(FAILED, last_words(run, code) or f"exit code {code}", state.step), True
        write_atomic(run / FAILED, state.reason)
    if ended:
        source.ended(trial, state)
        why = f": {state.reason.rstrip('.')}" if state.reason else ""
        say(f"{trial.name}: {state.word} at step {state.step}{why}.")
    slot.stack.close()
    slot.trial = slot.running = None


@dataclass
class Listed:
    """Trials that are known beforehand.

    Args:
      retry: let what has failed be tried again.
    """

    trials: Sequence[Trial]
    folder: Path
    retry: bool = False

    def __post_init__(self) -> None:
        trials.list_trials(self.folder, self.trials)
        for trial in self.trials if self.retry else ():
            trials.forget_failure(self.folder, trial.name)

    def candidates(self) -> Sequence[Trial]:
        return [trial for trial in self.trials if trials.said(self.folder / trial.name)[0] not in trials.ENDED]

    def draw(self) -> Trial | None:
        return None

    def should_stop(self, trial: Trial) -> bool:
        return False

    def ended(self, trial: Trial, state: State) -> None:
        """Its run says so already."""


def local(config: str, parallel: int, common: Mapping[str, str]) -> Start:
    """Start trials as processes here, each on its share of the CPU's cores and of the GPUs, ended by the kernel if this
    process dies.

    Args:
      common: overrides of all trials, as texts; a trial's own come after them.
    """

    def start(trial: Trial, run: Path, lock: int, slot: int) -> Running:
        command = job(arguments(trial, run, config, common)).command(sys.executable)
        with open(run / "train.log", "ab") as log:
            return Process(bound(command, slot, parallel, stdout=log, stderr=log, pass_fds=(lock,)))

    return start


def bound(command: Sequence[str], slot: int, parallel: int, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process on the slot's share of the cores and GPUs that this one has; it saves and ends when this one is gone."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    parent = os.getpid()

    def before() -> None:
        if sys.platform == "linux":
            # PR_SET_PDEATHSIG: however that went.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)
            os.sched_setaffinity(0, _share(cores, slot, parallel))

    # A session of its own: what a terminal sends to its group would reach it twice.
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=before,
        start_new_session=True,
        env={**os.environ, **_on_gpus(slot, parallel)},
        **options,
    )


def arguments(trial: Trial, run: Path, config: str, common: Mapping[str, str]) -> list[str]:
    """Those of `experiments.train` for a trial."""
    overrides = [f"--config.{key}={value}" for key, value in {**common, **trial.overrides}.items()]
    return [f"--config={config}", f"--workdir={run}", *overrides]


T = TypeVar("T")


def _share(those: Sequence[T], slot: int, parallel: int) -> Sequence[T]:
    """The slot's part of them; of fewer than there are slots, one that it shares; none of none."""
    if 0 < len(those) < parallel:
        return [those[slot % len(those)]]
    return those[slot * len(those) // parallel : (slot + 1) * len(those) // parallel]


# By what a user says how much of a GPU's memory a process takes.
MEMORY = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)


def _on_gpus(slot: int, parallel: int) -> dict[str, str]:
    """Variables that leave a slot its GPUs, and of one that several share a part of the memory; none for the only slot."""
    gpus = _gpus()
    if parallel == 1 or not gpus:
        return {}
    out = {"CUDA_VISIBLE_DEVICES": ",".join(_share(gpus, slot, parallel))}
    if parallel > len(gpus) and not any(name in os.environ for name in MEMORY):
        # Together what JAX would take for one: it takes that at its start, and the second would find nothing left.
        out["XLA_CLIENT_MEM_FRACTION"] = f"{0.75 / math.ceil(parallel / len(gpus)):.3f}"
    return out


def _gpus() -> list[str]:
    """NVIDIA GPUs by what CUDA_VISIBLE_DEVICES calls them: CUDA counts those that are here, whatever their files are called."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    return [str(i) for i, _ in enumerate(DEVICES.glob("nvidia[0-9]*"))]


class Process:
    """A run in a process of its own."""

    lasting = False

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        self._process.terminate()

"""Trials as threads of one process that share its compiled programs: start-up, tracing's imports and compiling are paid once.

Each is an ordinary run by the ordinary loop, in its own directory. Their programs, equal but for numbers, are one program over
the numbers and states of all (`sweep.programs`), with which the compiler folds other products than with constants, so that a
trial is its solo run up to rounding: on CPU the runs call it in turn, a loop over the population; on accelerators
their calls are one over a population axis (`sweep.together`). One that ends, diverges or is stopped calls no more, and another
takes its place. With several devices each has its share of the trials.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.launch.job import FAILED, FINISHED, MISTAKE, PREEMPTED
from tfm_jax.sweep.programs import Shared, in_turn
from tfm_jax.sweep.runner import Running, Start
from tfm_jax.sweep.space import Trial
from tfm_jax.sweep.streams import ByThread
from tfm_jax.sweep.together import Together
from tfm_jax.train.build import build
from tfm_jax.train.run import train
from tfm_jax.train.stop import StopRequest

# Programs at a time on a CPU: while one waits for its last product or for the interpreter, the others' fill the cores.
TURNS = 3


def starter(resolved: Callable[[Trial], configs.Config], examples: Sequence[Trial], streams: ByThread) -> Start:
    """Start trials as threads.

    Args:
      resolved: the config of a trial.
      examples: trials to learn from which numbers of the programs differ.
      streams: what stands for `sys.stderr`.

    Raises:
      UserError: two of the examples have states of other shapes.
    """
    devices = jax.local_devices()
    # On CPU a mapped step has more of a member's time than a step alone, on accelerators small products wait for their launch.
    shared = [Shared(in_turn(TURNS) if device.platform == "cpu" else Together) for device in devices]
    for one, device in zip(shared, devices, strict=True):
        _learn(one, resolved, examples, device)

    def start(trial: Trial, run: Path, lock: int, slot: int) -> Running:
        place = slot % len(devices)
        return Thread(resolved(trial), run, shared[place], devices[place], streams)

    return start


def _learn(
    shared: Shared, resolved: Callable[[Trial], configs.Config], examples: Sequence[Trial], device: jax.Device
) -> None:
    """Trace a trial for each key that is swept: two values are enough to see where it stands in the programs, and a zero besides,
    which may leave out a part of them: a program more."""
    first, covered = examples[0], set[tuple[str, bool]]()
    shapes: list[tuple[Any, Any]] | None = None
    for trial in examples:
        new = {(key, bool(value)) for key, value in trial.overrides.items() if first.overrides.get(key) != value}
        new -= covered
        if trial is not first and not new:
            continue
        covered |= new
        experiment = build(resolved(trial), devices=[device], jit=shared)
        experiment.peak_flops()  # measured while nothing else runs
        with jax.set_mesh(experiment.layout.mesh):
            experiment.jitted_init().lower()
            state = experiment.abstract_state()
            experiment.jitted_step().lower(state, experiment.batch(0))
        found = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
        shapes = shapes or found
        if found != shapes:
            said = ", ".join(sorted(f"{key}={trial.overrides[key]!r}" for key, _ in new))
            raise UserError(
                f"--vectorise: {said} gives the state of {first.name} other shapes. Sweep what does so with --parallel."
            )


class Thread:
    """A run in a thread."""

    lasting = False

    def __init__(
        self, config: configs.Config, run: Path, shared: Shared, device: jax.Device, streams: ByThread
    ) -> None:
        self._code: int | None = None
        self._request = StopRequest()
        self._arguments = config, run, shared, device, streams
        threading.Thread(target=self._work, name=run.name, daemon=True).start()

    def _work(self) -> None:
        config, run, shared, device, streams = self._arguments
        # Orbax saves one thing at a time in a process: a trial waits for its own, and the others train meanwhile.
        config = {**config, "checkpoint": {**config["checkpoint"], "asynchronous": False}}
        code = FAILED
        try:
            with open(run / "train.log", "a", buffering=1) as file:
                streams.to(file)
                try:
                    outcome = train(config, run, jit=shared, stop=self._request, devices=[device])
                    code = FINISHED if outcome.status == "finished" else PREEMPTED
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                    code = MISTAKE
                except Exception:
                    # The thread's end, as a process ends: said in the trial's log, and no other trial's matter.
                    traceback.print_exc()
        finally:
            # However it ended: the launcher waits for it.
            self._code = code

    def poll(self) -> int | None:
        return self._code

    def stop(self) -> None:
        self._request.asked, self._request.name = True, "the sweep"

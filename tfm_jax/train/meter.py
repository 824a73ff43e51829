"""What the loop knows about itself: sums of metrics since the last report, speed, and time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.data.prefetch import Prefetcher
from tfm_jax.train.build import Experiment
from tfm_jax.train.log import Metrics

# Metrics of the step that are not the task's own, with the tag each is logged under.
_TAGS = {"grad_norm": "train/grad_norm"}


class Meter:
    """Adds up steps. Its clock stops during evaluation and saving, so speed means training speed."""

    def __init__(self, experiment: Experiment, *, seconds: float, skipped: int) -> None:
        self.experiment = experiment
        self.compile_seconds = 0.0
        self.bad_in_a_row = 0
        self.skipped = skipped  # over all starts of this run
        self.last: Metrics = {}
        self._total = seconds  # over all starts of this run, up to the last pause
        self._resumed_at: float | None = None
        self._batches: Any = None
        steps = jnp.arange(experiment.train.steps)
        # Known beforehand: a computation during training would wait for the step that is under way.
        self._rates = np.asarray(jnp.broadcast_to(jax.vmap(experiment.optimizer.schedule)(steps), steps.shape))
        self._clear()

    def start(self, step: int, batches: Prefetcher[Any]) -> None:
        self._batches, self._waited = batches, batches.wait_seconds
        self._first_step = step
        self._resumed_at = time.perf_counter()
        self._began = self.train_seconds
        self._since = self.train_seconds

    def pause(self) -> None:
        self._total, self._resumed_at = self.train_seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        running = self._resumed_at is not None
        self.pause()
        try:
            yield
        finally:
            if running:
                self._resumed_at = time.perf_counter()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.paused():
            yield
        self.compile_seconds += time.perf_counter() - began

    @property
    def train_seconds(self) -> float:
        """Seconds of training in all starts of this run, without compiling, evaluating and saving."""
        running = 0.0 if self._resumed_at is None else time.perf_counter() - self._resumed_at
        return self._total + running

    def add(self, step: int, metrics: dict[str, tuple[Any, Any]]) -> None:
        bad = float(metrics["skipped"][0]) > 0
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        self.skipped += bad
        self._steps += 1
        self._units += float(metrics["weight"][0])
        for name, (total, count) in metrics.items():
            if name not in ("skipped", "weight"):
                entry = self._sums.setdefault(name, [0.0, 0.0])
                entry[0] += float(total)
                entry[1] += float(count)

    def report(self, step: int) -> Metrics:
        """Means and rates since the last report, under the tags of the run's log."""
        now = self.train_seconds
        seconds = max(now - self._since, 1e-9)
        waited = self._batches.wait_seconds
        out = {_TAGS.get(n, f"train/{n}"): t / c for n, (t, c) in self._sums.items() if c}
        per_device = self._units / seconds / self.experiment.layout.mesh.size
        unit = self.experiment.task.unit
        out |= {
            "train/skipped_steps": float(self.skipped),
            "optim/lr": float(self._rates[max(step - 1 - self.skipped, 0)]),
            "perf/steps_per_sec": self._steps / seconds,
            f"perf/{unit}s_per_sec": self._units / seconds,
            f"perf/{unit}s_per_sec_per_device": per_device,
            "perf/data_wait_frac": (waited - self._waited) / seconds,
            "perf/compile_s": self.compile_seconds,
        }
        if self.experiment.pipeline is not None:
            out["perf/bubble_frac"] = self.experiment.pipeline.bubble
        peak = self.experiment.peak_flops()
        flops = self.experiment.flops_per_token
        if flops is not None and peak is not None:
            out["perf/mfu"] = per_device * flops / peak
        self._since, self._waited, self.last = now, waited, out
        self._clear()
        return out

    def seconds_left(self, step: int) -> float:
        done = max(step - self._first_step, 1)
        return (self.train_seconds - self._began) / done * (self.experiment.train.steps - step)

    def _clear(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._steps, self._units = 0, 0.0

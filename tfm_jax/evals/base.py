"""What every evaluator is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax

from tfm_jax.errors import UserError
from tfm_jax.parallel.sharding import Layout
from tfm_jax.tasks.base import Task

Evaluate = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Context:
    """The parts of a run that evaluators use, and the steps that they have compiled.

    Attributes:
      data: see `data.types.Data`.
      batch_size: rows of a training batch, the default for evaluation.
    """

    task: Task
    model: nn.Module
    layout: Layout
    data: Any
    batch_size: int
    _steps: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)

    def jitted(self, name: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """One compiled function a name, shared by evaluators and splits; jit adds one a batch shape."""
        if name not in self._steps:
            self._steps[name] = jax.jit(make())
        return self._steps[name]

    def rows(self, batch_size: int | None) -> int:
        """A batch size that divides over the mesh: the asked one rounded up, since padded rows weigh nothing."""
        if batch_size is not None and batch_size < 1:
            raise UserError(f"evals: batch_size={batch_size}: must be at least 1.")
        wanted, ways = batch_size or self.batch_size, self.layout.batch_ways
        return -(-wanted // ways) * ways

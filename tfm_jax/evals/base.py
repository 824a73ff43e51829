"""What every evaluator is given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax

from tfm_jax.data.prefetch import Prefetcher
from tfm_jax.errors import UserError
from tfm_jax.parallel.multihost import global_batch, whole
from tfm_jax.parallel.sharding import Layout
from tfm_jax.tasks.base import Task, bind

Evaluate = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Evaluator:
    """An `Evaluate` that says beforehand what it gives.

    Attributes:
      evaluate: from a training state, numbers by name.
      gives: from the shapes of one, those names; what the task cannot do with the first batch is an error here.
    """

    evaluate: Evaluate
    gives: Callable[[Any], Collection[str]]

    def __call__(self, state: Any) -> dict[str, float]:
        return self.evaluate(state)


@dataclass(frozen=True)
class Context:
    """The parts of a run that evaluators use, and the steps that they have compiled.

    Attributes:
      data: see `data.types.Data`.
      batch_size: rows of a training batch, the default for evaluation.
      jit: what compiles.
    """

    task: Task
    model: nn.Module
    layout: Layout
    data: Any
    batch_size: int
    jit: Callable[..., Any] = jax.jit
    _steps: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)

    def jitted(self, name: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """One compiled function a name, shared by evaluators and splits; jit adds one a batch shape."""
        if name not in self._steps:
            self._steps[name] = self.jit(make())
        return self._steps[name]

    def rows(self, batch_size: int | None) -> int:
        """A batch size that divides over the mesh: the asked one rounded up, since padded rows weigh nothing."""
        if batch_size is not None and batch_size < 1:
            raise UserError(f"evals: batch_size={batch_size}: must be at least 1.")
        wanted, ways = batch_size or self.batch_size, self.layout.batch_ways
        return -(-wanted // ways) * ways


def needed(module: str, what: str) -> Any:
    """A module of the extra `metrics`.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{what} needs {package}: pip install 'tfm_jax[metrics]'.") from None


def batches_of(dataset: Any, most: int | None, *, following: bool = False) -> Sequence[int]:
    """Which batches of a pass an evaluator with `max_batches=most` reads.

    They are evenly spaced, for the first ones of a pass may be its shortest examples.

    Args:
      following: each must follow the one before, so they are the first ones.

    Raises:
      UserError: it is below 1.
    """
    if most is not None and most < 1:
        raise UserError(f"evals: max_batches={most}: must be at least 1, or None for the whole split.")
    every = dataset.num_batches
    count = min(every, most or every)
    return range(count) if following else [(2 * i + 1) * every // (2 * count) for i in range(count)]


def predictions(context: Context, state: Any, dataset: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Each batch of a pass, and what the task's `predict_fns[name]` makes of it, both whole and as numpy arrays."""
    step = context.jitted(f"predict {name}", lambda: _predict(context, name))
    params = context.task.eval_params(state.params, state.extra)
    with Prefetcher(lambda i: global_batch(dataset, i, context.layout.batch()), 0, dataset.num_batches) as batches:
        for _, batch in batches:
            yield whole(batch), whole(step(params, state.extra, state.mutables, batch))


def first_prediction(context: Context, state: Any, dataset: Any, name: str) -> Any:
    """Shapes of what `predictions` makes of a pass's first batch."""

    def predict(state: Any, batch: Any) -> Any:
        params = context.task.eval_params(state.params, state.extra)
        return _predict(context, name)(params, state.extra, state.mutables, batch)

    return jax.eval_shape(predict, state, dataset.batch_at(0))


def _predict(context: Context, name: str) -> Callable[..., Any]:
    def step(params: Any, extra: Any, mutables: Any, batch: Any) -> Any:
        return context.task.predict_fns[name](bind(context.model, mutables), params, extra, batch)

    return step

"""The task's own loss and metrics over a split, exactly: padded rows weigh nothing, sums are kept in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from tfm_jax.data.prefetch import Prefetcher
from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluator, batches_of
from tfm_jax.parallel.multihost import global_batch
from tfm_jax.tasks.base import bind


def make(
    context: Context, *, split: str = "validation", batch_size: int | None = None, max_batches: int | None = None
) -> Evaluator:
    """An evaluator of a training state.

    Args:
      split: of the data set.
      batch_size: rows at a time; the training batch if None.
      max_batches: read only this many, evenly spaced, or the first ones where the task remembers the batch before; the whole split
        if None.

    Returns:
      A function from a `TrainState` to `loss` (a mean over the task's units), each other metric of the task, and the
      number of units (`tokens`, `examples`). For a task of tokens also `perplexity`, and `bits_per_byte` where the data
      set knows its bytes and its tokens say all of the text, by the first 20,000 characters that are held out:
      loss / ln 2 times predicted tokens a byte of the whole split, so exact without `max_batches` and an estimate with it.
    """
    rows = context.rows(batch_size)
    dataset = context.data.evals(split, rows)
    places = batches_of(dataset, max_batches, following=context.task.carry is not None)
    step = context.jitted("loss", lambda: _step(context))
    begin = _begin(context, rows)
    facts, unit = context.data.facts.get(split, {}), context.task.unit

    def evaluate(state: Any) -> dict[str, float]:
        params = context.task.eval_params(state.params, state.extra)
        extra, sums = begin(state.extra), dict[str, list[float]]()
        read = lambda i: global_batch(dataset, places[i], context.layout.batch())  # noqa: E731
        with Prefetcher(read, 0, len(places)) as batches:
            pending: Any = None
            for _, batch in batches:
                # The previous batch's sums are read while this one computes.
                result, carried = step(params, extra, state.mutables, batch)
                extra = extra if carried is None else carried
                _add(sums, pending)
                pending = result
            _add(sums, pending)
        if sums["loss"][1] <= 0:
            raise UserError(f"evals: the split {split!r} has no {unit} to predict in {len(places)} of its batches.")
        out = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
        out[f"{unit}s"] = sums["loss"][1]
        if unit == "token":
            out["perplexity"] = math.exp(min(out["loss"], 700.0))
            if facts.get("bytes"):
                out["bits_per_byte"] = out["loss"] / math.log(2) * (facts["tokens"] - 1) / facts["bytes"]
        return out

    def gives(state: Any) -> set[str]:
        def first(state: Any, batch: Any) -> Any:
            params = context.task.eval_params(state.params, state.extra)
            return _step(context)(params, begin(state.extra), state.mutables, batch)[0]

        names = {*jax.eval_shape(first, state, dataset.batch_at(0)), f"{unit}s"}
        if unit == "token":
            names |= {"perplexity", *(("bits_per_byte",) if facts.get("bytes") else ())}
        return names

    return Evaluator(evaluate, gives)


def _step(context: Context) -> Callable[..., Any]:
    """`(params, extra, mutables, batch) -> {name: (sum, count)}`, without dropout, and the next batch's `extra` if the
    task carries it on."""
    carry = context.task.carry

    def step(params: Any, extra: Any, mutables: Any, batch: Any) -> tuple[dict[str, Any], Any]:
        out = context.task.loss(bind(context.model, mutables), params, extra, batch, None, False)
        return out.metrics, None if carry is None else carry.after(extra, out.aux)

    return step


def _begin(context: Context, rows: int) -> Callable[[Any], Any]:
    """What makes a training state's `extra` that of a pass's first batch."""
    carry = context.task.carry
    if carry is None:
        return lambda extra: extra

    def made(extra: Any) -> Any:
        return carry.begin(extra, rows)

    return lambda extra: jax.jit(made, out_shardings=context.layout.place(jax.eval_shape(made, extra)))(extra)


def _add(sums: dict[str, list[float]], metrics: Any) -> None:
    for name, (total, weight) in (jax.device_get(metrics) or {}).items():
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(weight)

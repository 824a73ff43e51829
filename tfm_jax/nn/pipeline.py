"""Layers on several stages, and a batch in microbatches that follow each other through them.

GPipe's schedule (Huang et al. 2019), as a loop of M + S - 1 turns (Xu et al. 2021, GSPMD, section 3.3): in each of them all stages
work, each on what the stage before it has made in the last turn. The stages are a dimension of every array, split over
`stage`, so that a shift along it is a permutation between neighbours, and the gradient runs the same schedule backwards.
A stage has neighbouring layers, which is how the parameters of scanned layers lie when their first axis is split: their
layout is that of a stack without stages.

B batch, M microbatches, b = B / M rows, L layers, S stages, l = L / S layers of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.nn.attention import Context
from tfm_jax.parallel.sharding import constrain, ways

# `(parameters, x, context, key) -> (x, said)` of one layer; `said` is any tree of arrays.
Layer = Callable[[Any, jax.Array, Context, jax.Array | None], tuple[jax.Array, Any]]


class Pipeline(NamedTuple):
    """S, and M, a multiple of it."""

    stages: int
    microbatches: int

    @property
    def bubble(self) -> float:
        """The part of the time in which a stage waits (Huang et al. 2019, section 2.3)."""
        return (self.stages - 1) / (self.microbatches + self.stages - 1)


def run(
    layer: Layer, params: Any, x: jax.Array, context: Context, key: jax.Array | None, pipeline: Pipeline
) -> tuple[jax.Array, Any]:
    """L layers, one after the other, on every row of x.

    Args:
      params: of all layers, each array (L, ...).
      x: (B, T, D). Where M does not divide a device's rows, in as many microbatches as do.
      context: its arrays are (B, ...), or (1, ...) for all rows.
      key: of randomness; each layer and microbatch has its own. None for none.

    Returns:
      (B, T, D), and what the layers said, each array (M, L, ...).
    """
    batch, stages = x.shape[0], pipeline.stages
    # Each device has its rows of every microbatch.
    parts = ways("batch")
    count = math.gcd(batch // parts if batch % parts == 0 else batch, pipeline.microbatches)
    turns, order = count + stages - 1, jnp.arange(stages)

    def staged(a: jax.Array) -> jax.Array:
        return constrain(a.reshape(stages, -1, *a.shape[1:]), ("stage",), rest=True)

    def entering(a: jax.Array) -> jax.Array:
        """(B, ...) to (M + S - 1, S, b, ...), a microbatch a turn. Only the first stage's are read."""
        a = split(a, count)
        a = jnp.concatenate([a, jnp.zeros((stages - 1, *a.shape[1:]), a.dtype)])[:, None]
        return constrain(jnp.broadcast_to(a, (turns, stages, *a.shape[2:])), (None, "stage", "batch"), rest=True)

    leaves, tree = jax.tree.flatten(context)
    # What belongs to rows goes with them from stage to stage.
    along = [a for a in leaves if a.shape[0] == batch]
    fixed = [a for a in leaves if a.shape[0] != batch]
    if wrong := [a.shape for a in fixed if a.shape[0] != 1]:
        raise ValueError(
            f"pipeline: an array of shape {wrong[0]} in the context of {batch} rows is neither theirs nor all's."
        )

    # What belongs to all rows is on every stage, and so is its gradient until the end.
    fixed = [constrain(jnp.broadcast_to(a[None], (stages, *a.shape)), ("stage",), rest=True) for a in fixed]

    def stage(own: Any, x: jax.Array, along: list[jax.Array], fixed: list[jax.Array], micro: jax.Array) -> Any:
        mine, alls = iter(along), iter(fixed)
        here = jax.tree.unflatten(tree, [next(mine if a.shape[0] == batch else alls) for a in leaves])

        def one(x: jax.Array, now: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
            p, number = now
            drawn = None if key is None else jax.random.fold_in(jax.random.fold_in(key, micro), number)
            return layer(p, x, here, drawn)

        return jax.lax.scan(one, x, own)

    every_stage = jax.vmap(stage, spmd_axis_name="stage")
    own = jax.tree.map(staged, (params, jnp.arange(jax.tree.leaves(params)[0].shape[0])))

    def turn(last: Any, now: Any) -> Any:
        number, new = now

        def taken(new: jax.Array, old: jax.Array) -> jax.Array:
            first = (order == 0).reshape(-1, *[1] * (new.ndim - 1))
            # A roll would also send what the last stage has made.
            shift = [(1, -1, 0), *[(0, 0, 0)] * (new.ndim - 1)]
            return jnp.where(first, new, jax.lax.pad(old, np.zeros((), old.dtype), shift))

        x, along = jax.tree.map(taken, new, last)
        # Before its first microbatch and behind its last one a stage works on what nobody reads.
        micro = jnp.clip(number - order, 0, count - 1)
        x, said = every_stage(own, x, along, fixed, micro)
        x = constrain(x, ("stage", "batch"), rest=True)
        return (x, along), (x, said)

    new = jax.tree.map(entering, (x, along))
    start = jax.tree.map(lambda a: constrain(jnp.zeros_like(a[0]), ("stage", "batch"), rest=True), new)
    _, (made, said) = jax.lax.scan(turn, start, (jnp.arange(turns), new))
    # A sum over the stages, of which all but the last have none: one reduction for all microbatches.
    last = (order == stages - 1).reshape(1, -1, *[1] * (made.ndim - 2))
    done = jnp.where(last, made[stages - 1 :], 0)
    # Not `jnp.sum`, which would send float32.
    out = constrain(jax.lax.reduce(done, np.zeros((), done.dtype), jax.lax.add, (1,)), ("stage", "batch"), rest=True)
    # Stage s has microbatch m in turn m + s.
    at = jnp.arange(count)[:, None] + order[None]
    said = jax.tree.map(lambda a: a[at, order[None]].reshape(count, -1, *a.shape[3:]), said)
    return constrain(joined(out), ("rows",), rest=True), said


def split(a: jax.Array, count: int) -> jax.Array:
    """(B, ...) to (M, b, ...), strided, so that a microbatch has rows of every device."""
    return a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1)


def joined(a: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])

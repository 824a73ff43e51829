"""One update as a pure function. jit, shardings and donation belong to the caller."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tfm_jax.errors import UserError
from tfm_jax.tasks.base import LossOut, Task, bind
from tfm_jax.train.state import TrainState

StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]]


def make_train_step(
    task: Task, model: nn.Module, tx: optax.GradientTransformation, *, accum: int = 1, seed: int = 0
) -> StepFn:
    """`(state, batch) -> (state, metrics)`; every metric is `(sum, count)`.

    The loss is summed over devices and microbatches and divided once, by the summed weight, so accumulation and
    sharding give the big batch's gradient also when the weights are ragged. Randomness is a function of
    (seed, step). A step whose loss or gradient is not finite changes nothing but the step count, and counts itself
    in `skipped`; nothing waits for the host. What a router adds to the loss is of each microbatch.

    Args:
      accum: microbatches per update; divides the batch's rows.
      seed: of dropout and whatever else the task draws.
    """
    if accum > 1 and not task.splittable:
        raise UserError(
            f"train.accum={accum}: this task's loss couples the rows of a batch; microbatches would change it. Use 1."
        )

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step + 1)

        def total(params: Any, mutables: Any, micro: Any, key: jax.Array) -> tuple[jax.Array, LossOut]:
            out = task.loss(bind(model, mutables), params, state.extra, micro, key, True)
            return out.total, out

        gradient = jax.grad(total, has_aux=True)
        if accum == 1:
            grads, out = gradient(state.params, state.mutables, batch, rng)
            mutables = out.aux.get("mutables", state.mutables)
        else:
            grads, out, mutables = _accumulate(gradient, state, _microbatches(batch, accum), rng)
        scale = 1.0 / jnp.maximum(out.weight, 1e-30)
        grads = jax.tree.map(lambda g: g * scale, grads)
        norm = optax.tree.norm(grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = task.update_extra(params, state.extra, {**out.aux, "gradient": grads})
        params = task.project(params, extra)
        good = jnp.isfinite(norm) & jnp.isfinite(out.total)
        new = (params, opt, extra, mutables)
        old = (state.params, state.opt, state.extra, state.mutables)
        kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        one = jnp.ones((), jnp.float32)
        metrics = {name: (jnp.where(good, s, 0.0), jnp.where(good, c, 0.0)) for name, (s, c) in out.metrics.items()}
        metrics["grad_norm"] = (jnp.where(good, norm, 0.0), good.astype(jnp.float32))
        metrics["skipped"] = (1.0 - good.astype(jnp.float32), one)
        metrics["weight"] = (out.weight, one)
        return TrainState(state.step + 1, *kept), metrics

    return step


class Programs:
    """A jitted step, compiled once for each shape of batch that comes.

    Args:
      compiling: a context in which compiling happens, for a clock that is not to count it as training.
    """

    def __init__(self, step: jax.stages.Wrapped, compiling: Callable[[], AbstractContextManager[None]]) -> None:
        self._step, self._compiling = step, compiling
        self._made: dict[Any, jax.stages.Compiled] = {}

    def get(self, state: TrainState, batch: Any) -> jax.stages.Compiled:
        leaves, tree = jax.tree.flatten(batch)
        key = tree, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._made:
            with self._compiling():
                self._made[key] = self._step.lower(state, batch).compile()
        return self._made[key]


def _microbatches(batch: Any, accum: int) -> Any:
    """(B, ...) to (accum, B/accum, ...), strided, so that a microbatch keeps rows of every device."""

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % accum:
            raise UserError(f"train.accum={accum} does not divide data.batch_size={x.shape[0]}.")
        return x.reshape(x.shape[0] // accum, accum, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _accumulate(gradient: Any, state: TrainState, batches: Any, rng: jax.Array) -> tuple[Any, LossOut, Any]:
    """Sums over the leading axis in float32; `aux` is the last microbatch's."""
    add = partial(jax.tree.map, jnp.add)

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        (grads, total, weight, metrics), mutables = carry
        index, micro = xs
        g, out = gradient(state.params, mutables, micro, jax.random.fold_in(rng, index))
        sums = add((grads, total, weight, metrics), (g, out.total, out.weight, out.metrics))
        return (sums, out.aux.get("mutables", mutables)), out.aux

    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(gradient, state.params, state.mutables, first, rng)
    g, out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    count = jax.tree.leaves(batches)[0].shape[0]
    start = ((g, out.total, out.weight, out.metrics), state.mutables)
    (sums, mutables), aux = jax.lax.scan(body, start, (jnp.arange(count), batches))
    last = jax.tree.map(lambda x: x[-1], aux)
    return sums[0], LossOut(sums[1], sums[2], sums[3], last), mutables

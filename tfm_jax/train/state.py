"""What a training run is at a step, as one plain pytree, and how it comes to be on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tfm_jax.tasks.base import Task
from tfm_jax.train.mup import Scales, initial


class TrainState(NamedTuple):
    """Attributes:
    step: () int32, updates attempted.
    params: the model's parameters, float32.
    opt: the optimizer's state.
    extra: what the task carries (averages, teachers, memory).
    mutables: the model's other collections (batch statistics); empty for most Transformers.
    """

    step: jax.Array
    params: Any
    opt: Any
    extra: Any
    mutables: Any


def initialiser(
    model: nn.Module, task: Task, tx: optax.GradientTransformation, inputs: Any, seed: int, scales: Scales | None = None
) -> Callable[[], TrainState]:
    """A function that makes the initial state; jit it with shardings, so that parameters are born split.

    Args:
      inputs: one batch's `inputs`, abstract or not; only shapes and dtypes matter.
      scales: see `train.mup`.
    """

    def init() -> TrainState:
        blank = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), inputs)
        # Key 0 of the seed makes the parameters; training steps fold in step + 1.
        key = jax.random.fold_in(jax.random.key(seed), 0)
        variables = dict(model.init(key, **blank, train=False))
        params = task.init_params(variables.pop("params"), jax.random.fold_in(key, 0))
        params = params if scales is None else initial(params, scales)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), task.init_extra(params), variables)

    return init

"""Low-rank adaptation (Hu et al. 2022), as a wrapper around any task and any model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.tasks.adapters import Arrays, adapted
from tfm_jax.tasks.base import Task


def wrap(
    task: Task,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    pattern: str = r"attention/(query|value)/kernel$",
    train: Sequence[str] = (),
) -> Task:
    """The task with kernels W + alpha / rank A B (section 4.1), of which only `a` (.., in, rank) and `b` (.., rank, out)
    are trained. B starts at zero.

    Args:
      rank: columns of A.
      alpha: weight of the product, over `rank`.
      pattern: regex of the paths of the kernels to adapt.
      train: regexes of the paths that are trained besides, as they are: a new head.

    Raises:
      UserError: a value out of its range; see also `adapters.adapted`.
    """
    if alpha <= 0:
        raise UserError(f"train.adapter.alpha={alpha}: must be above 0.")

    def make(key: jax.Array, x: jax.Array) -> Arrays:
        # As the reference implementation: uniform, with a variance of 1 / (3 in).
        bound = 1 / math.sqrt(x.shape[-2])
        drawn = jax.random.uniform(key, (*x.shape[:-1], rank), x.dtype, -bound, bound)
        return {"a": drawn, "b": jnp.zeros((*x.shape[:-2], rank, x.shape[-1]), x.dtype)}

    return adapted(
        task,
        pattern=pattern,
        train=train,
        rank=rank,
        make=make,
        change=lambda arrays: (alpha / rank) * (arrays["a"] @ arrays["b"]),
    )

"""Low-rank adaptation (Hu et al. 2022), as a wrapper around any task and any model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.paths import compile_patterns, flatten, map_with_path
from tfm_jax.tasks.base import Params, Task

KEY = "lora"


def with_lora(
    task: Task,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    pattern: str = r"attention/(query|value)/kernel$",
    train: Sequence[str] = (),
) -> Task:
    """The task with kernels W + alpha / rank A B (section 4.1), of which only A and B are trained.

    The parameters get one more branch, `lora`, with `a` (.., in, rank) and `b` (.., rank, out) below each adapted path; all
    other paths stay as they are, so that `init_from` and sharding rules work as without it. B starts at zero. Evaluation,
    generation and export see the sums, so the model never knows.

    Args:
      rank: columns of A.
      alpha: weight of the product, over `rank`.
      pattern: regex of the paths of the kernels to adapt.
      train: regexes of the paths that are trained besides, as they are: a new head.

    Raises:
      UserError: a value out of its range; at the model's making, a pattern that matches nothing, or not a kernel.
    """
    if rank < 1:
        raise UserError(f"train.lora.rank={rank}: must be at least 1.")
    if alpha <= 0:
        raise UserError(f"train.lora.alpha={alpha}: must be above 0.")
    (chosen,) = compile_patterns([pattern], setting="train.lora.pattern")
    trained = compile_patterns(list(train), setting="train.lora.train")
    scale = alpha / rank

    def init_params(params: Params, key: jax.Array) -> Params:
        leaves = flatten(params)
        adapted = {path: x for path, x in leaves.items() if chosen.search(path)}
        if not adapted:
            raise UserError(f"train.lora.pattern={pattern!r} matches no parameter. There are: {_some(leaves)}.")
        for path, x in adapted.items():
            if not path.endswith("/kernel"):
                raise UserError(f"train.lora.pattern={pattern!r} matches {path}, which is no kernel.")
            if rank > min(x.shape[-2:]):
                raise UserError(f"train.lora.rank={rank}: {path} is only {x.shape[-2]} x {x.shape[-1]}.")
        for regex in trained:
            if not any(regex.search(path) for path in leaves):
                raise UserError(
                    f"train.lora.train: {regex.pattern!r} matches no parameter. There are: {_some(leaves)}."
                )
        branch: dict[str, Any] = {}
        for number, (path, x) in enumerate(adapted.items()):
            *above, last = path.split("/")
            place = branch
            for name in above:
                place = place.setdefault(name, {})
            # As the reference implementation: uniform, with a variance of 1 / (3 in).
            bound = 1 / math.sqrt(x.shape[-2])
            shape = (*x.shape[:-1], rank)
            drawn = jax.random.uniform(jax.random.fold_in(key, number), shape, x.dtype, -bound, bound)
            place[last] = {"a": drawn, "b": jnp.zeros((*x.shape[:-2], rank, x.shape[-1]), x.dtype)}
        return {**params, KEY: branch}

    def merged(params: Params) -> Params:
        branch = flatten(params[KEY])

        def leaf(path: str, x: jax.Array) -> jax.Array:
            if any(regex.search(path) for regex in trained):
                return x
            x = jax.lax.stop_gradient(x)
            a, b = branch.get(f"{path}/a"), branch.get(f"{path}/b")
            return x if a is None or b is None else x + (scale * (a @ b)).astype(x.dtype)

        return map_with_path(leaf, {name: x for name, x in params.items() if name != KEY})

    def loss(apply: Any, params: Any, extra: Any, batch: Any, rng: Any, train: bool) -> Any:
        # Evaluation has merged them already.
        return task.loss(apply, merged(params) if KEY in params else params, extra, batch, rng, train)

    others = "".join(f"(?!.*(?:{regex.pattern}))" for regex in trained)
    return dataclasses.replace(
        task,
        loss=loss,
        init_params=lambda params, key: init_params(task.init_params(params, key), key),
        eval_params=lambda params, extra: merged(task.eval_params(params, extra)),
        frozen=(*task.frozen, rf"^(?!{KEY}/){others}"),
    )


def _some(paths: Sequence[str] | dict[str, Any]) -> str:
    """A few paths, one for each kind of layer."""
    kinds = {re.sub(r"\d+", "0", path): path for path in paths}
    return ", ".join(list(kinds.values())[:12])

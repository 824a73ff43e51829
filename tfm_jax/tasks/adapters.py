"""A few trained numbers beside each frozen kernel, as a wrapper around any task and any model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tfm_jax.errors import UserError
from tfm_jax.paths import compile_patterns, flatten, map_with_path, nearest_path
from tfm_jax.tasks.base import Params, Task

KEY = "adapter"

Arrays = dict[str, jax.Array]


def adapted(
    task: Task,
    *,
    pattern: str,
    train: Sequence[str],
    rank: int,
    make: Callable[[jax.Array, jax.Array], Arrays],
    change: Callable[[Arrays], jax.Array],
) -> Task:
    """The task with each chosen kernel W replaced by W + change(arrays), of which only the arrays are trained.

    The parameters get one more branch, `adapter`, with the arrays below each adapted path; all other paths stay as they are,
    so that `init_from` and sharding rules work as without it. Evaluation, generation and export see the sums, so the model
    never knows.

    Args:
      pattern: regex of the paths of the kernels to adapt.
      train: regexes of the paths that are trained besides, as they are and so without an adapter: a new head.
      rank: what a kernel must have room for.
      make: from a key and a kernel (.., in, out), its arrays, such that `change` is zero.
      change: (.., in, out) from a kernel's arrays.

    Raises:
      UserError: one of `train` that cannot stand inside another regex; at the model's making, a pattern that matches nothing, or
        not a kernel, or one that is too small.
    """
    if rank < 1:
        raise UserError(f"train.adapter.rank={rank}: must be at least 1.")
    (chosen,) = compile_patterns([pattern], setting="train.adapter.pattern")
    named = compile_patterns(list(train), setting="train.adapter.train")
    trained, others = [*named, *(re.compile(pattern) for pattern in task.own)], ""
    for regex in trained:
        others += f"(?!.*(?:{regex.pattern}))"
        try:
            re.compile(others)
        except re.error as error:
            whose = "train.adapter.train" if regex in named else "a pattern of the task's own"
            raise UserError(
                f"{whose}: {regex.pattern!r} cannot stand inside a regular expression: {error.msg}. Flags are for a"
                " part of one there, (?i:head)."
            ) from None

    def init_params(params: Params, key: jax.Array) -> Params:
        leaves = flatten(params)
        kernels = {
            path: x
            for path, x in leaves.items()
            if chosen.search(path) and not any(regex.search(path) for regex in trained)
        }
        if not kernels:
            if any(map(chosen.search, leaves)):
                raise UserError(
                    f"train.adapter.pattern={pattern!r} matches only parameters that are trained as they are"
                    " (train.adapter.train)."
                )
            names = [path for path in leaves if path.endswith("/kernel")]
            raise UserError(f"train.adapter.pattern={pattern!r} matches no parameter.{nearest_path(pattern, names)}")
        for path, x in kernels.items():
            if not path.endswith("/kernel"):
                raise UserError(f"train.adapter.pattern={pattern!r} matches {path}, which is no kernel.")
            if rank > min(x.shape[-2:]):
                room = f"{path} is only {x.shape[-2]} x {x.shape[-1]}"
                raise UserError(f"train.adapter: {room}, too small for a rank of {rank}.")
        for regex in named:
            if not any(regex.search(path) for path in leaves):
                raise UserError(
                    f"train.adapter.train: {regex.pattern!r} matches no parameter.{nearest_path(regex.pattern, leaves)}"
                )
        branch: dict[str, Any] = {}
        for number, (path, x) in enumerate(kernels.items()):
            *above, last = path.split("/")
            place = branch
            for name in above:
                place = place.setdefault(name, {})
            place[last] = make(jax.random.fold_in(key, number), x)
        return {**params, KEY: branch}

    def merged(params: Params) -> Params:
        branch = by_kernel(params[KEY])

        def leaf(path: str, x: jax.Array) -> jax.Array:
            if any(regex.search(path) for regex in trained):
                return x
            x = jax.lax.stop_gradient(x)
            return x + change(branch[path]).astype(x.dtype) if path in branch else x

        return map_with_path(leaf, {name: x for name, x in params.items() if name != KEY})

    def loss(apply: Any, params: Any, extra: Any, batch: Any, rng: Any, train: bool) -> Any:
        # Evaluation has merged them already.
        return task.loss(apply, merged(params) if KEY in params else params, extra, batch, rng, train)

    return dataclasses.replace(
        task,
        loss=loss,
        init_params=lambda params, key: init_params(task.init_params(params, key), key),
        eval_params=lambda params, extra: merged(task.eval_params(params, extra)),
        frozen=(*task.frozen, rf"^(?!{KEY}/){others}"),
    )


def by_kernel(branch: Any) -> dict[str, Arrays]:
    """The arrays of each kernel, by its path."""
    found: dict[str, Arrays] = {}
    for path, x in flatten(branch).items():
        kernel, _, name = path.rpartition("/")
        found.setdefault(kernel, {})[name] = x
    return found

"""Adaptive low-rank adaptation (Zhang et al. 2023): adapters as singular triplets, of which only the important are kept.

L leading axes of a scanned kernel, r triplets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.paths import flatten, map_with_path
from tfm_jax.tasks.adapters import KEY, Arrays, adapted, by_kernel
from tfm_jax.tasks.base import Extra, LossOut, Params, Task, extended

STATE = "adalora"


def wrap(
    task: Task,
    *,
    steps: int,
    rank: int = 8,
    initial_rank: int | None = None,
    alpha: float = 16.0,
    pattern: str = r"attention/(query|value)/kernel$",
    train: Sequence[str] = (),
    orthogonality: float = 0.1,
    start: float = 0.1,
    settled: float = 0.3,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Task:
    """The task with kernels W + alpha / rank P diag(s) Q (equation 3), of which `p` (.., in, r), `s` (.., r) and `q`
    (.., r, out) are trained. s starts at zero, P and Q orthogonal, where the penalty is zero; the paper's are small and random.

    The loss gets orthogonality times the mean of |P'P - 1|^2 and |QQ' - 1|^2 over all kernels. Equation 4 has their sum; a mean,
    which the authors' code takes, of norms that are not squared, weighs the same for any number of kernels.

    Every `every` steps the triplets of all kernels are ranked by their importance (equations 7 to 11) and those beyond the budget
    lose their s, which may grow again until the last stage. The budget falls from `initial_rank` to `rank` a kernel (equation 12).

    Args:
      steps: of the whole run (not a config key).
      rank: triplets a kernel at the end, on average.
      initial_rank: triplets a kernel at first; half more than `rank` if None.
      alpha: weight of the product, over `rank`.
      pattern, train: see `adapters.adapted`.
      orthogonality: weight of the penalty.
      start: share of the steps before the budget begins to fall.
      settled: share of the steps at the end in which the triplets stay chosen.
      every: steps between choices.
      beta1, beta2: decay of the averages of sensitivity and of its uncertainty.

    Raises:
      UserError: a value out of its range; see also `adapters.adapted`.
    """
    most = math.ceil(1.5 * rank) if initial_rank is None else initial_rank
    if alpha <= 0:
        raise UserError(f"train.adapter.alpha={alpha}: must be above 0.")
    if orthogonality < 0:
        raise UserError(f"train.adapter.orthogonality={orthogonality}: must be at least 0.")
    if rank < 1:
        raise UserError(f"train.adapter.rank={rank}: must be at least 1.")
    if most < rank:
        raise UserError(f"train.adapter.initial_rank={initial_rank}: must be at least train.adapter.rank={rank}.")
    if start < 0 or settled < 0 or start + settled >= 1:
        raise UserError(
            f"train.adapter: start={start} and settled={settled} are shares of the steps, below 1 together."
        )
    if every < 1:
        raise UserError(f"train.adapter.every={every}: must be at least 1.")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise UserError(f"train.adapter.{name}={beta}: must lie in [0, 1).")
    first, last = round(start * steps), steps - round(settled * steps)

    def make(key: jax.Array, x: jax.Array) -> Arrays:
        left, right = jax.random.split(key)
        lead = x.shape[:-2]
        return {
            "p": _orthogonal(left, lead, x.shape[-2], most, x.dtype),
            "s": jnp.zeros((*lead, most), x.dtype),
            "q": jnp.swapaxes(_orthogonal(right, lead, x.shape[-1], most, x.dtype), -1, -2),
        }

    def change(arrays: Arrays) -> jax.Array:
        return (alpha / rank) * ((arrays["p"] * arrays["s"][..., None, :]) @ arrays["q"])

    plain = adapted(task, pattern=pattern, train=train, rank=most, make=make, change=change)

    def init(params: Params) -> Extra:
        branch = params[KEY]
        return {
            "step": jnp.zeros((), jnp.int32),
            "importance": jax.tree.map(jnp.zeros_like, branch),
            "uncertainty": jax.tree.map(jnp.zeros_like, branch),
            "kept": _only_s(jax.tree.map(lambda x: jnp.ones(x.shape, bool), branch)),
        }

    def update(params: Params, state: Extra, aux: Mapping[str, Any]) -> Extra:
        step = state["step"] + 1
        found = jax.tree.map(lambda w, g: jnp.abs(w * g), params[KEY], aux["gradient"][KEY])
        importance = jax.tree.map(lambda a, x: beta1 * a + (1 - beta1) * x, state["importance"], found)
        uncertainty = jax.tree.map(
            lambda u, x, a: beta2 * u + (1 - beta2) * jnp.abs(x - a), state["uncertainty"], found, importance
        )
        scores = {path: score(x) for path, x in by_kernel(jax.tree.map(jnp.multiply, importance, uncertainty)).items()}
        chosen = important(scores, budget(step))
        alive, kernels = _counts(state["kept"])
        # One more, where what is resumed was chosen for a longer run.
        choosing = _due(step) & ((step <= last) | (alive > rank * kernels))
        kept = map_with_path(lambda path, x: jnp.where(choosing, chosen[path.removesuffix("/s")], x), state["kept"])
        return {"step": step, "importance": importance, "uncertainty": uncertainty, "kept": kept}

    def _due(step: jax.Array) -> jax.Array:
        return (step >= first) & ((step % every == 0) | (step >= last))

    def budget(step: jax.Array) -> jax.Array:
        """Triplets a kernel, equation 12."""
        left = 1 - jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
        return rank + (most - rank) * left**3

    def project(params: Params, extra: Extra) -> Params:
        state = extra[STATE]
        due, kept = _due(state["step"]), flatten(state["kept"])

        def leaf(path: str, x: jax.Array) -> jax.Array:
            return jnp.where(due & ~kept[path], 0.0, x) if path in kept else x

        inner = task.project({name: x for name, x in params.items() if name != KEY}, extra["inner"])
        return {**inner, KEY: map_with_path(leaf, params[KEY])}

    wider = extended(plain, STATE, init=init, update=update)

    def loss(apply: Any, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        out = wider.loss(apply, params, extra, batch, rng, train)
        if not train:
            return out
        alive, kernels = _counts(extra[STATE]["kept"])
        penalty = sum(_off(x) for x in by_kernel(params[KEY]).values()) / (2 * kernels)
        metrics = out.metrics | {
            "orthogonality": (penalty, jnp.ones((), jnp.float32)),
            "rank": (alive, kernels),
        }
        return out._replace(total=out.total + orthogonality * penalty * out.weight, metrics=metrics)

    return dataclasses.replace(wider, loss=loss, project=project)


def _counts(kept: Any) -> tuple[jax.Array, jax.Array]:
    """How many triplets of arrays (.., r) are kept, and of how many kernels they are, () float32."""
    leaves = jax.tree.leaves(kept)
    kernels = jnp.asarray(sum(math.prod(x.shape[:-1]) for x in leaves), jnp.float32)
    return sum((jnp.sum(x) for x in leaves), jnp.zeros((), jnp.float32)), kernels


def _orthogonal(key: jax.Array, lead: tuple[int, ...], size: int, count: int, dtype: Any) -> jax.Array:
    """(*lead, size, count), the columns of length 1 and orthogonal as far as there is room for them."""
    made = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, math.prod(lead))
    return jax.vmap(lambda key: made(key, (size, count), dtype))(keys).reshape(*lead, size, count)


def _only_s(branch: Any) -> Any:
    """The branch without what is beside `s`."""
    if "s" in branch and not isinstance(branch["s"], Mapping):
        return {"s": branch["s"]}
    return {name: _only_s(below) for name, below in branch.items()}


def score(sensitivity: Arrays) -> jax.Array:
    """(.., r) importance of a kernel's triplets, equation 7."""
    return sensitivity["s"] + jnp.mean(sensitivity["p"], axis=-2) + jnp.mean(sensitivity["q"], axis=-1)


def important(scores: Mapping[str, jax.Array], budget: jax.Array) -> dict[str, jax.Array]:
    """Which triplets are among the best of all kernels, `budget` a kernel on average."""
    ranked = jnp.sort(jnp.concatenate([x.reshape(-1) for x in scores.values()]))[::-1]
    kernels = sum(math.prod(x.shape[:-1]) for x in scores.values())
    worst = ranked[jnp.clip(jnp.round(budget * kernels).astype(jnp.int32), 1, ranked.size) - 1]
    return {path: x >= worst for path, x in scores.items()}


def _off(arrays: Arrays) -> jax.Array:
    """How far P and Q are from orthogonal, summed over leading axes: R of equation 4."""
    p, q = arrays["p"], arrays["q"]
    one = jnp.broadcast_to(jnp.eye(p.shape[-1]), (*p.shape[:-2], p.shape[-1], p.shape[-1]))
    left, right = jnp.swapaxes(p, -1, -2) @ p - one, q @ jnp.swapaxes(q, -1, -2) - one
    return jnp.sum(left**2) + jnp.sum(right**2)

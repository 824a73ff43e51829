"""What the backward pass keeps of a block, and what it computes again (Chen et al. 2016, section 3).

The output of a product is named as its kernel is, `attention/query`, `mlp/up`; `attention/mixed` is what attention gives
before its projection `out`, and `attention/residual` and `mlp/residual` the stream after each sublayer.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
from jax.ad_checkpoint import Offloadable, Recompute, Saveable, checkpoint_name
from jax.extend.core import jaxprs_in_params

from tfm_jax.errors import UserError, nearest
from tfm_jax.paths import compile_patterns

Remat = Literal["none", "full", "dots", "dots_batched"] | tuple[Any, ...]
POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_batched": jax.checkpoint_policies.dots_saveable,
}
_ACTIONS = {"save": Saveable, "offload": Offloadable(src="device", dst="pinned_host")}


def named(module: Any, x: jax.Array, name: str) -> jax.Array:
    """An activation with a name that policies know it by, that of the module in front."""
    return checkpoint_name(x, f"{module.name}/{name}")


def policy(remat: Remat) -> Any:
    """For `jax.checkpoint`: by a name of `POLICIES`, or by rules.

    Args:
      remat: `(regex, "save" | "offload")` pairs over names of activations, the first that matches; `offload` keeps them in the
        host's memory. What matches none is computed again.

    Raises:
      UserError: a rule that is none.
    """
    if isinstance(remat, str):
        return POLICIES[remat]
    return _by_name(tuple(_pair(rule) for rule in remat))


def _pair(rule: Any) -> tuple[str, str]:
    if isinstance(rule, str) or len(rule) != 2 or not all(isinstance(part, str) for part in rule):
        raise UserError(f"model.remat: {rule!r} is not a pair (regex, 'save' or 'offload').")
    if rule[1] not in _ACTIONS:
        raise UserError(f"model.remat: {rule[1]!r} of {tuple(rule)} does not exist.{nearest(rule[1], _ACTIONS)}")
    return rule[0], rule[1]


@functools.cache
def _by_name(rules: tuple[tuple[str, str], ...]) -> Any:
    patterns = compile_patterns([pattern for pattern, _ in rules], setting="model.remat")

    def decide(primitive: Any, *operands: Any, **params: Any) -> Any:
        if primitive.name == "name":
            for pattern, (_, action) in zip(patterns, rules, strict=True):
                if pattern.search(params["name"]):
                    return _ACTIONS[action]
        return Recompute

    return decide


def check(remat: Remat, traced: Any) -> None:
    """Refuse rules that match no activation's name.

    Args:
      traced: a jaxpr of the model, in which the names stand.

    Raises:
      UserError: naming the first such rule, and all names.
    """
    if isinstance(remat, str):
        return
    names = sorted(_names(traced.jaxpr, inside=False))
    for pattern in compile_patterns([_pair(rule)[0] for rule in remat], setting="model.remat"):
        if not any(pattern.search(name) for name in names):
            raise UserError(
                f"model.remat: the pattern {pattern.pattern!r} matches no activation. Names here: {', '.join(names)}."
            )


def offloads(remat: Remat) -> bool:
    """Whether activations go to the host's memory."""
    return not isinstance(remat, str) and any(_pair(rule)[1] == "offload" for rule in remat)


def _names(jaxpr: Any, inside: bool) -> set[str]:
    """Of activations in what is computed again."""
    found = set[str]()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and inside:
            found.add(equation.params["name"])
        for inner in jaxprs_in_params(equation.params):
            found |= _names(inner, inside or "prevent_cse" in equation.params)
    return found

"""Products of chosen kernels in 8 bits while training, by `qwix`: parameters, their names and their dtypes stay as they are.

Both operands are scaled by the largest magnitude along what is summed and rounded to the nearest code. `int8` does that with the
product of the forward pass; its gradients' products have the operands as they were, in the compute dtype. `fp8` does all three:
e4m3 forward, e5m2 for the gradients that come back (Micikevicius et al. 2022, section 3).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError, nearest
from tfm_jax.paths import flatten, values_by_pattern

_KINDS: dict[str, dict[str, Any]] = {
    "int8": dict(weight_qtype=jnp.int8, act_qtype=jnp.int8),
    "fp8": dict(weight_qtype=jnp.float8_e4m3fn, act_qtype=jnp.float8_e4m3fn, bwd_qtype=jnp.float8_e5m2),
}


def check(rules: Sequence[Any]) -> None:
    """Refuse rules that are none, and `qwix` not being there.

    Raises:
      UserError: which it is.
    """
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2 or not all(isinstance(part, str) for part in rule):
            raise UserError(f"train.quantize: {rule!r} is not a pair (regex, {' or '.join(map(repr, _KINDS))}).")
        if rule[1] not in _KINDS:
            raise UserError(f"train.quantize: {rule[1]!r} of {tuple(rule)} does not exist.{nearest(rule[1], _KINDS)}")
    if rules and importlib.util.find_spec("qwix") is None:
        raise UserError("train.quantize needs Qwix: pip install 'tfm_jax[quantize]'.")


def quantized(model: nn.Module, rules: Sequence[Any], variables: Any, inputs: Any) -> nn.Module:
    """The model, with the products of the kernels that rules name in 8 bits.

    Args:
      rules: `(regex on a kernel's path, "int8" | "fp8")`, the first that matches; other products stay as they are.
      variables: the model's, abstract.
      inputs: of the model, abstract or not, to see that each rule finds its product.

    Raises:
      UserError: a rule that matches no kernel, or kernels that are not used in a plain product.
    """
    from qwix import QtProvider, QtRule, quantize_model

    kernels = {path: x for path, x in flatten(variables["params"]).items() if path.endswith("/kernel")}
    chosen = values_by_pattern(kernels, [(p, kind) for p, kind in rules], None, setting="train.quantize")
    # Only plain products: attention's, of activations with each other, run in modules around these.
    exact = [
        QtRule(module_path=re.escape(path.removesuffix("/kernel")), op_names=("dot_general",), **_KINDS[kind])
        for path, kind in flatten(chosen).items()
    ]
    provider = QtProvider(exact)
    made: nn.Module = quantize_model(model, provider)
    jax.eval_shape(lambda v: made.apply(v, **inputs, train=False), variables)
    if unused := [rule.module_path for rule in provider.get_unused_rules()]:
        first = re.sub(r"\\(.)", r"\1", unused[0])
        raise UserError(f"train.quantize: {first}/kernel is not used in a plain product. Name others.")
    return made

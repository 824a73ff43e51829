"""BlockSpec: what it derives, and what it refuses."""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from tfm_jax.errors import UserError
from tfm_jax.nn.spec import BlockSpec


def test_derived_sizes():
    spec = BlockSpec(width=96, heads=6)
    assert (spec.groups, spec.key_size, spec.hidden) == (6, 16, 384)
    spec = BlockSpec(width=96, heads=6, kv_heads=2, head_dim=10, mlp_width=100, dtype="bfloat16")
    assert (spec.groups, spec.key_size, spec.hidden) == (2, 10, 100)
    assert spec.compute_dtype == jnp.bfloat16


def test_head_dim_frees_width_from_heads():
    assert BlockSpec(width=100, heads=7, head_dim=16).key_size == 16


def test_a_spec_is_frozen_and_hashable():
    spec = BlockSpec()
    assert hash(spec) == hash(BlockSpec()) and spec == BlockSpec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.width = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(width=0), "model.width=0: must be at least 1."),
        (dict(heads=-1), "model.heads=-1: must be at least 1."),
        (dict(kv_heads=0), "model.kv_heads=0: must be at least 1."),
        (dict(head_dim=0), "model.head_dim=0: must be at least 1."),
        (dict(mlp_width=0), "model.mlp_width=0: must be at least 1."),
        (
            dict(width=256, heads=6),
            "model.heads=6 does not divide model.width=256. Nearest that do: 4, 8; or set model.head_dim.",
        ),
        (dict(heads=8, kv_heads=3), "model.kv_heads=3 does not divide model.heads=8. Nearest that do: 2, 4."),
        (
            dict(gradient_dtype="bfloat16"),
            "model.gradient_dtype='bfloat16': products in model.dtype='float32' give gradients in it or in float32.",
        ),
        (
            dict(dtype="bfloat16", matmul_dtype="float32"),
            "model.matmul_dtype='float32': operands of products are in model.dtype='bfloat16', or those of float32 in bfloat16.",
        ),
        (
            dict(matmul_dtype="bfloat16", experts=2, bias="none"),
            "model.matmul_dtype='bfloat16': products of experts are in model.dtype='float32'.",
        ),
        (
            dict(dtype="bfloat16", gradient_dtype="float32", experts=2, bias="none"),
            "model.gradient_dtype='float32': the gradients of experts are added up in model.dtype='bfloat16'.",
        ),
        (dict(dropout=1.0), "model.dropout=1.0: a probability in [0, 1)."),
        (dict(attention_dropout=-0.1), "model.attention_dropout=-0.1: a probability in [0, 1)."),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        BlockSpec(**fields)

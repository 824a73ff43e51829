"""What settings of blocks mean in every family."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.jaxprs import equations
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

FAMILIES = (
    "gpt", "bert", "albert", "electra", "encdec", "bart", "t5", "transformer_xl", "longformer", "vit", "deit"
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_products_with_the_stacks_kernels_take_bfloat16(name):
    asked = {"name": name, "width": 16, "heads": 4, "matmul_dtype": "bfloat16", "vocab_size": 50, "classes": 3}
    asked |= {"layers": 2, "encoder_layers": 2, "decoder_layers": 2}
    defaults = {key: field.default for key, field in section_fields("model", {"name": name}).items()}
    model = build_model(defaults | {key: value for key, value in asked.items() if key in defaults or key == "name"})
    inputs = model.example()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    traced = equations(jax.make_jaxpr(lambda p: model.apply({"params": p}, **inputs))(params).jaxpr)
    products = [e for e in traced if e.primitive.name == "dot_general"]
    types = [tuple(str(v.aval.dtype) for v in (*product.invars, *product.outvars)) for product in products]
    narrow = [one for one in types if "bfloat16" in one]
    assert set(narrow) == {("bfloat16", "bfloat16", "float32")}
    kernels = [path for path in flatten(params) if re.search(r"block(_\d+)?/.*kernel$", path)]
    logits = int("unembedding" in jax.eval_shape(lambda p: model.apply({"params": p}, **inputs), params))
    assert len(narrow) >= len(kernels) + logits > 4

"""ALBERT: published sizes, one block for all layers, the narrow token table, sharding rules, what its table refuses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.convert import huggingface
from tfm_jax.errors import UserError
from tfm_jax.models.albert import RULES, SPEC, VARIANTS, Model
from tfm_jax.nn.attention import Context
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.stack import Stack
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

V, T, E, D = 61, 10, 6, 16
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, V)
BLOCK = dataclasses.replace(SPEC, width=D, heads=4)
TINY = Model(BLOCK, vocab_size=V, max_len=T, embedding_width=E, layers=3)


@functools.cache
def params_of(model: Model):
    return jax.jit(lambda key: model.init(key, TOKENS)["params"])(jax.random.key(1))


def variant(name: str, **fields) -> Model:
    """As a config of that variant, and these fields, would have it."""
    defaults = section_fields("model", dict(name="albert", variant=name))
    return build_model({key: field.default for key, field in defaults.items()} | {"name": "albert"} | fields)


def shapes(model: Model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]


@pytest.mark.parametrize(
    ("name", "encoder", "pretraining"),
    [
        ("albert-base-v2", 11_683_584, 11_813_810),
        ("albert-large-v2", 17_683_968, 17_847_474),
        ("albert-xlarge-v2", 58_724_864, 59_021_490),
        ("albert-xxlarge-v2", 222_595_584, 223_158_450),
    ],
)
def test_published_parameter_counts(name, encoder, pretraining):
    for outputs, count in ((("pooled",), encoder), (("tokens", "pair"), pretraining)):
        assert sum(x.size for x in jax.tree.leaves(shapes(variant(name, outputs=outputs)))) == count


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_every_parameter_has_a_rule(layer_loop):
    for path in flatten(shapes(variant("albert-base-v2", layer_loop=layer_loop))):
        assert any(re.search(pattern, path) for pattern, _ in RULES), path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant(name, vocab_size=V)
    assert model.layers == VARIANTS[name]["layers"] and model.block.width == VARIANTS[name]["width"]


@pytest.mark.parametrize("change", [dict(layers=7), dict(layer_loop="scan"), dict(layer_loop="scan", remat="full")])
def test_depth_and_loop_do_not_change_the_parameters(change):
    want = {path: x.shape for path, x in flatten(params_of(TINY)).items()}
    assert {path: x.shape for path, x in flatten(shapes(TINY.clone(**change))).items()} == want


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_a_shared_block_is_equal_blocks(layer_loop):
    x = jax.random.normal(jax.random.key(2), (2, T, D))
    one = params_of(TINY)["stack"]
    equal = {f"block_{i}": one["shared_block"] for i in range(3)}

    def value_and_gradient(stack, params):
        def total(params):
            out, _ = stack.apply({"params": params}, x, Context(Mask()), train=False)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
        return out, gradient

    want, parts = value_and_gradient(Stack(BLOCK, 3), equal)
    got, whole = value_and_gradient(Stack(BLOCK, 3, layer_loop, sharing="all"), one)
    np.testing.assert_allclose(got, want, atol=1e-5)
    summed = jax.tree.map(lambda *g: sum(g), *parts.values())
    for path, g in flatten(whole["shared_block"]).items():
        np.testing.assert_allclose(g, flatten(summed)[path], atol=1e-4, err_msg=path)


def test_tables_are_narrow():
    params = params_of(TINY)
    tables = {path: x.shape for path, x in flatten(params["embeddings"]).items() if path.endswith("/embedding")}
    assert tables == {
        "token_embedding/embedding": (V, E), "position_embedding/embedding": (T, E), "type_embedding/embedding": (2, E)
    }  # fmt: skip
    assert params["embeddings"]["embedding_projection"]["kernel"].shape == (E, D)
    assert params["token_head"]["transform"]["kernel"].shape == (D, E)


def test_outputs():
    out = jax.jit(TINY.apply)({"params": params_of(TINY)}, TOKENS)
    assert {name: x.shape for name, x in out.items()} == {
        "states": (2, T, D), "hidden": (2, T, E + 1), "unembedding": (V, E + 1), "logits": (2, T, V),
        "pooled": (2, D), "pair_logits": (2, 2),
    }  # fmt: skip
    np.testing.assert_allclose(out["logits"], np.einsum("bte,ve->btv", out["hidden"], out["unembedding"]), atol=1e-5)
    np.testing.assert_array_equal(
        out["unembedding"][:, :E], params_of(TINY)["embeddings"]["token_embedding"]["embedding"]
    )


def test_padding_is_not_seen():
    variables = {"params": params_of(TINY)}
    apply = jax.jit(lambda tokens, valid: TINY.apply(variables, tokens, valid=valid)["logits"])
    valid = jnp.arange(T)[None] < jnp.array([[T], [6]])
    before, after = apply(TOKENS, valid), apply(TOKENS.at[1, 6:].add(1) % V, valid)
    np.testing.assert_array_equal(before[1, :6], after[1, :6])
    assert not np.allclose(before[1, :6], apply(TOKENS, jnp.ones((2, T), bool))[1, :6], atol=1e-4)


@pytest.mark.parametrize("field", ["vocab_size", "max_len", "embedding_width", "layers"])
def test_sizes_are_positive(field):
    with pytest.raises(UserError) as error:
        Model(**{field: 0})
    assert str(error.value) == f"model.{field}=0: must be at least 1."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_hidden_groups=2), "num_hidden_groups=2 is not supported; what is: 1"),
        (dict(inner_group_num=3), "inner_group_num=3 is not supported; what is: 1"),
        (dict(embedding_size=64), "embedding_size=64 is not supported; what is: any but hidden_size"),
        (dict(hidden_act="mish"), "hidden_act='mish' is not supported; what is: 'gelu', "),
        (dict(attention_kind="odd"), "attention_kind='odd' is not known"),
    ],
)
def test_what_the_table_refuses(fields, message):
    config = {"architectures": ["AlbertForMaskedLM"], "hidden_size": 64, **fields}
    with pytest.raises(UserError) as error:
        huggingface.read_section(huggingface.find(config), config, where="config.json")
    assert message in str(error.value)

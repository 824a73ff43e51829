"""ELECTRA: published sizes, what its halves share, and that each is the pretraining model's part."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.convert import huggingface
from tfm_jax.errors import UserError
from tfm_jax.models.electra import RULES, SPEC, VARIANTS, Discriminator, Generator, Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

V, T, E, D = 61, 10, 6, 16
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, V)
BLOCK = dataclasses.replace(SPEC, width=D, heads=4)
SIZES = dict(vocab_size=V, max_len=T, embedding_width=E, layers=2)
BOTH = Model(BLOCK, **SIZES, generator_heads=2)
PARTS = {"generator": Generator(BOTH.generator_block, **SIZES), "discriminator": Discriminator(BLOCK, **SIZES)}


@functools.cache
def params():
    made = jax.jit(lambda: BOTH.init(jax.random.key(1), **BOTH.example())["params"])()
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), made)


def variant(name: str, model: str = "electra", **fields):
    """As a config of that variant, and these fields, would have it."""
    defaults = section_fields("model", dict(name=model, variant=name))
    return build_model({key: field.default for key, field in defaults.items()} | {"name": model} | fields)


def count(model) -> int:
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("electra-small", 13_549_057, 13_546_682),
        ("electra-base", 109_483_009, 33_740_602),
        ("electra-large", 335_142_913, 51_295_290),
    ],
)
def test_published_parameter_counts(name, discriminator, generator):
    """The published generators are those of the pretraining model with its default generator."""
    both = variant(name, layer_loop="scan")
    sizes = {f.name: getattr(both, f.name) for f in dataclasses.fields(Generator) if f.name not in ("parent", "name")}
    assert count(variant(name, "tfm_jax.models.electra:Discriminator", layer_loop="scan")) == discriminator
    assert count(Generator(**sizes | {"block": both.generator_block})) == generator
    embeddings = both.embedding_width * (both.vocab_size + both.max_len + both.types + 2)
    assert count(both) == discriminator + generator - embeddings


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_every_parameter_has_a_rule(layer_loop):
    model = BOTH.clone(layer_loop=layer_loop)
    for path in flatten(jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]):
        assert any(re.search(pattern, path) for pattern, _ in RULES), path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant(name, vocab_size=V)
    assert model.layers == VARIANTS[name]["layers"] and model.block.width == VARIANTS[name]["width"]


@pytest.mark.parametrize("inputs", [dict(tokens=TOKENS), dict(corrupted=TOKENS)])
def test_any_inputs_make_all_parameters(inputs):
    made = jax.eval_shape(lambda: BOTH.init(jax.random.key(0), **inputs))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params())


@pytest.mark.parametrize("name", PARTS)
def test_each_half_is_a_part_of_both(name):
    """The same parameters under the same paths, and the same outputs."""
    half = PARTS[name]
    own = {key: params()[key] for key in ("embeddings", name)}
    made = jax.eval_shape(lambda: half.init(jax.random.key(0), TOKENS))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, own)
    inputs = dict(token_types=TOKENS % 2, valid=jnp.arange(T)[None] < jnp.array([[T], [6]]))
    alone = jax.jit(half.apply)({"params": own}, TOKENS, **inputs)
    given = {"generator": "tokens", "discriminator": "corrupted"}[name]
    together = jax.jit(BOTH.apply)({"params": params()}, **{given: TOKENS}, **inputs)
    assert set(together) == set(alone) - ({"states"} if name == "generator" else set())
    for key, x in together.items():
        np.testing.assert_array_equal(x, alone[key])


def test_outputs():
    out = jax.jit(BOTH.apply)({"params": params()}, TOKENS, TOKENS)
    assert {key: x.shape for key, x in out.items()} == {
        "hidden": (2, T, E + 1), "unembedding": (V, E + 1), "logits": (2, T, V),
        "states": (2, T, D), "replaced_logits": (2, T),
    }  # fmt: skip
    np.testing.assert_array_equal(out["unembedding"][:, :E], params()["embeddings"]["token_embedding"]["embedding"])


def test_the_generator_is_narrower_by_one_factor():
    block = BOTH.generator_block
    assert (block.width, block.heads, block.key_size, block.hidden) == (8, 2, 4, 32)
    paper = variant("electra-small", generator_heads=1).generator_block
    assert (paper.width, paper.heads, paper.hidden) == (64, 1, 256)
    for name in ("electra-base", "electra-large"):
        released = variant(name).generator_block
        assert (released.width, released.heads, released.hidden) == (256, 4, 1024)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(generator_heads=5), "model.generator_heads=5: must be from 1 to model.heads=4."),
        (dict(generator_heads=0), "model.generator_heads=0: must be from 1 to model.heads=4."),
        (
            dict(generator_heads=1, block=BlockSpec(width=16, heads=4, mlp_width=30)),
            "model.generator_heads=1 of model.heads=4 heads does not give a whole model.mlp_width of 30: 7.5.",
        ),
        (dict(embedding_width=0), "model.embedding_width=0: must be at least 1."),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError) as error:
        Model(**{"block": BLOCK} | fields)
    assert str(error.value) == message


def test_one_of_the_inputs_is_needed():
    with pytest.raises(ValueError, match="Neither tokens for the generator nor corrupted ones for the discriminator"):
        BOTH.apply({"params": params()})


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("ElectraForMaskedLM", dict(hidden_act="relu"), "hidden_act='relu' is not supported; what is: 'gelu'"),
        ("ElectraForPreTraining", dict(is_decoder=True), "is_decoder=True is not supported; what is: False"),
    ],
)
def test_what_the_tables_refuse(architecture, fields, message):
    config = {"architectures": [architecture], **fields}
    with pytest.raises(UserError) as error:
        huggingface.read_section(huggingface.find(config), config, where="config.json")
    assert message in str(error.value)


def test_left_out_fields_are_as_their_class_has_them():
    """ElectraConfig(): the small model."""
    config = {"architectures": ["ElectraForPreTraining"]}
    section = huggingface.read_section(huggingface.find(config), config, where="config.json")
    sizes = ("width", "heads", "mlp_width", "embedding_width", "layers", "vocab_size", "max_len", "types")
    assert [section[key] for key in sizes] == [256, 4, 1024, 128, 12, 30522, 512, 2]


def test_a_discriminator_with_other_heads():
    """The trunk's parameters are those of pretraining, and a head stands on its states."""
    model = Discriminator(BLOCK, **SIZES, outputs=("classes",), classes=3)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    plain = jax.eval_shape(lambda: PARTS["discriminator"].init(jax.random.key(0), **model.example()))["params"]
    assert flatten(plain).keys() < flatten(shapes).keys()
    assert {path.split("/")[0] for path in flatten(shapes).keys() - flatten(plain).keys()} == {"pooler", "class_head"}
    made = jax.jit(lambda: model.init(jax.random.key(0), TOKENS)["params"])()
    out = jax.jit(lambda: model.apply({"params": made}, TOKENS))()
    made = jax.tree.map(np.asarray, made)
    first = np.tanh(
        np.asarray(out["states"])[:, 0] @ made["pooler"]["dense"]["kernel"] + made["pooler"]["dense"]["bias"]
    )
    want = first @ made["class_head"]["dense"]["kernel"] + made["class_head"]["dense"]["bias"]
    np.testing.assert_allclose(out["logits"], want, atol=1e-5)
    with pytest.raises(UserError, match=r"model.outputs: a discriminator predicts no tokens; the generator does\."):
        Discriminator(BLOCK, **SIZES, outputs=("tokens",))

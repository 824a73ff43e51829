"""Longformer: published sizes, global tokens and padding through the whole model, what it and its table refuse."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.convert import huggingface
from tfm_jax.errors import UserError
from tfm_jax.models.longformer import RULES, SPEC, VARIANTS, Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

V, T = 61, 13
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, V)
# One layer, so that what a token sees is what its one window and the global tokens show it.
TINY = Model(dataclasses.replace(SPEC, width=16, heads=4), vocab_size=V, max_len=T, window=4, max_global=3, layers=1)


@functools.cache
def params():
    made = jax.jit(lambda: TINY.init(jax.random.key(1), **TINY.example())["params"])()
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), made)


@functools.cache
def applied():
    variables = {"params": params()}
    return jax.jit(lambda tokens, **inputs: TINY.apply(variables, tokens, **inputs)["logits"])


def chosen(*places):
    return jnp.asarray([[t in row for t in range(T)] for row in places])


def variant(name: str, **fields) -> Model:
    """As a config of that variant, and these fields, would have it."""
    defaults = section_fields("model", dict(name="longformer", variant=name))
    return build_model({key: field.default for key, field in defaults.items()} | {"name": "longformer"} | fields)


def shapes(model: Model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]


@pytest.mark.parametrize(
    ("name", "count"), [("longformer-base-4096", 148_711_257), ("longformer-large-4096", 434_653_273)]
)
def test_published_parameter_counts(name, count):
    assert sum(x.size for x in jax.tree.leaves(shapes(variant(name, layer_loop="scan")))) == count


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_every_parameter_has_a_rule(layer_loop):
    for path in flatten(shapes(variant("mini", vocab_size=V, layer_loop=layer_loop))):
        assert any(re.search(pattern, path) for pattern, _ in RULES), path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant(name, vocab_size=V)
    assert model.layers == VARIANTS[name]["layers"] and model.window == VARIANTS[name]["window"]


def changed(before, after):
    """Where logits differ, (B, T)."""
    return np.abs(np.asarray(before) - np.asarray(after)).max(axis=-1) > 1e-6


def test_a_token_sees_its_window():
    apply = applied()
    seen = changed(apply(TOKENS), apply(TOKENS.at[:, 6].add(1) % V))
    np.testing.assert_array_equal(seen, np.broadcast_to(abs(np.arange(T) - 6) <= 2, (2, T)))


def test_a_global_token_sees_all_and_is_seen_by_all():
    apply = functools.partial(applied(), global_tokens=chosen([6], [1]))
    before, after = apply(TOKENS), apply(TOKENS.at[:, 6].add(1) % V)
    near = abs(np.arange(T) - 6) <= 2
    np.testing.assert_array_equal(changed(before, after), np.stack([np.ones(T, bool), near | (np.arange(T) == 1)]))


def test_padding_is_not_seen_even_where_it_is_called_global():
    valid = jnp.arange(T)[None] < jnp.array([[T], [7]])
    apply = functools.partial(applied(), valid=valid)
    before = apply(TOKENS, global_tokens=chosen([0], [2]))[1, :7]
    after = apply(TOKENS.at[1, 7:].add(1) % V, global_tokens=chosen([0], [2, 11]))[1, :7]
    np.testing.assert_array_equal(before, after)


def test_no_global_tokens_is_as_none():
    np.testing.assert_allclose(applied()(TOKENS, global_tokens=chosen([], [])), applied()(TOKENS), atol=1e-5)


def test_too_many_global_tokens_cannot_be_overlooked():
    logits = np.asarray(applied()(TOKENS, global_tokens=chosen([0, 3, 5, 9], [1, 2, 3])))
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


def test_packed_documents_are_as_if_alone():
    first, second = TOKENS[:1, :5], TOKENS[1:, :8]
    row = jnp.concatenate([first, second], axis=1)
    segments = jnp.array([[0] * 5 + [1] * 8], jnp.int32)
    places = jnp.concatenate([jnp.arange(5), jnp.arange(8)])[None]
    marks = chosen([0, 2, 5])
    packed = applied()(row, segment_ids=segments, positions=places, global_tokens=marks)
    for part, alone, own in ((packed[0, :5], first, [0, 2]), (packed[0, 5:], second, [0])):
        length = alone.shape[1]
        alone = applied()(
            jnp.pad(alone, ((0, 0), (0, T - length))),
            valid=jnp.arange(T)[None] < length,
            global_tokens=chosen(own),
        )
        np.testing.assert_allclose(part, alone[0, :length], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(window=5), "model.window=5: must be even, at least 2; half of it is on each side."),
        (dict(window=0), "model.window=0: must be even, at least 2; half of it is on each side."),
        (dict(max_global=0), "model.max_global=0: must be at least 1."),
        (
            dict(block=BlockSpec(kv_heads=2)),
            "model.kv_heads=2, model.qk_norm='none': Longformer's attention has as many key heads as query heads, and"
            " does not normalise them.",
        ),
        (
            dict(block=BlockSpec(attention="cudnn")),
            "model.attention='cudnn': Longformer's attention is its own. Use 'auto' or 'xla'.",
        ),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError) as error:
        Model(**fields)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(attention_window=[4, 8]), "attention_window=[4, 8] is not supported; what is: one window for all layers"),
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported; what is: 'gelu'"),
    ],
)
def test_what_the_table_refuses(fields, message):
    config = {"architectures": ["LongformerForMaskedLM"], "num_hidden_layers": 2, **fields}
    with pytest.raises(UserError) as error:
        huggingface.read_section(huggingface.find(config), config, where="config.json")
    assert message in str(error.value)


def test_any_room_for_global_tokens_can_be_exported():
    section = {"name": "longformer", "variant": None}
    defaults = section_fields("model", section)
    resolved = {key: field.default for key, field in defaults.items()} | section | {"vocab_size": V, "max_global": 3}
    assert huggingface.best(resolved).architecture == "LongformerForMaskedLM"


def test_any_inputs_make_all_parameters():
    """Data without global tokens trains a model that can be given some later, and exported."""
    made = jax.eval_shape(lambda: TINY.init(jax.random.key(0), TOKENS))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params())


def test_heads_read_a_global_first_token():
    """As if it were marked; and so the class depends on tokens far beyond its window."""
    model = dataclasses.replace(TINY, outputs=("classes", "embedding"), classes=3)
    made = jax.jit(lambda: model.init(jax.random.key(1), **model.example())["params"])()
    made = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), made)
    apply = jax.jit(lambda tokens, **inputs: model.apply({"params": made}, tokens, **inputs))
    out = apply(TOKENS)
    marked = apply(TOKENS, global_tokens=jnp.broadcast_to(jnp.arange(T) == 0, TOKENS.shape))
    np.testing.assert_array_equal(out["logits"], marked["logits"])
    assert out["logits"].shape == (2, 3) and "token_head" not in made
    np.testing.assert_allclose(np.linalg.norm(out["embedding"], axis=-1), 1.0, rtol=1e-5)
    far = apply(TOKENS.at[0, T - 1].add(1) % V)["logits"]
    assert np.max(np.abs(far[0] - out["logits"][0])) > 1e-6
    unmarked = apply(TOKENS, global_tokens=jnp.zeros(TOKENS.shape, bool))["logits"]
    far = apply(TOKENS.at[0, T - 1].add(1) % V, global_tokens=jnp.zeros(TOKENS.shape, bool))["logits"]
    np.testing.assert_array_equal(far[0], unmarked[0])

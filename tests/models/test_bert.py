"""BERT, RoBERTa, DistilBERT: published sizes, rules, heads. The numbers themselves are checked by tests/parity."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.models.bert import RULES, VARIANTS, Model
from tfm_jax.nn.heads import unembed, with_bias
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

TINY = BlockSpec(width=16, heads=2, norm_position="post", init="normal", init_std=0.3)
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 50)


def variant(name, **fields):
    defaults = section_fields("model", dict(name="bert", variant=name))
    return build_model({key: field.default for key, field in defaults.items()} | {"name": "bert", **fields})


def shapes(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bert-base", 110_106_428),
        ("bert-large", 336_226_108),
        ("roberta-base", 124_697_433),
        ("roberta-large", 355_412_057),
        ("distilbert-base", 66_985_530),
        ("minilm-l6", 22_713_216),
    ],
)
def test_published_parameter_counts(name, count):
    """Of BertForPreTraining, RobertaForMaskedLM, DistilBertForMaskedLM and all-MiniLM-L6-v2."""
    assert sum(x.size for x in jax.tree.leaves(shapes(variant(name, layer_loop="scan")))) == count


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_rule(name):
    for path in flatten(shapes(variant(name, vocab_size=97))):
        assert any(re.search(pattern, path) for pattern, _ in RULES), path


def test_outputs_are_those_asked_for():
    keys = {"tokens": {"hidden", "unembedding", "logits"}, "pooled": {"pooled"}, "pair": {"pooled", "pair_logits"}}
    for outputs in ((), ("tokens",), ("pooled",), ("pair",), ("tokens", "pair")):
        model = Model(TINY, vocab_size=50, layers=1, outputs=outputs)
        params = shapes(model)
        out = jax.eval_shape(lambda p, m=model: m.apply({"params": p}, TOKENS), params)
        assert set(out) == {"states"}.union(*(keys[name] for name in outputs))
        assert ("token_head" in params, "pooler" in params) == (
            "tokens" in outputs,
            {"pooled", "pair"} & {*outputs} != set(),
        )
        if "tokens" in outputs:
            assert out["logits"].shape == (2, 6, 50) and out["hidden"].shape == (2, 6, 17)
    assert out["pair_logits"].shape == (2, 2) and out["pooled"].shape == (2, 16)


def test_what_stands_for_a_text():
    """The pooler reads the first position, or the mean of those that are not padding; its parameters are the same."""
    valid = jnp.arange(6)[None] < jnp.array([[4], [6]])
    for pooling in ("first", "mean"):
        model = Model(TINY, vocab_size=50, layers=1, outputs=("pooled",), pooling=pooling)
        params = jax.jit(lambda key, m=model: m.init(key, TOKENS)["params"])(jax.random.key(1))
        out = jax.jit(lambda m=model, p=params: m.apply({"params": p}, TOKENS, valid=valid))()
        states, weights = np.asarray(out["states"]), params["pooler"]["dense"]
        one = states[:, 0] if pooling == "first" else np.stack([states[0, :4].mean(0), states[1].mean(0)])
        np.testing.assert_allclose(
            out["pooled"], np.tanh(one @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])), atol=1e-6
        )


def test_padding_and_other_documents_do_not_matter():
    model = Model(TINY, vocab_size=50, layers=2, max_len=8)
    params = jax.jit(lambda key: model.init(key, TOKENS)["params"])(jax.random.key(1))
    apply = jax.jit(lambda tokens, **inputs: model.apply({"params": params}, tokens, **inputs)["logits"])
    valid = jnp.arange(6)[None] < jnp.array([[4], [6]])
    other = TOKENS.at[0, 4:].set((TOKENS[0, 4:] + 7) % 50)
    got, want = apply(other, valid=valid), apply(TOKENS, valid=valid)
    np.testing.assert_allclose(got[0, :4], want[0, :4], atol=1e-5)
    assert not np.allclose(apply(other)[0, :4], want[0, :4], atol=1e-3)
    # Packed beside another document, a document is what it is alone.
    segments = jnp.array([[0, 0, 0, 0, 1, 1]] * 2)
    packed = apply(TOKENS, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :4], apply(TOKENS[:, :4]), atol=1e-5)


def test_a_bias_in_the_table_is_a_bias_of_the_logits():
    hidden, table, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, 4), (7, 4), (7,)]))
    got = unembed(BlockSpec(width=4, heads=1), *with_bias(hidden, table, bias))["logits"]
    np.testing.assert_allclose(got, np.asarray(hidden) @ np.asarray(table).T + np.asarray(bias), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=50, max_len=5), "A sequence of 6 tokens is longer than model.max_len=5."),
        (dict(), "model.vocab_size is not set, and no data set has filled it in."),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: Model(TINY, **fields).init(jax.random.key(0), TOKENS))
    assert str(error.value) == message


def test_sizes_are_positive():
    with says("model.layers=0: must be at least 1."):
        Model(layers=0)

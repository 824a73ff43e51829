"""Pairs of texts through one model: cosines against numpy, dropout drawn apart, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.losses.contrastive import in_batch
from tfm_jax.models.bert import Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.tasks.base import bind
from tfm_jax.tasks.sentence_embedding import make

B, L = 4, 6
DRAW = np.random.default_rng(0)
SIZES = jnp.asarray([6, 3, 1, 4])
TEXTS = [
    {"tokens": jnp.asarray(DRAW.integers(0, 20, (B, L)), jnp.int32), "valid": jnp.arange(L)[None] < sizes[:, None]}
    for sizes in (SIZES, SIZES[::-1])
]
WEIGHTS = jnp.asarray([1.0, 0.5, 0.0, 2.0])
BATCH = {"inputs": TEXTS[0], "other": TEXTS[1], "targets": jnp.asarray([5.0, 1.0, jnp.inf, 2.5]), "weights": WEIGHTS}
MODEL = Model(BlockSpec(width=16, heads=2, dropout=0.2), vocab_size=20, max_len=8, layers=1, outputs=("embedding",))
PARAMS = jax.jit(lambda: MODEL.init(jax.random.key(0), TEXTS[0]["tokens"])["params"])()


def vectors():
    """From the model's states, by hand."""
    found = []
    for text in TEXTS:
        states, valid = np.asarray(MODEL.apply({"params": PARAMS}, **text)["states"]), np.asarray(text["valid"])
        mean = np.stack([row[kept].mean(0) for row, kept in zip(states, valid, strict=True)])
        found.append(mean / np.linalg.norm(mean, axis=-1, keepdims=True))
    return found


def run(task, train=False, rng=None):
    return jax.jit(lambda: task.loss(bind(MODEL, {}), PARAMS, {}, BATCH, rng, train))()


def test_an_embedding_is_the_mean_of_a_texts_states():
    for text, want in zip(TEXTS, vectors(), strict=True):
        np.testing.assert_allclose(MODEL.apply({"params": PARAMS}, **text)["embedding"], want, atol=1e-6)


def test_cosines_learn_a_number():
    task, (a, b) = make(loss="cosine", scale=5.0), vectors()
    out, cosine = run(task), np.sum(a * b, -1)
    error = np.where(np.asarray(WEIGHTS) > 0, cosine - np.asarray([1.0, 0.2, 0.0, 0.5]), 0.0)
    assert float(out.total) == pytest.approx(np.sum(error**2 * np.asarray(WEIGHTS)), rel=1e-5)
    assert float(out.weight) == 3.5 and task.splittable
    said = float(out.metrics["absolute_error"][0])
    assert said == pytest.approx(5 * np.sum(np.abs(error) * np.asarray(WEIGHTS)), rel=1e-5)
    made = task.predict_fns["predict"](bind(MODEL, {}), PARAMS, {}, BATCH)["prediction"]
    np.testing.assert_allclose(made, 5 * cosine, rtol=1e-5)


def test_partners_are_found_in_the_batch():
    task = make(temperature=0.1)
    out = run(task)
    each, found = in_batch(*(jnp.asarray(x) for x in vectors()), WEIGHTS, 0.1)
    assert float(out.total) == pytest.approx(float(jnp.sum(each * WEIGHTS)), rel=1e-5) and not task.splittable
    assert float(out.metrics["accuracy"][0]) == pytest.approx(float(jnp.sum(found * WEIGHTS)))


def test_a_text_and_itself_are_dropped_out_apart():
    same = {**BATCH, "other": BATCH["inputs"], "targets": jnp.full(B, 1.0)}
    task = make(loss="cosine")
    loss = jax.jit(lambda rng: task.loss(bind(MODEL, {}), PARAMS, {}, same, rng, True).total)
    assert float(loss(jax.random.key(1))) > 1e-4
    assert float(task.loss(bind(MODEL, {}), PARAMS, {}, same, None, False).total) < 1e-9


def test_bad_input():
    with says("task.temperature=0: must be above 0."):
        make(temperature=0)
    with says("task.scale=-1: must be above 0."):
        make(scale=-1)
    with says("task.name='sentence_embedding' needs data.pair=FIELD and data.pair_as='apart'."):
        make().loss(bind(MODEL, {}), PARAMS, {}, {k: v for k, v in BATCH.items() if k != "other"}, None, False)
    with says("task.loss='cosine' learns numbers, and this data's targets are classes: set data.kind='number'."):
        classes = {**BATCH, "targets": jnp.zeros(B, jnp.int32)}
        make(loss="cosine").loss(bind(MODEL, {}), PARAMS, {}, classes, None, False)
    plain = Model(BlockSpec(width=16, heads=2), vocab_size=20, max_len=8, layers=1, outputs=())
    with says("task.name='sentence_embedding' needs 'embedding' in model.outputs."):
        make().loss(bind(plain, {}), PARAMS, {}, BATCH, None, False)

"""Replaced-token detection against slow numpy: who is judged, sums, no gradient through the sample, fixed evaluation."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.models.electra import Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.tasks import replaced_token
from tfm_jax.tasks.base import bind

B, T, V, D = 3, 6, 7, 4
DRAW = np.random.default_rng(0)
HIDDEN, TABLE = DRAW.normal(size=(B, T, D)), DRAW.normal(size=(V, D))
TARGETS = DRAW.integers(0, V, (B, T))
# The last row has no masked position, as a padding row has.
WEIGHTS = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], np.float32)
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)


def batch_of(weights=WEIGHTS, valid=None, rows=slice(None)):
    inputs = {"tokens": np.where(weights > 0, V - 1, TARGETS)[rows]} | ({} if valid is None else {"valid": valid[rows]})
    return {"inputs": inputs, "targets": jnp.asarray(TARGETS[rows], jnp.int32), "weights": jnp.asarray(weights[rows])}


class Stub:
    """A model whose discriminator's logits are a function of the corrupted tokens, which it notes."""

    def __init__(self, rows=slice(None)):
        self.rows, self.calls = rows, []

    def __call__(self, params, /, *, train, rngs=None, tokens=None, corrupted=None, valid=None):
        self.calls.append({"tokens": tokens, "corrupted": corrupted, "valid": valid, "rngs": rngs})
        if corrupted is not None:
            return {"replaced_logits": jnp.sin(corrupted * 1.0) + jnp.arange(T, dtype=jnp.float32)[None] / 3 - 1}
        hidden, table = jnp.asarray(HIDDEN[self.rows], jnp.float32), jnp.asarray(TABLE, jnp.float32)
        return {"hidden": hidden, "unembedding": table, "logits": hidden @ table.T}


def slow(corrupted, weights=WEIGHTS, valid=None, factor=50.0):
    """Losses one position after another, given what was drawn."""
    logits = HIDDEN @ TABLE.T
    total = weight = 0.0
    sums = dict.fromkeys(("generator_loss", "discriminator_loss", "discriminator_accuracy", "replaced"), 0.0)
    for b in range(B):
        masked = [t for t in range(T) if weights[b, t] > 0]
        judged = [t for t in range(T) if masked and (valid is None or valid[b, t])]
        generator = sum(math.log(np.exp(logits[b, t]).sum()) - logits[b, t, TARGETS[b, t]] for t in masked)
        discriminator = 0.0
        for t in judged:
            changed = corrupted[b, t] != TARGETS[b, t]
            score = math.sin(corrupted[b, t]) + t / 3 - 1
            p = 1 / (1 + math.exp(-score))
            discriminator -= math.log(p if changed else 1 - p)
            sums["discriminator_accuracy"] += changed == (score > 0)
            sums["replaced"] += changed
        sums["generator_loss"] += generator
        sums["discriminator_loss"] += discriminator
        if masked:
            total += len(judged) * (generator / len(masked) + factor * discriminator / len(judged))
            weight += len(judged)
    return total, weight, sums


@pytest.mark.parametrize("valid", [None, VALID], ids=["whole", "padded"])
@pytest.mark.parametrize("factor", [50.0, 3.0])
def test_sums_against_numpy(valid, factor):
    stub = Stub()
    task = replaced_token.make(discriminator_weight=factor)
    out = task.loss(stub, {}, {}, batch_of(valid=valid), jax.random.key(3), True)
    corrupted = np.asarray(stub.calls[1]["corrupted"])
    np.testing.assert_array_equal(corrupted[WEIGHTS == 0], TARGETS[WEIGHTS == 0])
    assert (corrupted != TARGETS).any()
    total, weight, sums = slow(corrupted, valid=valid, factor=factor)
    assert float(out.total) == pytest.approx(total, rel=1e-5) and float(out.weight) == weight
    for name, want in sums.items():
        assert float(out.metrics[name][0]) == pytest.approx(want, rel=1e-5), name
        assert float(out.metrics[name][1]) == (WEIGHTS.sum() if name.startswith("generator") else weight), name
    assert out.metrics["loss"] == (out.total, out.weight)
    hits = np.argmax(HIDDEN @ TABLE.T, -1) == TARGETS
    assert float(out.metrics["generator_accuracy"][0]) == (hits * WEIGHTS).sum()


def test_the_loss_is_a_sum_over_rows():
    task = replaced_token.make()
    whole = task.loss(Stub(), {}, {}, batch_of(), None, False)
    # Rows of weight 0 may hold anything and change nothing, wherever the batch is cut.
    kept = WEIGHTS.copy()
    kept[1] = 0
    other = WEIGHTS.copy()
    other[0] = 0
    parts = [task.loss(Stub(), {}, {}, batch_of(w), None, False) for w in (kept, other)]
    assert float(whole.total) == pytest.approx(sum(float(p.total) for p in parts), rel=1e-6)
    assert float(whole.weight) == sum(float(p.weight) for p in parts)
    nothing = task.loss(Stub(), {}, {}, batch_of(0 * WEIGHTS), None, False)
    assert float(nothing.total) == float(nothing.weight) == 0.0


def test_samples_follow_the_generator():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2]))[None, None], (1, 30_000, 3))
    drawn = np.asarray(replaced_token.sample(jax.random.key(0), logits))
    np.testing.assert_allclose(np.bincount(drawn[0]) / drawn.size, [0.5, 0.3, 0.2], atol=0.01)
    gradient = jax.grad(lambda x: jnp.sum(replaced_token.sample(jax.random.key(0), x) * 1.0))(logits)
    assert not np.any(gradient)


def test_evaluation_is_fixed_and_training_is_not():
    task = replaced_token.make()

    def corrupted(rng, train):
        stub = Stub()
        task.loss(stub, {}, {}, batch_of(), rng, train)
        return np.asarray(stub.calls[1]["corrupted"]), stub.calls

    first, calls = corrupted(None, False)
    np.testing.assert_array_equal(first, corrupted(None, False)[0])
    assert calls[0]["rngs"] is None and calls[1]["rngs"] is None
    one, calls = corrupted(jax.random.key(0), True)
    assert any((corrupted(jax.random.key(i), True)[0] != one).any() for i in range(1, 4))
    keys = [jax.random.key_data(call["rngs"]["dropout"]) for call in calls]
    assert not np.array_equal(*keys)


def test_the_generator_learns_only_to_predict():
    """The discriminator's loss moves the embeddings that both share, but nothing else of the generator."""
    model = Model(
        BlockSpec(width=16, heads=4, norm_position="post"),
        vocab_size=V, max_len=T, embedding_width=8, layers=1, generator_heads=2,
    )  # fmt: skip
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.example())["params"])()
    # Larger than they are initialised, for gradients that are not lost in rounding.
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)

    @jax.jit
    def gradient(params, factor):
        tasks = [replaced_token.make(discriminator_weight=w) for w in (0.0, 1.0)]

        def total(params):
            plain, both = (t.loss(bind(model, {}), params, {}, batch_of(), None, True).total for t in tasks)
            return plain + factor * (both - plain)

        return jax.grad(total)(params)

    without, with_ = (flatten(gradient(params, factor)) for factor in (0.0, 100.0))
    for path, g in without.items():
        moved = not np.allclose(g, with_[path], rtol=1e-4, atol=1e-4)
        if path.startswith("generator/"):
            assert not moved, path
            if path.endswith("mlp/up/kernel"):
                assert np.any(g), path
        elif path.startswith("discriminator/"):
            assert not np.any(g), path
            assert moved or path.endswith("key/bias"), path
        elif path != "embeddings/type_embedding/embedding":
            assert moved and np.any(g), path


def test_replaced_says_what_the_discriminator_thinks_of_the_inputs():
    out = replaced_token.make().predict_fns["replaced"](Stub(), {}, {}, batch_of(valid=VALID))
    np.testing.assert_allclose(
        out["logits"], np.sin(batch_of()["inputs"]["tokens"]) + np.arange(T)[None] / 3 - 1, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [0, 2, 50])
def test_chunks_change_nothing(chunk):
    made = replaced_token.make(vocab_chunk=chunk).loss(Stub(), {}, {}, batch_of(), None, False)
    plain = replaced_token.make().loss(Stub(), {}, {}, batch_of(), None, False)
    assert float(made.total) == pytest.approx(float(plain.total), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(discriminator_weight=-1.0), "task.discriminator_weight=-1.0: must be at least 0."),
        (dict(vocab_chunk=-1), "task.vocab_chunk=-1: 0 for no chunks, or the entries in one."),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        replaced_token.make(**arguments)

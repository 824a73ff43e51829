"""The objective against numpy: sums, weights, smoothing only in training, and both kinds of model."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.base import bind

B, T, D, V = 2, 3, 4, 7
DRAW = np.random.default_rng(0)
HIDDEN, TABLE = DRAW.normal(size=(B, T, D)), DRAW.normal(size=(V, D))
LOGITS = HIDDEN @ TABLE.T
BATCH = {
    "inputs": {"x": jnp.array([[1.0], [2.0]])},
    "targets": jnp.asarray(DRAW.integers(0, V, (B, T)), jnp.int32),
    "weights": jnp.array([[1.0, 0.5, 0.0], [2.0, 0.0, 1.0]]),
}


def full(params, /, x, *, train, rngs=None):
    hidden, table = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(TABLE, jnp.float32)
    return {"hidden": hidden, "unembedding": table, "logits": hidden @ table.T}


def logits_only(params, /, x, *, train, rngs=None):
    return {"logits": jnp.asarray(LOGITS, jnp.float32)}


def want(smoothing=0.0, z=0.0):
    """Sum of weighted losses, one position after another."""
    total = 0.0
    for b in range(B):
        for t in range(T):
            row = LOGITS[b, t]
            log_z = np.log(np.sum(np.exp(row)))
            target = np.full(V, smoothing / V)
            target[int(BATCH["targets"][b, t])] += 1 - smoothing
            total += float(BATCH["weights"][b, t]) * (np.sum(target * (log_z - row)) + z * log_z**2)
    return total


def loss(task, apply=full, train=True, batch=BATCH):
    return jax.jit(lambda: task.loss(apply, {}, {}, batch, None, train))()


@pytest.mark.parametrize("apply", [full, logits_only])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (0.2, 0.1)])
def test_the_loss_is_a_weighted_sum(apply, smoothing, z):
    task = token_prediction.make(label_smoothing=smoothing, z_loss=z)
    out = loss(task, apply)
    assert float(out.total) == pytest.approx(want(smoothing, z), rel=1e-5)
    assert float(out.weight) == 4.5 and out.total.dtype == jnp.float32 == out.weight.dtype
    assert float(loss(task, apply, train=False).total) == pytest.approx(want(), rel=1e-5)


@pytest.mark.parametrize("chunk", [0, 2, 7, 50])
def test_chunks_change_nothing(chunk):
    assert float(loss(token_prediction.make(vocab_chunk=chunk)).total) == pytest.approx(want(), rel=1e-5)


@pytest.mark.parametrize("apply", [full, logits_only])
def test_accuracy(apply):
    hits = np.argmax(LOGITS, -1) == np.asarray(BATCH["targets"])
    total, count = loss(token_prediction.make(), apply).metrics["accuracy"]
    assert float(total) == pytest.approx(float(np.sum(hits * np.asarray(BATCH["weights"]))))
    assert float(count) == 4.5
    perfect = BATCH | {"targets": jnp.asarray(np.argmax(LOGITS, -1), jnp.int32)}
    assert float(loss(token_prediction.make(), apply, batch=perfect).metrics["accuracy"][0]) == 4.5


def test_a_padded_position_may_hold_anything():
    def broken(params, /, x, *, train, rngs=None):
        return {"logits": jnp.asarray(LOGITS, jnp.float32).at[0, 2].set(jnp.inf).at[1, 1].set(jnp.nan)}

    assert float(loss(token_prediction.make(), broken).total) == pytest.approx(want(), rel=1e-5)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(V)(x))
        h = nn.Dropout(0.5, deterministic=not train)(h)
        return {"logits": jnp.broadcast_to(h[:, None], (B, T, V))}


def test_the_dropout_key_and_the_statistics_arrive():
    model = Net()
    variables = dict(model.init(jax.random.key(0), BATCH["inputs"]["x"]))
    params = variables.pop("params")
    task, apply = token_prediction.make(), bind(model, variables)

    def total(seed, train=True):
        return task.loss(apply, params, {}, BATCH, jax.random.key(seed), train)

    assert "batch_stats" in total(0).aux["mutables"] and total(0, train=False).aux == {}
    assert float(total(0).total) == float(total(0).total) != float(total(1).total)
    assert float(total(0, False).total) == float(total(1, False).total)


def test_predict_fns():
    made = token_prediction.make().predict_fns["next_token"](logits_only, {}, {}, BATCH)
    np.testing.assert_allclose(made["logits"], LOGITS, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(vocab_chunk=-1), "task.vocab_chunk=-1: 0 for no chunks, or the entries in one."),
        (dict(label_smoothing=1.0), "task.label_smoothing=1.0: a weight in [0, 1)."),
        (dict(z_loss=-1.0), "task.z_loss=-1.0: must be at least 0."),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        token_prediction.make(**arguments)


def test_chunks_need_a_model_that_returns_its_table():
    message = "task.vocab_chunk=4 needs a model that returns 'hidden' and 'unembedding'; this one returns logits."
    with pytest.raises(UserError) as found:
        loss(token_prediction.make(vocab_chunk=4), logits_only)
    assert str(found.value) == message

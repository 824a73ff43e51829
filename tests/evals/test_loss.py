"""The loss evaluator against plain numpy over the whole split."""

import math
import re

import jax
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.evals import loss
from tfm_jax.evals.base import Context
from tfm_jax.train.build import build


@pytest.fixture(scope="module")
def parts(make_config):
    """Experiment, state and context on 8 devices, with an average that differs from the parameters."""
    built = build(make_config({"train.ema": 0.5}))
    with jax.set_mesh(built.layout.mesh):
        state = built.fresh_state()
        # Weights 20 times as large, so that the loss is not the logarithm of the vocabulary.
        state.extra["ema"] = jax.tree.map(lambda x: x * 20, state.extra["ema"])
    return built, state, Context(built.task, built.model, built.layout, built.data, 8)


@pytest.fixture(scope="module")
def slow(parts, corpus):
    """Losses and hits of the split's tokens from its text, row by row of 8, with nothing of the data side."""
    built, state, _ = parts
    text = (corpus / "valid.txt").read_bytes()
    end = built.data.tokenizer.end_id
    stream = np.array([end, *built.data.tokenizer.encode_batch([text.decode()])[0], end])
    params = jax.device_get(state.extra["ema"])
    apply = jax.jit(lambda tokens: built.model.apply({"params": params}, tokens)["logits"])
    losses, hits = [], []
    for i in range(0, len(stream) - 1, 8):
        row = np.full(9, end)
        piece = stream[i : i + 9]
        row[: len(piece)] = piece
        logits = np.asarray(apply(row[None, :-1]), np.float64)[0, : len(piece) - 1]
        target = piece[1:]
        log_z = np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1)) + logits.max(-1)
        losses += list(log_z - logits[np.arange(len(target)), target])
        hits += list(np.argmax(logits, -1) == target)
    return np.array(losses), np.array(hits), len(text)


def run(parts, **arguments):
    built, state, context = parts
    with jax.set_mesh(built.layout.mesh):
        evaluate = loss.make(context, **arguments)
        found = evaluate(state)
        assert evaluate.gives(built.abstract_state()) == found.keys()
        return found


def test_whole_split(parts, slow):
    losses, hits, size = slow
    found = run(parts)
    assert set(found) == {"loss", "accuracy", "perplexity", "tokens", "bits_per_byte"}
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert abs(found["loss"] - math.log(257)) > 0.05
    assert found["accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(np.sum(losses) / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("batch_size", [3, 16, 1000])
def test_padding_is_exact(parts, slow, batch_size):
    found = run(parts, batch_size=batch_size)
    assert found["loss"] == pytest.approx(np.mean(slow[0]), rel=1e-5) and found["tokens"] == len(slow[0])


def test_some_batches(parts, slow):
    """Evenly spaced: where texts are sorted, the first ones are the shortest."""
    found, every = run(parts, max_batches=2), -(-len(slow[0]) // 64)
    assert found["tokens"] == 2 * 8 * 8 and every > 4
    rows = np.concatenate([slow[0][64 * i : 64 * i + 64] for i in (every // 4, 3 * every // 4)])
    assert found["loss"] == pytest.approx(np.mean(rows), rel=1e-5)
    assert run(parts, max_batches=10**6)["tokens"] == len(slow[0])


def test_evaluators_share_a_compiled_step(parts):
    _, _, context = parts
    run(parts)
    run(parts, split="train", max_batches=1)
    assert list(context._steps) == ["loss"] and context._steps["loss"]._cache_size() <= 4


def test_batches_are_rounded_up_to_the_mesh(parts):
    context = parts[2]
    assert [context.rows(n) for n in (None, 1, 8, 9)] == [8, 8, 8, 16]


def test_errors(parts):
    with pytest.raises(
        UserError, match=re.escape("evals: max_batches=0: must be at least 1, or None for the whole split.")
    ):
        run(parts, max_batches=0)

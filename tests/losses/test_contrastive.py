"""In-batch negatives against loops, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.losses.contrastive import in_batch

B, D, T = 6, 5, 0.1
DRAW = np.random.default_rng(0)
FIRST, SECOND = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in DRAW.normal(size=(2, B, D)))
SECOND[[0, 2]] = FIRST[[0, 2]]
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 0.0])


def run(first=FIRST, second=SECOND, weights=WEIGHTS):
    made = jax.jit(in_batch, static_argnums=3)(*(jnp.asarray(x, jnp.float32) for x in (first, second, weights)), T)
    return [np.asarray(x) for x in made]


def slow():
    loss, nearest, there = np.zeros(B), np.zeros(B, bool), [i for i in range(B) if WEIGHTS[i] > 0]
    for i in there:
        ours = {j: np.exp(FIRST[i] @ SECOND[j] / T) for j in there}
        theirs = {j: np.exp(FIRST[j] @ SECOND[i] / T) for j in there}
        loss[i] = -np.log(ours[i] / sum(ours.values())) / 2 - np.log(theirs[i] / sum(theirs.values())) / 2
        nearest[i] = ours[i] == max(ours.values())
    return loss, nearest


def test_against_loops():
    for got, want in zip(run(), slow(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert 0 < slow()[1].sum() < 4


def test_rows_without_weight_may_hold_anything():
    other = np.where(WEIGHTS[:, None] > 0, SECOND, 100.0)
    for got, want in zip(run(second=other), run(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert run(weights=np.zeros(B))[0].sum() == 0
    gradient = jax.grad(lambda x: jnp.sum(in_batch(x, x, jnp.asarray(WEIGHTS), T)[0]))(jnp.asarray(FIRST))
    assert np.all(np.isfinite(gradient)) and np.all(gradient[3] == 0)


def test_both_sides_are_alike():
    assert run()[0].sum() == pytest.approx(run(SECOND, FIRST)[0].sum(), rel=1e-6)

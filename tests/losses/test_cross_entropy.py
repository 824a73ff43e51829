"""Cross-entropy against numpy, and what the chunked form never makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jaxprs import equations
from tfm_jax.losses.cross_entropy import cross_entropy, linear_cross_entropy

N, D, V = 14, 8, 37
HIDDEN, TABLE = jax.random.normal(jax.random.key(0), (N, D)), jax.random.normal(jax.random.key(1), (V, D))
TARGETS = jnp.array([0, 36, 36, *np.random.default_rng(0).integers(0, V, N - 3)], jnp.int32)
# Each position counts differently, some not at all, as padding does.
WEIGHTS = jnp.asarray(np.linspace(0, 1, N), jnp.float32)
SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.05), (0.2, 0.01)]


@functools.cache
def slow(smoothing: float, z_loss: float):
    """Loss, whether the target wins, and the gradients of sum(WEIGHTS * loss), in float64."""
    h, w = np.asarray(HIDDEN, np.float64), np.asarray(TABLE, np.float64)
    loss, correct, d_h, d_w = np.zeros(N), np.zeros(N, bool), np.zeros_like(h), np.zeros_like(w)
    for n in range(N):
        logits = w @ h[n]
        z = np.exp(logits).sum()
        wanted = np.full(V, smoothing / V)
        wanted[TARGETS[n]] += 1 - smoothing
        loss[n] = -(wanted * np.log(np.exp(logits) / z)).sum() + z_loss * np.log(z) ** 2
        correct[n] = logits.argmax() == TARGETS[n]
        p = np.exp(logits) / z
        d = (p - wanted + 2 * z_loss * np.log(z) * p) * float(WEIGHTS[n])
        d_h[n] = d @ w
        d_w += np.outer(d, h[n])
    return loss, correct, d_h, d_w


@pytest.mark.parametrize(("smoothing", "z_loss"), SETTINGS)
def test_from_logits_against_numpy(smoothing, z_loss):
    def total(h, w):
        loss = cross_entropy(h @ w.T, TARGETS, label_smoothing=smoothing, z_loss=z_loss)
        return jnp.sum(WEIGHTS * loss), loss

    (_, loss), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(HIDDEN, TABLE)
    want, _, *d_want = slow(smoothing, z_loss)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for got, expected in zip(gradients, d_want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


# 10 does not divide 37; 1 is one entry at a time; 36 leaves the smallest rest; 99 is the whole.
@pytest.mark.parametrize(
    ("chunk", "smoothing", "z_loss"),
    [(chunk, *pair) for chunk in (0, 10) for pair in SETTINGS] + [(c, 0.2, 0.01) for c in (1, 36, 99)],
)
def test_linear_against_numpy(chunk, smoothing, z_loss):
    @jax.jit
    def run(h, w):
        def total(h, w):
            loss, correct = linear_cross_entropy(h, w, TARGETS, chunk=chunk, label_smoothing=smoothing, z_loss=z_loss)
            return jnp.sum(WEIGHTS * loss), (loss, correct)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(h, w)

    (_, (loss, correct)), gradients = run(HIDDEN, TABLE)
    want, right, *d_want = slow(smoothing, z_loss)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_array_equal(correct, right)
    for got, expected in zip(gradients, d_want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 10])
def test_correct_is_true_where_the_target_wins(chunk):
    best = jnp.argmax(HIDDEN @ TABLE.T, axis=-1).astype(jnp.int32)
    assert bool(jnp.all(linear_cross_entropy(HIDDEN, TABLE, best, chunk=chunk)[1]))


@pytest.mark.parametrize("chunk", [0, 10])
def test_large_logits_stay_finite(chunk):
    """With chunks the running maximum moves; nothing may overflow on the way, in either direction."""
    hidden = 60 * HIDDEN
    loss = linear_cross_entropy(hidden, TABLE, TARGETS, chunk=chunk)[0]
    logits = np.asarray(hidden, np.float64) @ np.asarray(TABLE, np.float64).T
    top = logits.max(-1)
    want = top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(N), TARGETS]
    np.testing.assert_allclose(loss, want, rtol=1e-4, atol=1e-3)
    gradient = jax.grad(lambda h: jnp.sum(linear_cross_entropy(h, TABLE, TARGETS, chunk=chunk)[0]))(hidden)
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize("chunk", [0, 10])
def test_bfloat16_products_with_float32_losses(chunk):
    hidden = HIDDEN.astype(jnp.bfloat16)

    def total(h, w):
        loss, _ = linear_cross_entropy(h, w, TARGETS, chunk=chunk)
        return jnp.sum(WEIGHTS * loss), loss

    (_, loss), (d_hidden, d_table) = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, TABLE)
    assert (loss.dtype, d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    want, _, d_h, d_w = slow(0.0, 0.0)
    np.testing.assert_allclose(loss, want, atol=0.1)
    np.testing.assert_allclose(np.asarray(d_hidden, np.float32), d_h, atol=0.05)
    np.testing.assert_allclose(d_table, d_w, atol=0.1)


@pytest.mark.parametrize("chunk", [0, 10])
def test_a_bfloat16_table_under_float32_states(chunk):
    """Operands are rounded and nothing else: loss, logits' gradient and that of the states are float32's of rounded numbers."""
    narrow = TABLE.astype(jnp.bfloat16)
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (HIDDEN, TABLE)]

    def run(h, w):
        def total(h, w):
            loss, _ = linear_cross_entropy(h, w, TARGETS, chunk=chunk, label_smoothing=0.1)
            return jnp.sum(WEIGHTS * loss), loss

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(h, w)

    (_, loss), (d_hidden, d_table) = run(HIDDEN, narrow)
    (_, exact), exact_gradients = run(*rounded)
    np.testing.assert_allclose(loss, exact, rtol=1e-6, atol=1e-6)
    assert (d_hidden.dtype, d_table.dtype) == (jnp.float32, jnp.bfloat16)
    for got, want in zip((d_hidden, d_table), exact_gradients, strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.01 * float(jnp.max(jnp.abs(want))))
    # Not of what bfloat16 can say alone.
    assert np.any(np.asarray(d_hidden) != np.asarray(d_hidden.astype(jnp.bfloat16).astype(jnp.float32)))


@pytest.mark.parametrize(("chunk", "whole"), [(0, True), (10, False), (1, False)])
def test_chunks_never_make_the_logits(chunk, whole):
    """No array of N * V elements, neither traced nor compiled, forward or backward."""

    def gradient(h, w):
        return jax.grad(lambda h, w: jnp.sum(linear_cross_entropy(h, w, TARGETS, chunk=chunk)[0]), argnums=(0, 1))(h, w)

    traced = equations(jax.make_jaxpr(gradient)(HIDDEN, TABLE).jaxpr)
    made = [tuple(v.aval.shape) for equation in traced for v in equation.outvars]
    assert any("scan" in str(e.primitive) for e in jax.make_jaxpr(gradient)(HIDDEN, TABLE).eqns) != whole
    assert (max(int(np.prod(shape)) for shape in made) >= N * V) == whole
    text = jax.jit(gradient).lower(HIDDEN, TABLE).compile().as_text()
    assert any(f"[{a},{b}]" in text for a, b in ((N, V), (V, N))) == whole


def test_negative_chunk():
    with pytest.raises(ValueError, match=r"^chunk=-1: must be 0 or a number of vocabulary entries\.$"):
        linear_cross_entropy(HIDDEN, TABLE, TARGETS, chunk=-1)

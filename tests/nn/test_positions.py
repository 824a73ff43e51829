"""Rotary positions against numpy, and the property that they exist for."""

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.nn.positions import Rope, rotate, rotation

B, T, H, K, THETA = 2, 5, 3, 8, 100.0
POSITIONS = jnp.array([[0, 1, 2, 3, 4], [7, 7, 0, 31, 2]], jnp.int32)


def test_against_numpy():
    x = np.asarray(jax.random.normal(jax.random.key(0), (B, T, H, K)))
    want = np.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for i in range(K // 2):
                angle = float(POSITIONS[b, t]) * THETA ** (-2 * i / K)
                low, high = x[b, t, :, i], x[b, t, :, i + K // 2]
                want[b, t, :, i] = low * np.cos(angle) - high * np.sin(angle)
                want[b, t, :, i + K // 2] = low * np.sin(angle) + high * np.cos(angle)
    np.testing.assert_allclose(rotate(jnp.asarray(x), rotation(POSITIONS, K, Rope(THETA))), want, atol=2e-6)


def test_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, K))

    def score(m: int, n: int) -> float:
        turned = [rotate(x, rotation(jnp.array([[at]]), K, Rope(THETA))) for x, at in ((q, m), (k, n))]
        return float(jnp.sum(turned[0] * turned[1]))

    scores = {distance: [score(at + distance, at) for at in (0, 5, 40)] for distance in (0, 3, 11)}
    for same in scores.values():
        np.testing.assert_allclose(same, same[0], atol=1e-5)
    assert abs(scores[0][0] - scores[3][0]) > 1e-2
    np.testing.assert_allclose(scores[0][0], jnp.sum(q * k), atol=1e-6)


def test_length_is_kept_and_zero_is_the_identity():
    x = jax.random.normal(jax.random.key(2), (B, T, H, K))
    turned = rotate(x, rotation(POSITIONS, K, Rope(THETA)))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])


def test_one_row_of_positions_serves_the_batch():
    x = jax.random.normal(jax.random.key(3), (B, T, H, K))
    one, each = jnp.arange(T)[None], jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    np.testing.assert_array_equal(rotate(x, rotation(one, K, Rope(THETA))), rotate(x, rotation(each, K, Rope(THETA))))


def test_dtype_is_kept_and_angles_are_float32():
    by = rotation(POSITIONS, K, Rope(THETA))
    assert by.cos.dtype == by.sin.dtype == jnp.float32
    assert rotate(jnp.ones((B, T, H, K), jnp.bfloat16), by).dtype == jnp.bfloat16

"""Where a token stands. B batch, T length, H heads, K head size."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each (B or 1, T, 1, K/2) float32."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BT: jax.Array, head_size: int, theta: float) -> Rotation:
    """Rotary angles m * theta^(-2i/K) (Su et al. 2021, equation 15)."""
    frequency = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Turn the pairs (x_i, x_{i+K/2}): the half-split order of the published Llama weights."""
    shape = (*x_BTHK.shape[:-1], x_BTHK.shape[-1] // 2)
    cos, sin = jnp.broadcast_to(by.cos, shape), jnp.broadcast_to(by.sin, shape)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)

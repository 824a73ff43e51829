"""Where a token stands. B batch, T length, H heads, K head size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each (B or 1, T, 1, K/2) float32."""

    cos: jax.Array
    sin: jax.Array


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021) and how they are stretched to longer sequences than were trained on.

    Attributes:
      theta: base of the angles.
      scaling: `none`; `linear` divides every angle by `factor` (Chen et al. 2023); `llama3` only those that turn less
        than `low_freq` times over `original_len` positions, none that turn more than `high_freq` times, and the ones
        between smoothly (Grattafiori et al. 2024, section 3.2 and the released code).
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_len: int = 8192

    def frequencies(self, head_size: int) -> np.ndarray:
        """(K/2,) float32 angles of one step."""
        # In float32 throughout, as the published models were trained.
        plain = (1.0 / np.float32(self.theta) ** (np.arange(0, head_size, 2, dtype=np.float32) / head_size)).astype(
            np.float32
        )
        if self.scaling == "none":
            return plain
        if self.scaling == "linear":
            return (plain / np.float32(self.factor)).astype(np.float32)
        turns = self.original_len * plain / (2 * np.pi)
        kept = np.clip((turns - self.low_freq) / (self.high_freq - self.low_freq), 0, 1)
        return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32)


def rotation(positions_BT: jax.Array, head_size: int, rope: Rope) -> Rotation:
    """Rotary angles m * theta^(-2i/K) (Su et al. 2021, equation 15), scaled as `rope` says."""
    frequency = jnp.asarray(rope.frequencies(head_size))
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Turn the pairs (x_i, x_{i+K/2}): the half-split order of the published Llama weights."""
    shape = (*x_BTHK.shape[:-1], x_BTHK.shape[-1] // 2)
    cos, sin = jnp.broadcast_to(by.cos, shape), jnp.broadcast_to(by.sin, shape)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def sinusoids(length: int, width: int) -> np.ndarray:
    """(length, width) float32: sines, then cosines, of position / 10000^(2i/D) (Vaswani et al. 2017, section 3.5).

    The paper interleaves them; a fixed order of the residual stream's dimensions is the same model.
    """
    angle = np.arange(length)[:, None] / 10_000.0 ** (2 * (np.arange(width) // 2)[None, ::2] / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

"""Images as sequences of patches on a grid. B batch, P patch side, C channels, D width, E extra tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.errors import UserError
from tfm_jax.nn.linear import Dense, Embedding
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

RULES: tuple[Rule, ...] = (
    (r"patch_embedding/kernel$", ("fsdp", None)),
    (r"patch_embedding/bias$", (None,)),
    (r"position_embedding/embedding$", (None, "fsdp")),
    (r"_token$", (None,)),
)


def patches(images: jax.Array, size: int) -> jax.Array:
    """(B, height, width, C) to (B, height/P * width/P, P*P*C), in reading order."""
    b, height, width, channels = images.shape
    grid = images.reshape(b, height // size, size, width // size, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * channels)


class PatchEmbedding(nn.Module):
    """Projected patches after extra tokens of their own, plus a learned position each (Dosovitskiy et al. 2021, eq. 1).

    Attributes:
      image_size: height and width, in pixels.
      patch: P, a divisor of it.
      extra: parameter names of the tokens before the patches.
    """

    spec: BlockSpec
    image_size: int
    patch: int
    channels: int
    extra: Sequence[str] = ("class_token",)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """(B, image_size, image_size, C) to (B, E + patches, D)."""
        spec, side, init = self.spec, self.image_size, nn.initializers.normal(self.spec.init_std)
        if images.shape[1:] != (side, side, self.channels):
            raise UserError(
                f"Images of {' x '.join(map(str, images.shape[1:]))} (height, width, channels), but"
                f" model.image_size={side} and model.channels={self.channels}."
            )
        x = patches(images, self.patch)
        std = spec.std("other", x.shape[-1], spec.width, 1)
        project = Dense(spec.width, "all", spec.compute_dtype, nn.initializers.normal(std), name="patch_embedding")
        x = project(x)
        first = [self.param(name, init, (spec.width,), jnp.float32).astype(x.dtype) for name in self.extra]
        rows = [jnp.broadcast_to(token, (x.shape[0], 1, spec.width)) for token in (t[None, None] for t in first)]
        x = jnp.concatenate([*rows, x], axis=1)
        table = Embedding(x.shape[1], spec.width, spec.compute_dtype, spec.init_std, name="position_embedding")
        x = x + jnp.broadcast_to(table.embedding.astype(x.dtype), x.shape)
        if spec.dropout:
            x = nn.Dropout(spec.dropout, deterministic=not train)(x)
        return constrain(x, ("rows", "length", "embed"))


def check_grid(image_size: int, patch: int) -> None:
    """Refuse a patch that does not divide the image."""
    if image_size % patch:
        near = sorted((p for p in range(1, image_size + 1) if image_size % p == 0), key=lambda p: abs(p - patch))[:2]
        raise UserError(
            f"model.patch={patch} does not divide model.image_size={image_size}."
            f" Nearest that do: {', '.join(map(str, sorted(near)))}."
        )


def resize_grid(table_ND: jax.Array, length: int, *, extra: int) -> jax.Array:
    """A table of positions for another resolution: the grid is resized bicubically, the extra rows stay.

    Dosovitskiy et al. 2021, section 3.2; bicubic since Touvron et al. 2021 (DeiT), section 4. The numbers are PyTorch's
    `interpolate(mode="bicubic", align_corners=False)`, with which published checkpoints were resized.

    Args:
      table_ND: `extra` rows, then a square grid in reading order.
      length: rows of the result, `extra` included.
    """
    old, new = (math.isqrt(rows - extra) for rows in (table_ND.shape[0], length))
    if old * old + extra != table_ND.shape[0] or new * new + extra != length:
        raise UserError(
            f"Position tables of {table_ND.shape[0]} and {length} rows: without the first {extra} one is not a square"
            " grid, so it cannot be resized."
        )
    grid, turn = table_ND[extra:].reshape(old, old, -1), jnp.asarray(bicubic(old, new), table_ND.dtype)
    resized = jnp.einsum("yh,xw,hwd->yxd", turn, turn, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table_ND[:extra], resized.reshape(new * new, -1)])


def bicubic(old: int, new: int) -> np.ndarray:
    """(new, old) weights of cubic convolution (Keys 1981, equation 4) with a = -0.75, edges repeated."""
    a = -0.75
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(place - (first + tap))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return weights

"""JAX's splash attention for TPUs (Pallas): scores stay on the chip, and blocks that the mask hides are left out.

B batch, T query length, S key length, H query heads, G key heads, K head size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.nn.masks import Mask

# Lengths come in multiples of a TPU's lanes.
LANES = 128
# Positions of a tile, as MaxText's defaults are; no tile has been timed here.
TILE = 512
# A segment that no query is of.
NOBODY = np.iinfo(np.int32).min


def unfit(q: jax.Array, k: jax.Array, mask: Mask) -> str | None:
    """Why the kernel cannot do this, or None.

    Args:
      q: (B, T, H, K); k: (B, S, G, K).
    """
    if mask.bias is not None:
        return "splash adds no bias to the scores"
    if mask.query_positions is not None or mask.prefix is not None:
        return "splash has one mask for all rows, segments and padding apart"
    if wrong := [length for length in (q.shape[1], k.shape[1]) if length % LANES]:
        return f"splash wants lengths in multiples of {LANES}, and one is {wrong[0]}"
    return None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, interpret: bool = False) -> jax.Array:
    """softmax(q k^T + mask) v on one device, (B, T, H, K).

    Padding is a segment of its own. A query with no allowed key gets the mean of some values.

    Args:
      q: (B, T, H, K), scaled; k, v: (B, S, G, K). What `unfit` finds nothing against.
      interpret: run the kernel where there is no TPU, slowly.
    """
    # Importing it costs half a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    batch, length = k.shape[:2]
    segments = None
    if mask.key_valid is not None or mask.query_segments is not None:
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        of_keys = zeros((batch, length)) if mask.key_segments is None else mask.key_segments
        of_queries = zeros(q.shape[:2]) if mask.query_segments is None else mask.query_segments
        if mask.key_valid is not None:
            of_keys = jnp.where(mask.key_valid, of_keys, NOBODY)
        segments = kernels.SegmentIds(of_queries, of_keys)
    run = _kernel(q.shape[1], length, q.shape[2], mask.causal, mask.window, mask.offset, interpret)
    out = jax.vmap(run)(*(x.swapaxes(1, 2) for x in (q, k, v)), segments)
    return out.swapaxes(1, 2)


def _kernel(queries: int, keys: int, heads: int, causal: bool, window: int | None, offset: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (queries, keys)
    if window is not None:
        seen: Any = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), offset)
    else:
        seen = masks.CausalMask(shape, offset) if causal else masks.FullMask(shape)
    across, along = _tile(queries), _tile(keys)
    sizes = kernels.BlockSizes(
        block_q=across, block_kv=along, block_kv_compute=along,
        block_q_dkv=across, block_kv_dkv=along, block_kv_dkv_compute=along,
        block_q_dq=across, block_kv_dq=along,
    )  # fmt: skip
    return kernels.make_splash_mha(
        masks.MultiHeadMask([seen] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def seen(length: int) -> float:
    """The share of its tiles that a causal mask leaves."""
    tiles = length // _tile(length)
    return (tiles + 1) / (2 * tiles)


def _tile(length: int) -> int:
    """The largest that divides a length; all of one that none does."""
    return next((size for size in range(TILE, 0, -LANES) if length % size == 0), length)

"""Who may attend to whom and how readily, kept as a description so that no implementation has to build the (T, S) array.

B batch, T query length, S key length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# The score of a key that is not allowed. Finite, so that a query with no allowed key gives a mean over keys and not a NaN.
NEG = -1e30


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query_positions", "prefix", "key_valid", "query_segments", "key_segments", "bias"],
    meta_fields=["causal", "window", "offset"],
)
@dataclass(frozen=True)
class Mask:
    """The conjunction of everything that is set.

    Attributes:
      causal: a query sees keys at its own and earlier positions.
      window: only keys closer than this to the query's own position: with `causal` its own and the `window - 1` before
        it (Mistral), without it as many after it too (Longformer).
      offset: where the first query stands among the keys: behind a memory of that many.
      query_positions: (B, T) int32, where each query stands among the keys; offset..offset+T-1 if None. Set when
        decoding with a cache whose slots 0..S-1 are the positions.
      prefix: (B,) int32, with `causal`: so many keys from the first on are seen from all positions (a prefix language model).
      key_valid: (B, S) bool, False for padding.
      query_segments, key_segments: (B, T) and (B, S) int32; a query sees only keys of its own segment (packed
        documents).
      bias: (B or 1, H, T, S), added to the scores (relative positions).
    """

    causal: bool = False
    window: int | None = None
    offset: int = 0
    query_positions: jax.Array | None = None
    prefix: jax.Array | None = None
    key_valid: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    bias: jax.Array | None = None

    def block(self, queries: slice, keys: slice) -> jax.Array | None:
        """The (B or 1, t, s) boolean mask of a block of queries and keys; None when everything is allowed."""
        parts = []
        if self.causal or self.window is not None:
            q_pos = (
                jnp.arange(queries.start + self.offset, queries.stop + self.offset)[None]
                if self.query_positions is None
                else self.query_positions[:, queries]
            )[:, :, None]
            k_pos = jnp.arange(keys.start, keys.stop)[None, None]
            if self.causal:
                past = q_pos >= k_pos
                if self.prefix is not None:
                    past = jnp.logical_or(*_equal_shapes(past, k_pos < self.prefix[:, None, None]))
                parts.append(past)
            if self.window is not None:
                parts.append(jnp.abs(q_pos - k_pos) < self.window)
        if self.key_valid is not None:
            parts.append(self.key_valid[:, None, keys])
        if self.query_segments is not None and self.key_segments is not None:
            parts.append(self.query_segments[:, queries, None] == self.key_segments[:, None, keys])
        if not parts:
            return None
        allowed = parts[0]
        for part in parts[1:]:
            allowed = jnp.logical_and(*_equal_shapes(allowed, part))
        return allowed

    def arrays(self) -> dict[str, jax.Array | None]:
        """What it has by row, and by position: a bias and positions of queries apart."""
        names = ("prefix", "key_valid", "query_segments", "key_segments")
        return {name: getattr(self, name) for name in names}

    @property
    def skips_future(self) -> bool:
        """Whether keys after a query's index can be left out of the computation altogether."""
        return self.causal and self.query_positions is None and self.prefix is None


def _equal_shapes(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    return jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)

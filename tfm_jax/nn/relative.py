"""Attention by distance, and over a memory of earlier segments (Dai et al. 2019, "Transformer-XL", arXiv 1901.02860).

B batch, T query length, M memory length, S = M + T key length, D width, H heads, K head size, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.nn.attention import Cache, Context, heads, mixed, written
from tfm_jax.nn.block import LayerCache
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import Caches, LayerLoop
from tfm_jax.parallel.sharding import BATCH_AXES, Rule, constrain

RULES: tuple[Rule, ...] = (
    (r"attention/position/kernel$", ("fsdp", "tensor")),
    (r"(content|position)_bias$", ("tensor", None)),
    (r"memory/states$", (BATCH_AXES, None, None, None)),
    (r"memory/valid$", (BATCH_AXES, None)),
)


class Memory(NamedTuple):
    """What the layers saw last, one array whatever the layers' layout, rows first so that a mesh splits them.

    Attributes:
      states: (B, L, M, D), the inputs of each layer's attention, oldest first.
      valid: (B, M) bool, False for slots that hold nothing.
    """

    states: jax.Array
    valid: jax.Array


class Relative(NamedTuple):
    """What all layers of relative attention share: `Context.shared` for `RelativeAttention`.

    Attributes:
      sinusoids: (S, D) encodings R of the distances S-1, ..., 1, 0.
      content_bias, position_bias: (H, K), the vectors u and v of the paper's section 3.3.
    """

    sinusoids: jax.Array
    content_bias: jax.Array
    position_bias: jax.Array


def shift(scores_BHTS: jax.Array) -> jax.Array:
    """From columns by distance S-1, ..., 0 to columns by key, for queries that are the last T of S positions.

    Row i moves left by T-1-i, all rows by one reshape (appendix B). What comes in from the right stands for keys in the
    query's future: mask it.
    """
    b, h, t, s = scores_BHTS.shape
    padded = jnp.pad(scores_BHTS, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(b, h, s + 1, t)[:, :, 1:].reshape(b, h, t, s)


def gather(scores_BHTS: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """`shift` for queries that stand anywhere among the keys, as in decoding."""
    s = scores_BHTS.shape[-1]
    column = s - 1 - positions_BT[:, None, :, None] + jnp.arange(s)[None, None, None]
    column = jnp.broadcast_to(jnp.clip(column, 0, s - 1), scores_BHTS.shape)
    return jnp.take_along_axis(scores_BHTS, column, axis=-1)


class RelativeAttention(nn.Module):
    """Attention whose scores are (q_i + u) k_j + (q_i + v) W r_{i-j}: the terms (a) to (d) of section 3.3.

    Projections `query`, `key`, `value`, `position` (W, of the sinusoids) and `out`, all without biases as in the
    paper. The second product becomes the mask's bias, so that every implementation of attention serves.
    """

    spec: BlockSpec
    layers: int
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, kept: jax.Array | Cache | None
    ) -> tuple[jax.Array, jax.Array | Cache | None]:
        """(B, T, D) to (B, T, D), and what is kept: the last M states (B, M, D) of memory and segment, or a cache."""
        module = _Projecting(dataclasses.replace(self.spec, bias="none"), self.layers, self.train, self.name)
        spec, relative, mask = self.spec, context.shared, context.mask
        # No gradient goes into earlier segments (section 3.2); u and v get theirs from all layers.
        memory = None if kept is None or isinstance(kept, Cache) else jax.lax.stop_gradient(kept).astype(x.dtype)
        seen = x if memory is None else jnp.concatenate([memory, x], axis=1)
        q = heads(module, x, spec.heads, "query")
        k, v = heads(module, seen, spec.groups, "key"), heads(module, seen, spec.groups, "value")
        r = heads(module, relative.sinusoids.astype(x.dtype)[None], spec.heads, "position")[0]
        if memory is not None:
            kept = seen[:, x.shape[1] :]
        elif isinstance(kept, Cache):
            kept = written(kept, k, v, mask)
            k, v = kept
        u_bias, v_bias = (b.astype(q.dtype)[None, None] for b in (relative.content_bias, relative.position_bias))
        by_distance = jnp.einsum("bthk,shk->bhts", q + v_bias, r, preferred_element_type=jnp.float32)
        by_distance = constrain(by_distance, ("batch", "heads", "length", None))
        if spec.attention_scale == "sqrt":
            by_distance = by_distance * spec.key_size**-0.5
        positions = mask.query_positions
        bias = shift(by_distance) if positions is None else gather(by_distance, positions)
        return mixed(module, q + u_bias, k, v, dataclasses.replace(mask, bias=bias), x.shape[-1]), kept


@dataclasses.dataclass
class _Projecting:
    spec: BlockSpec
    layers: int
    train: bool
    name: str | None


def layer_caches(states_BLMD: jax.Array, layer_loop: LayerLoop) -> Caches:
    """A memory's states as a stack takes them."""
    if layer_loop == "scan":
        return LayerCache(states_BLMD.swapaxes(0, 1))
    return tuple(LayerCache(states_BLMD[:, i]) for i in range(states_BLMD.shape[1]))


def layer_states(caches: Caches) -> jax.Array:
    """The inverse of `layer_caches`, (B, L, M, D)."""
    if isinstance(caches, LayerCache):
        states: jax.Array = caches.own.swapaxes(0, 1)
        return states
    return jnp.stack([cache.own for cache in caches], axis=1)

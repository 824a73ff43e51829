"""Attention within a window, and a few tokens that see and are seen by all: linear in length (Beltagy et al. 2020).

B batch, T length, H heads, K head size, N blocks, C queries of a block, S = 3C its keys, G global tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn.attention import Cache, Context, dense, heads
from tfm_jax.nn.masks import NEG, Mask
from tfm_jax.nn.remat import named
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

RULES: tuple[Rule, ...] = (
    (r"attention/(query|key|value)_global/kernel$", ("fsdp", "tensor")),
    (r"attention/(query|key|value)_global/bias$", ("tensor",)),
)

Dropout = Callable[[jax.Array], jax.Array]


class Globals(NamedTuple):
    """Where the global tokens stand.

    Attributes:
      place: (B, G) int32, all different in a row.
      present: (B, G) bool, False where a row has fewer than G; its place is then an ordinary token's.
    """

    place: jax.Array
    present: jax.Array


def find_globals(chosen_BT: jax.Array, most: int) -> Globals:
    """The first `most` chosen tokens of each row."""
    length = chosen_BT.shape[1]
    # Earlier is higher, and a token that is not chosen is lower than all that are.
    order = jnp.broadcast_to(jnp.arange(length, 0, -1, dtype=jnp.int32)[None], chosen_BT.shape)
    rank, index = jax.lax.top_k(jnp.where(chosen_BT, order, 0), min(most, length))
    return Globals(index.astype(jnp.int32), rank > 0)


def windowed(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, globals_: Globals | None, dropout: Dropout | None = None
) -> jax.Array:
    """Attention to the keys within the mask's window and to the global tokens, wherever they stand.

    Queries come in blocks of as many as the window reaches to one side, so that a block's keys are its own, those of
    the block before and those of the block after: T * 3C scores in one batched product, whatever T.

    Args:
      q, k, v: (B, T, H, K), queries scaled.
      mask: its `window`, `key_valid` and segments are used.
      dropout: applied to the weights.

    Returns:
      (B, T, H, K) in v's dtype.
    """
    assert mask.window is not None and not mask.causal and mask.bias is None and mask.query_positions is None
    batch, length, heads_, _ = q.shape
    reach = mask.window - 1
    size = max(1, min(reach, length))
    q_BHNCK = _blocks(q.swapaxes(1, 2), size, axis=2)
    k_BHNSK, v_BHNSK = (_around(x.swapaxes(1, 2), size, axis=2) for x in (k, v))
    valid = jnp.ones((batch, length), bool) if mask.key_valid is None else mask.key_valid
    # A global token is seen by all, and only once.
    local = valid if globals_ is None else _replace(valid, globals_, jnp.zeros(globals_.place.shape, bool))
    shape = (*q_BHNCK.shape[:1], *q_BHNCK.shape[2:4], 3 * size)
    distance = jnp.arange(size)[:, None] - (jnp.arange(3 * size)[None] - size)
    allowed = jnp.broadcast_to((jnp.abs(distance) <= reach)[None, None], shape)
    allowed &= jnp.broadcast_to(_around(local, size, axis=1)[:, :, None], shape)
    if mask.query_segments is not None and mask.key_segments is not None:
        of_query = _blocks(mask.query_segments, size, axis=1)[..., None]
        allowed &= _same(of_query, _around(mask.key_segments, size, axis=1)[:, :, None])
    scores = [_scores("bhnck,bhnsk->bhncs", q_BHNCK, k_BHNSK, allowed)]
    if globals_ is not None:
        k_BGHK, v_BGHK = _rows(k, globals_), _rows(v, globals_)
        shape = (*shape[:3], globals_.place.shape[1])
        allowed = jnp.broadcast_to((globals_.present & _rows(valid, globals_))[:, None, None], shape)
        if mask.query_segments is not None and mask.key_segments is not None:
            allowed &= _same(of_query, _rows(mask.key_segments, globals_)[:, None, None])
        scores.append(_scores("bhnck,bghk->bhncg", q_BHNCK, k_BGHK, allowed))
    weights = [w if dropout is None else dropout(w) for w in _softmax(scores)]
    out = jnp.einsum("bhncs,bhnsk->bhnck", weights[0].astype(v.dtype), v_BHNSK)
    if globals_ is not None:
        out = out + jnp.einsum("bhncg,bghk->bhnck", weights[1].astype(v.dtype), v_BGHK)
    return out.reshape(batch, heads_, -1, out.shape[-1])[:, :, :length].swapaxes(1, 2)


def from_globals(
    q_BGHK: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, globals_: Globals, dropout: Dropout | None = None
) -> jax.Array:
    """Attention of the global tokens to every key, (B, G, H, K); the arguments are those of `windowed`."""
    batch, length = k.shape[:2]
    shape = (batch, globals_.place.shape[1], length)
    allowed = jnp.ones(shape, bool)
    if mask.key_valid is not None:
        allowed &= jnp.broadcast_to(mask.key_valid[:, None], shape)
    if mask.query_segments is not None and mask.key_segments is not None:
        allowed &= _same(_rows(mask.query_segments, globals_)[:, :, None], mask.key_segments[:, None])
    (weights,) = _softmax([_scores("bghk,bthk->bhgt", q_BGHK, k, allowed)])
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bhgt,bthk->bghk", weights.astype(v.dtype), v)


def _blocks(x: jax.Array, size: int, *, axis: int) -> jax.Array:
    """T to (N, C) at this axis, padded with zeros."""
    length = x.shape[axis]
    count = -(-length // size)
    x = jnp.pad(x, [(0, count * size - length if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def _around(x: jax.Array, size: int, *, axis: int) -> jax.Array:
    """T to (N, S) at this axis: each block between its neighbours."""
    x = _blocks(x, size, axis=axis)
    count = x.shape[axis]
    x = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)])
    return jnp.concatenate([jax.lax.slice_in_dim(x, i, i + count, axis=axis) for i in range(3)], axis=axis + 1)


def _same(a: jax.Array, b: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    return jnp.broadcast_to(a, shape) == jnp.broadcast_to(b, shape)


def _rows(x: jax.Array, globals_: Globals) -> jax.Array:
    """The global tokens' rows of (B, T, ...), (B, G, ...)."""
    index = globals_.place.reshape(*globals_.place.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _replace(x: jax.Array, globals_: Globals, new: jax.Array) -> jax.Array:
    """(B, T, ...) with the global tokens' rows replaced by (B, G, ...)."""
    present = globals_.present.reshape(*globals_.present.shape, *(1,) * (x.ndim - 2))
    kept = jnp.where(jnp.broadcast_to(present, new.shape), new, _rows(x, globals_))
    return jnp.asarray(x).at[jnp.arange(x.shape[0])[:, None], globals_.place].set(kept, unique_indices=True)


def _scores(product: str, q: jax.Array, k: jax.Array, allowed: jax.Array) -> jax.Array:
    """Masked scores in float32; `allowed` has no heads, which stand second."""
    scores = jnp.einsum(product, q, k, preferred_element_type=jnp.float32)
    return jnp.where(jnp.broadcast_to(allowed[:, None], scores.shape), scores, NEG)


def _softmax(scores: list[jax.Array]) -> list[jax.Array]:
    """One softmax over the last dimensions of all of them together."""
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    raised = [jnp.exp(s - jnp.broadcast_to(jax.lax.stop_gradient(top), s.shape)) for s in scores]
    total = functools.reduce(jnp.add, [jnp.sum(e, axis=-1, keepdims=True) for e in raised])
    return [e / jnp.broadcast_to(total, e.shape) for e in raised]


class LongformerAttention(nn.Module):
    """Self attention of a `Stack`, with projections `query_global`, `key_global`, `value_global` for global tokens.

    `context.mask` has the window, `context.shared` is a `Globals`, or None where no token is global.
    """

    spec: BlockSpec
    layers: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, None]:
        """(B, T, D) to (B, T, D)."""
        spec, mask, globals_ = self.spec, context.mask, context.shared
        if cache is not None:
            raise UserError("Longformer's attention looks both ways: it cannot decode with a cache.")
        dropout: Dropout | None = None
        if self.train and spec.attention_dropout:
            dropout = nn.Dropout(spec.attention_dropout, deterministic=False)
        scale = jnp.asarray(spec.key_size**-0.5 if spec.attention_scale == "sqrt" else 1.0, spec.compute_dtype)
        q, k, v = (heads(self, x, spec.heads, name) for name in ("query", "key", "value"))
        out = windowed(q * scale, k, v, mask, globals_, dropout)
        if globals_ is not None:
            q = heads(self, _rows(x, globals_), spec.heads, "query_global")
            k, v = heads(self, x, spec.heads, "key_global"), heads(self, x, spec.heads, "value_global")
            out = _replace(out, globals_, from_globals(q * scale, k, v, mask, globals_, dropout))
        out = named(self, constrain(out, ("batch", "length", "heads", None)).reshape(*x.shape[:2], -1), "mixed")
        return dense(spec, x.shape[-1], "residual", out.shape[-1], self.layers, "out")(out), None

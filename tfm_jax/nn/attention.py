"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), one function with several implementations.

B batch, T query length, S key length, H query heads, G key/value heads, R = H / G, K head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError, nearest
from tfm_jax.nn.linear import Dense
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import Rotation, rotate
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import constrain

log = logging.getLogger(__name__)
# Finite, so that a query with no allowed key gives a mean over keys and not a NaN.
NEG = -1e30
# Blocks of queries in `chunked`: the masked half is left out at this grain, and each costs compile time.
MIN_BLOCK, MAX_BLOCKS = 64, 8


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, each (B, S, G, K)."""

    k: jax.Array
    v: jax.Array


def _weights(q_BGRTK: jax.Array, k_BGSK: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Softmax in float32 over the keys, (B, G, R, t, s)."""
    b, g, r, t, size = q_BGRTK.shape
    # The query heads that share a key head are rows of one product with it.
    rows = q_BGRTK.reshape(b, g, r * t, size)
    scores = jnp.einsum("bgnk,bgsk->bgns", rows, k_BGSK, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, g, r, t, k_BGSK.shape[2])
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, NEG)
    return jax.nn.softmax(scores, axis=-1)


def _mix(weights_BGRTS: jax.Array, v_BGSK: jax.Array) -> jax.Array:
    """The weighted sums of values, (B, G, R, t, K)."""
    b, g, r, t, s = weights_BGRTS.shape
    rows = weights_BGRTS.reshape(b, g, r * t, s).astype(v_BGSK.dtype)
    return jnp.einsum("bgns,bgsk->bgnk", rows, v_BGSK).reshape(b, g, r, t, v_BGSK.shape[3])


def _grouped(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Heads before length, and query heads by the key head that they share; queries scaled by 1/sqrt(K)."""
    b, t, h, size = q.shape
    groups = k.shape[2]
    q = (q * jnp.asarray(size**-0.5, q.dtype)).reshape(b, t, groups, h // groups, size).transpose(0, 2, 3, 1, 4)
    return q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _ungrouped(out_BGRTK: jax.Array) -> jax.Array:
    b, g, r, t, size = out_BGRTK.shape
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(b, t, g * r, size)


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """Materialises every score: any mask, and dropout on the weights."""
    queries, keys = slice(0, q.shape[1]), slice(0, k.shape[1])
    q, k, v = _grouped(q, k, v)
    weights = _weights(q, k, mask.block(queries, keys))
    if dropout is not None:
        weights = dropout(weights)
    return _ungrouped(_mix(weights, v))


def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """Query blocks, unrolled, so that keys in the future of a whole block are never touched."""
    if dropout is not None:
        raise UserError("model.attention='chunked' has no attention dropout. Use 'xla', or attention_dropout=0.")
    length, size = q.shape[1], k.shape[1]
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    q, k, v = _grouped(q, k, v)
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = 0, min(stop, size) if mask.skips_future else size
        if mask.skips_future and mask.window is not None:
            first = max(0, min(start - mask.window + 1, last - 1))
        weights = _weights(
            q[..., start:stop, :], k[:, :, first:last], mask.block(slice(start, stop), slice(first, last))
        )
        out.append(_mix(weights, v[:, :, first:last]))
    return _ungrouped(jnp.concatenate(out, axis=3))


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """cuDNN's fused attention; the causal mask alone stays inside the kernel, anything else becomes an array."""
    if dropout is not None:
        raise UserError("model.attention='cudnn' has no attention dropout here. Use 'xla', or attention_dropout=0.")
    plain = Mask(causal=mask.causal) == mask
    allowed = None if plain else mask.block(slice(0, q.shape[1]), slice(0, k.shape[1]))
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed[:, None], (q.shape[0], 1, *allowed.shape[1:]))
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, is_causal=plain and mask.causal, implementation="cudnn")


# A kernel for another platform is one more row here and one more case in `choose`.
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {"xla": _xla, "chunked": _chunked, "cudnn": _cudnn}


def available(platform: str) -> tuple[str, ...]:
    return ("xla", "chunked", "cudnn") if platform == "gpu" else ("xla", "chunked")


def choose(spec: BlockSpec, platform: str) -> str:
    """The implementation for a spec on a platform; `auto` is resolved and logged.

    Raises:
      UserError: a name that does not exist, or one that this platform or this spec cannot have.
    """
    here = available(platform)
    if spec.attention != "auto":
        if spec.attention not in IMPLEMENTATIONS:
            raise UserError(
                f"model.attention={spec.attention!r} does not exist.{nearest(spec.attention, ['auto', *here])}"
            )
        if spec.attention not in here:
            raise UserError(
                f"model.attention={spec.attention!r} is not available on {platform}."
                f" Available here: auto, {', '.join(here)}."
            )
        if spec.attention == "cudnn" and spec.dtype == "float32":
            raise UserError("model.attention='cudnn' needs model.dtype='bfloat16' or 'float16'; it is 'float32'.")
        if spec.attention != "xla" and spec.attention_dropout:
            raise UserError(
                f"model.attention={spec.attention!r} has no attention dropout, but model.attention_dropout="
                f"{spec.attention_dropout}. Use model.attention='xla'."
            )
        return spec.attention
    if spec.attention_dropout:
        choice, reason = "xla", "attention_dropout needs the materialised weights"
    elif platform == "cpu":
        choice, reason = "chunked", "on CPU it leaves out the masked half"
    elif platform == "gpu" and spec.dtype != "float32" and _hopper():
        choice, reason = "cudnn", "fused attention wins on compute capability 9.0 and newer"
    else:
        choice, reason = "xla", f"the compiler's own on {platform} with {spec.dtype}"
    _say_once(choice, reason)
    return choice


@functools.cache
def _say_once(choice: str, reason: str) -> None:
    log.info("attention: auto chose %s (%s).", choice, reason)


def _hopper() -> bool:
    return float(getattr(jax.devices()[0], "compute_capability", "0")) >= 9.0


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    implementation: str,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(K) + mask) v.

    Args:
      q: (B, T, H, K); k, v: (B, S, G, K), with G dividing H.
      mask: see `nn.masks`; a query with no allowed key attends evenly.
      implementation: a key of `IMPLEMENTATIONS`.
      dropout: applied to the weights (B, G, R, T, S), `xla` only.

    Returns:
      (B, T, H, K) in v's dtype.
    """
    return IMPLEMENTATIONS[implementation](q, k, v, mask, dropout)


class Attention(nn.Module):
    """Self attention: projections `query`, `key`, `value` (D, heads*K) and `out` (H*K, D)."""

    spec: BlockSpec
    out_std: float
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Mask, rotation: Rotation | None, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) to (B, T, D). With a cache, keys and values are written at `mask.query_positions` first."""
        spec = self.spec

        def project(name: str, heads: int) -> jax.Array:
            y = self._dense(heads * spec.key_size, spec.init_std, name)(x)
            return constrain(y.reshape(*x.shape[:2], heads, spec.key_size), ("batch", "length", "heads", None))

        q, k, v = project("query", spec.heads), project("key", spec.groups), project("value", spec.groups)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Cache(
                *(old.at[rows, mask.query_positions].set(new) for old, new in zip(cache, (k, v), strict=True))
            )
            k, v = cache
        weight_dropout: Any = None
        if self.train and spec.attention_dropout:
            weight_dropout = nn.Dropout(spec.attention_dropout, deterministic=False)
        implementation = choose(spec, jax.default_backend())
        out = attention(q, k, v, mask, implementation=implementation, dropout=weight_dropout)
        out = out.reshape(*x.shape[:2], spec.heads * spec.key_size)
        return self._dense(x.shape[-1], self.out_std, "out")(out), cache

    def _dense(self, features: int, std: float, name: str) -> Dense:
        return Dense(features, self.spec.bias, self.spec.compute_dtype, nn.initializers.normal(std), name=name)

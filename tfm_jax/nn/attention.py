"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), one function with several implementations.

B batch, T query length, S key length, H query heads, G key/value heads, R = H / G, K head size.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError, nearest
from tfm_jax.nn import ring, splash
from tfm_jax.nn.capture import LOOKED, say
from tfm_jax.nn.linear import Dense, HeadNorm
from tfm_jax.nn.masks import NEG, Mask
from tfm_jax.nn.positions import rotate
from tfm_jax.nn.remat import named
from tfm_jax.nn.spec import BlockSpec, Role
from tfm_jax.parallel.devices import platform
from tfm_jax.parallel.sharding import constrain, on_parts, spec_of, ways

log = logging.getLogger(__name__)
# Blocks of queries in `chunked`: the masked half is left out at this grain, and each costs compile time.
MIN_BLOCK, MAX_BLOCKS = 64, 8


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, each (B, S, G, K)."""

    k: jax.Array
    v: jax.Array


class Context(NamedTuple):
    """What all layers of a stack are given alike.

    Attributes:
      mask: of self attention.
      shared: what the stack's kind of attention asks for besides; `Attention` turns by it if it is a `Rotation`.
      source: (B, S, D) states of an encoder; a block that is given them attends to them too.
      source_mask: of that attention.
    """

    mask: Mask
    shared: Any = None
    source: jax.Array | None = None
    source_mask: Mask = Mask()


def written(cache: Cache, k: jax.Array, v: jax.Array, mask: Mask) -> Cache:
    """The cache with the keys and values (B, T, G, K) of new positions, which are the mask's queries."""
    rows = jnp.arange(k.shape[0])[:, None]
    return Cache(*(old.at[rows, mask.query_positions].set(new) for old, new in zip(cache, (k, v), strict=True)))


def _weights(q_BGRTK: jax.Array, k_BGSK: jax.Array, mask: Mask, queries: slice, keys: slice) -> jax.Array:
    """Softmax in float32 over a block of keys, (B, G, R, t, s)."""
    b, g, r, t, size = q_BGRTK.shape
    # The query heads that share a key head are rows of one product with it.
    rows = q_BGRTK.reshape(b, g, r * t, size)
    scores = jnp.einsum("bgnk,bgsk->bgns", rows, k_BGSK, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, g, r, t, k_BGSK.shape[2])
    if mask.bias is not None:
        bias = mask.bias[:, :, queries, keys]
        scores = scores + jnp.broadcast_to(bias.reshape(-1, g, r, *bias.shape[2:]), scores.shape)
    allowed = mask.block(queries, keys)
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, NEG)
    return jax.nn.softmax(scores, axis=-1)


def _mix(weights_BGRTS: jax.Array, v_BGSK: jax.Array) -> jax.Array:
    """The weighted sums of values, (B, G, R, t, K)."""
    b, g, r, t, s = weights_BGRTS.shape
    rows = weights_BGRTS.reshape(b, g, r * t, s).astype(v_BGSK.dtype)
    return jnp.einsum("bgns,bgsk->bgnk", rows, v_BGSK).reshape(b, g, r, t, v_BGSK.shape[3])


def _grouped(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Heads before length, and query heads by the key head that they share; queries scaled."""
    b, t, h, size = q.shape
    groups = k.shape[2]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(b, t, groups, h // groups, size).transpose(0, 2, 3, 1, 4)
    return q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _ungrouped(out_BGRTK: jax.Array) -> jax.Array:
    b, g, r, t, size = out_BGRTK.shape
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(b, t, g * r, size)


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """Materialises every score: any mask, and dropout on the weights."""
    queries, keys = slice(0, q.shape[1]), slice(0, k.shape[1])
    q, k, v = _grouped(q, k, v, scale)
    weights = _weights(q, k, mask, queries, keys)
    if dropout is not None:
        weights = dropout(weights)
    return _ungrouped(_mix(weights, v))


def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """Query blocks, unrolled, so that keys in the future of a whole block are never touched."""
    if dropout is not None:
        raise UserError("model.attention='chunked' has no attention dropout. Use 'xla', or attention_dropout=0.")
    length, size = q.shape[1], k.shape[1]
    block = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
    q, k, v = _grouped(q, k, v, scale)
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = 0, min(stop + mask.offset, size) if mask.skips_future else size
        if mask.window is not None and mask.query_positions is None:
            last = min(last, max(stop + mask.offset + mask.window - 1, 1))
            first = max(0, min(start + mask.offset - mask.window + 1, last - 1))
        weights = _weights(q[..., start:stop, :], k[:, :, first:last], mask, slice(start, stop), slice(first, last))
        out.append(_mix(weights, v[:, :, first:last]))
    return _ungrouped(jnp.concatenate(out, axis=3))


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """cuDNN's fused attention; the causal mask alone stays inside the kernel, anything else becomes an array.

    Its layout of packed documents (offsets of segments) is in no public function of JAX: `jax.nn.dot_product_attention` passes on
    lengths alone.
    """
    if dropout is not None:
        raise UserError("model.attention='cudnn' has no attention dropout here. Use 'xla', or attention_dropout=0.")
    plain = Mask(causal=mask.causal, bias=mask.bias) == mask
    allowed = None if plain else mask.block(slice(0, q.shape[1]), slice(0, k.shape[1]))
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed[:, None], (q.shape[0], 1, *allowed.shape[1:]))
    bias = None if mask.bias is None else mask.bias.astype(q.dtype)
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=allowed, scale=scale, is_causal=plain and mask.causal, implementation="cudnn"
    )


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """JAX's own kernel for TPUs, on each device's rows and heads; see `nn.splash`."""
    if dropout is not None:
        raise UserError("model.attention='splash' has no attention dropout. Use 'xla', or attention_dropout=0.")
    if reason := splash.unfit(q, k, mask):
        raise UserError(f"model.attention='splash' is not for this: {reason}. Use 'auto'.")
    q = q * jnp.asarray(scale, q.dtype)
    return _by_device(functools.partial(splash.attend, interpret=platform() != "tpu"), q, k, v, mask)


def _ring(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float, dropout: Callable[[jax.Array], jax.Array] | None
) -> jax.Array:
    """Ring attention, for a length that the mesh splits; see `nn.ring`."""
    where = f"mesh.context={ways('length')} splits the length, and ring attention has no"
    if dropout is not None:
        raise UserError(f"{where} attention dropout. Set model.attention_dropout=0.")
    if mask.bias is not None:
        raise UserError(f"{where} bias of scores, as relative positions are (T5). Use mesh.fsdp or mesh.tensor.")
    if mask.query_positions is not None or mask.offset:
        raise UserError(f"{where} queries that stand behind others' keys. Use mesh.fsdp or mesh.tensor.")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        return _ungrouped(ring.attend(*_grouped(q, k, v, scale), mask))

    return _by_device(attend, q, k, v, mask)


def _by_device(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """`attend(q, k, v, mask)` on each device's rows, part of the length and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, mask)
    heads_, groups, split = q.shape[2], k.shape[2], ways("heads")
    if heads_ % split == 0 and groups % split:
        # Each device wants the key heads of its own query heads, which are fewer than devices.
        k, v = (jnp.repeat(x, split // math.gcd(groups, split), axis=2) for x in (k, v))
    rows, whole = ("batch", "length"), ("batch", "length", "heads", None)
    masks: dict[str, Any] = {
        name: None if x is None else spec_of(rows[: x.ndim], x.shape) for name, x in mask.arrays().items()
    }
    places = (*(spec_of(whole, x.shape) for x in (q, k, v)), dataclasses.replace(mask, **masks))
    out: jax.Array = on_parts(attend, places, places[0])(q, k, v, mask)
    return out


# A kernel for another platform is one more row here and one more case in `choose`.
IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla,
    "chunked": _chunked,
    "cudnn": _cudnn,
    "splash": _splash,
    "ring": _ring,
}
_ONLY_ON = {"cudnn": "gpu", "splash": "tpu"}


def available(platform: str) -> tuple[str, ...]:
    """What a config may name; `ring` is what `auto` is where the length is split."""
    return tuple(name for name in IMPLEMENTATIONS if name != "ring" and _ONLY_ON.get(name, platform) == platform)


def check(spec: BlockSpec, where: str, *, split: int = 1) -> None:
    """Refuse an implementation that does not exist, or that this platform or this spec cannot have.

    Args:
      split: over how many devices the length is split.

    Raises:
      UserError: naming the nearest that there is.
    """
    name, here = spec.attention, available(where)
    if name != "auto":
        if name not in IMPLEMENTATIONS or name == "ring":
            raise UserError(f"model.attention={name!r} does not exist.{nearest(name, ['auto', *here])}")
        if name not in here:
            raise UserError(
                f"model.attention={name!r} is not available on {where}. Available here: auto, {', '.join(here)}."
            )
        if split > 1:
            raise UserError(
                f"mesh.context={split} splits the length, and model.attention={name!r} needs it whole. Use model.attention='auto',"
                " which is ring attention there."
            )
        if name == "cudnn" and spec.dtype == "float32":
            raise UserError("model.attention='cudnn' needs model.dtype='bfloat16' or 'float16'; it is 'float32'.")
        if name != "xla" and spec.attention_dropout:
            raise UserError(
                f"model.attention={name!r} has no attention dropout, but model.attention_dropout="
                f"{spec.attention_dropout}. Use model.attention='xla'."
            )
    elif split > 1 and spec.attention_dropout:
        raise UserError(
            f"mesh.context={split} splits the length, and ring attention has no attention dropout, but"
            f" model.attention_dropout={spec.attention_dropout}. Set it to 0."
        )


def choose(spec: BlockSpec, where: str, *, biased: bool = False, split: int = 1, unfit: str | None = None) -> str:
    """The implementation for a spec on a platform; `auto` is resolved and logged.

    Args:
      biased: whether the scores get a bias, for whose gradient cuDNN wants even lengths: `auto` leaves it to the compiler.
      split: over how many devices the length is split.
      unfit: why `splash` cannot be.

    Raises:
      UserError: see `check`.
    """
    check(spec, where, split=split)
    if spec.attention != "auto":
        return spec.attention
    if split > 1:
        choice, reason = "ring", f"mesh.context={split} splits the length"
    elif spec.attention_dropout:
        choice, reason = "xla", "attention_dropout needs the materialised weights"
    elif where == "cpu":
        choice, reason = "chunked", "on CPU it leaves out the masked half"
    elif where == "tpu":
        choice, reason = ("splash", "the kernel never writes the scores to memory") if unfit is None else ("xla", unfit)
    elif where == "gpu" and spec.dtype != "float32" and not biased and _hopper():
        choice, reason = "cudnn", "fused attention wins on compute capability 9.0 and newer"
    else:
        choice, reason = "xla", f"the compiler's own on {where} with {spec.dtype}"
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
    scale: float | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(scale q k^T + mask) v.

    Args:
      q: (B, T, H, K); k, v: (B, S, G, K), with G dividing H.
      mask: see `nn.masks`; a query with no allowed key attends evenly.
      scale: 1/sqrt(K) if None.
      implementation: a key of `IMPLEMENTATIONS`.
      dropout: applied to the weights (B, G, R, T, S), `xla` only.

    Returns:
      (B, T, H, K) in v's dtype.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q, k, v, mask, scale, dropout)


def scores(q: jax.Array, k: jax.Array, spec: BlockSpec, mask: Mask) -> jax.Array:
    """Scaled q k^T of (B, T, H, K) and (B, S, G, K), (B, H, T, S) float32, without bias; 0 where the mask hides the key."""
    b, t, h, size = q.shape
    if (split := ring.parts(t)) > 1:
        raise UserError(f"mesh.context={split} splits the length, so nobody has all attention scores. Use mesh.fsdp.")
    grouped = (q * (size**-0.5 if spec.attention_scale == "sqrt" else 1.0)).reshape(b, t, k.shape[2], -1, size)
    found = jnp.einsum("btgrk,bsgk->bgrts", grouped, k, preferred_element_type=jnp.float32)
    found, allowed = found.reshape(b, h, t, k.shape[1]), mask.block(slice(0, t), slice(0, k.shape[1]))
    return found if allowed is None else jnp.where(allowed[:, None], found, 0.0)


def looked(q: jax.Array, k: jax.Array, mask: Mask, spec: BlockSpec) -> jax.Array:
    """What queries (B, T, H, K) take of keys (B, S, G, K): (B, H, T, S) float32, each row adding up to 1."""
    if (split := ring.parts(q.shape[1])) > 1:
        raise UserError(f"mesh.context={split} splits the length, so nobody has all attention weights. Use mesh.fsdp.")
    queries, keys = slice(0, q.shape[1]), slice(0, k.shape[1])
    q_BGRTK, k_BGSK, _ = _grouped(q, k, k, q.shape[-1] ** -0.5 if spec.attention_scale == "sqrt" else 1.0)
    found = _weights(q_BGRTK, k_BGSK, mask, queries, keys)
    return found.reshape(q.shape[0], q.shape[2], *found.shape[3:])


def dense(spec: BlockSpec, features: int, role: Role, fan_in: int, layers: int, name: str) -> Dense:
    """A projection of a block, initialised as its spec says."""
    std = spec.std(role, fan_in, features, layers)
    gradient_dtype = None if spec.gradient_dtype is None else jnp.dtype(spec.gradient_dtype)
    init = nn.initializers.normal(std)
    return Dense(features, spec.bias, spec.compute_dtype, init, gradient_dtype, spec.operand_dtype, name=name)


class Attention(nn.Module):
    """Self attention: projections `query`, `key`, `value` (D, heads*K) and `out` (H*K, D)."""

    spec: BlockSpec
    layers: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) to (B, T, D). With a cache, keys and values are written at `mask.query_positions` first."""
        spec, mask, turn = self.spec, context.mask, context.shared
        q = heads(self, x, spec.heads, "query")
        k, v = heads(self, x, spec.groups, "key"), heads(self, x, spec.groups, "value")
        if spec.qk_norm == "head":
            q, k = HeadNorm(spec, name="query_norm")(q), HeadNorm(spec, name="key_norm")(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            cache = written(cache, k, v, mask)
            k, v = cache
        say(self, "scores", lambda: scores(q, k, spec, mask))
        say(self, "weights", lambda: looked(q, k, mask, spec), LOOKED)
        return mixed(self, q, k, v, mask, x.shape[-1]), cache


class CrossAttention(nn.Module):
    """Attention from a decoder to an encoder's states, with the same projections as `Attention`."""

    spec: BlockSpec
    layers: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context, cache: Cache | None) -> tuple[jax.Array, Cache]:
        """(B, T, D) to (B, T, D), and the keys and values (B, S, G, K) of the states.

        They are made from `context.source`; where that is None they are the cache's.
        """
        spec = self.spec
        q = heads(self, x, spec.heads, "query")
        if context.source is not None:
            k, v = (heads(self, context.source, spec.groups, name) for name in ("key", "value"))
            cache = Cache(k, v)
        assert cache is not None, "A decoder needs the encoder's states, or a cache of them."
        said, mask = cache, context.source_mask
        say(self, "weights", lambda: looked(q, said.k, mask, spec), LOOKED)
        return mixed(self, q, cache.k, cache.v, mask, x.shape[-1]), cache


class AttentionModule(Protocol):
    """What `heads` and `mixed` need of the module that calls them."""

    spec: BlockSpec
    layers: int
    train: bool
    name: str | None


def heads(module: AttentionModule, x: jax.Array, count: int, name: str) -> jax.Array:
    """Project (B, T, D) to (B, T, count, K) with a Dense of this name in the calling module."""
    spec = module.spec
    role: Role = "query" if name == "query" else "other"
    y = dense(spec, count * spec.key_size, role, x.shape[-1], module.layers, name)(x)
    return constrain(y.reshape(*x.shape[:2], count, spec.key_size), ("batch", "length", "heads", None))


def mixed(module: AttentionModule, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, width: int) -> jax.Array:
    """Attention and the projection `out` of the calling module, (B, T, width)."""
    spec = module.spec
    weight_dropout: Any = None
    if module.train and spec.attention_dropout:
        weight_dropout = nn.Dropout(spec.attention_dropout, deterministic=False)
    split, biased = ring.parts(q.shape[1]), mask.bias is not None
    implementation = choose(spec, platform(), biased=biased, split=split, unfit=splash.unfit(q, k, mask))
    scale = None if spec.attention_scale == "sqrt" else 1.0
    out = attention(q, k, v, mask, scale=scale, implementation=implementation, dropout=weight_dropout)
    out = named(module, out.reshape(*q.shape[:2], spec.heads * spec.key_size), "mixed")
    return dense(spec, width, "residual", out.shape[-1], module.layers, "out")(out)

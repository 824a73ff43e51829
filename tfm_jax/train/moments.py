"""An update rule's moments in fewer bytes than float32's, between one update and the next.

`bfloat16` is 2 bytes a number, `int8` 1.125: a byte and, for every `BLOCK` numbers of the last dimension, the float32 magnitude of
the largest (block-wise quantisation, Dettmers et al. 2022, section 2.1). A code is not linear in its number: the first moment goes
by its square root, the second, which is never negative and whose root divides the update, by its fourth root. That spaces codes
much like their dynamic tree (section 1.3), and needs no table to look up, which is slow on a TPU.

Rounding is stochastic, so that a number is right on average. To the nearest it would stand still: with b2 = 0.999 a second moment
moves by a thousandth of itself, and half a step is 2 thousandths in bfloat16.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tfm_jax.paths import flatten, map_with_path

Moments = Literal["float32", "bfloat16", "int8"]
# As small as those of the OCP's microscaling formats: a dimension that is split many ways still splits into whole blocks.
BLOCK = 32
# Arrays with fewer elements stay float32: norms and biases, all together a thousandth of a model.
MIN_SIZE = 4096
# The field of an optax state that a path goes through first.
_FIELD = re.compile(r"(?:^|/)(mu|nu)/")


class Stored(NamedTuple):
    """Attributes:
    updates: () int32, how many so far, of which the rounding's randomness is a function.
    values: the rule's state, its moments in fewer bytes, each in its parameter's shape.
    scales: the same tree, of each moment in int8 a (.., blocks) float32 array and nothing else.
    """

    updates: jax.Array
    values: Any
    scales: Any


def stored(rule: optax.GradientTransformation, moments: Moments) -> optax.GradientTransformation:
    """The rule, its moments kept so between updates; each update itself is in float32."""
    if moments == "float32":
        return rule

    def pack(count: jax.Array, state: Any) -> Stored:
        key = jax.random.fold_in(jax.random.key(0), count)
        values, scales = flatten(state), dict[str, Any]()
        for i, (path, x) in enumerate(values.items()):
            field = _FIELD.search(path)
            if field is None or x.dtype != jnp.float32 or x.size < MIN_SIZE or x.shape[-1] < BLOCK:
                continue
            bits = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16)
            if moments == "bfloat16":
                values[path] = to_bfloat16(x, bits)
            else:
                values[path], scales[path] = to_codes(x, bits, second=field[1] == "nu")
        none = optax.MaskedNode()
        return Stored(
            count,
            map_with_path(lambda path, _: values[path], state),
            map_with_path(lambda path, _: scales.get(path, none), state),
        )

    def unpack(state: Stored) -> Any:
        def leaf(x: jax.Array, scale: Any) -> jax.Array:
            if x.dtype == jnp.bfloat16:
                return x.astype(jnp.float32)
            return x if isinstance(scale, optax.MaskedNode) else from_codes(x, scale)

        return jax.tree.map(leaf, state.values, state.scales)

    def init(params: Any) -> Stored:
        return pack(jnp.zeros((), jnp.int32), rule.init(params))

    def update(updates: Any, state: Stored, params: Any = None) -> tuple[Any, Stored]:
        updates, new = rule.update(updates, unpack(state), params)
        return updates, pack(optax.safe_increment(state.updates), new)

    return optax.GradientTransformation(init, update)


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """One of the two neighbours of each number, each as likely as it is near.

    Args:
      x: float32.
      bits: uint16 of the same shape, random.
    """
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    # What is left has 16 zeros at its end: a bfloat16.
    return jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def to_codes(x: jax.Array, bits: jax.Array, *, second: bool) -> tuple[jax.Array, jax.Array]:
    """Codes of one byte in the array's shape, and the largest magnitude of each block (.., blocks) float32, which is exact.

    Args:
      x: float32, of at least one dimension.
      bits: uint16 of the same shape, random.
      second: whether these are second moments: uint8, of which none that was above 0 becomes 0, since it divides; else int8.
    """
    levels, power = (255, 4) if second else (127, 2)
    blocks = -(-x.shape[-1] // BLOCK)
    padded = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 1) + [(0, blocks * BLOCK - x.shape[-1])])
    scale = jnp.max(padded.reshape(*x.shape[:-1], blocks, BLOCK), axis=-1)
    share = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0).repeat(BLOCK, axis=-1)[..., : x.shape[-1]]
    root = jnp.sqrt(jnp.sqrt(share)) if second else jnp.sqrt(share)
    below = jnp.minimum(jnp.floor(root * levels), levels - 1)
    low, high = (below / levels) ** power, ((below + 1) / levels) ** power
    codes = below + (bits.astype(jnp.float32) / 2**16 < (share - low) / (high - low))
    if second:
        return jnp.where(x > 0, jnp.maximum(codes, 1), 0).astype(jnp.uint8), scale
    return (jnp.sign(x) * codes).astype(jnp.int8), scale


def from_codes(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """The numbers that codes stand for, float32."""
    spread = scale.repeat(BLOCK, axis=-1)[..., : codes.shape[-1]]
    if codes.dtype == jnp.uint8:
        return (codes.astype(jnp.float32) / 255) ** 4 * spread
    share = codes.astype(jnp.float32) / 127
    return share * jnp.abs(share) * spread

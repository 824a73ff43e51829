"""Attention over a length that the mesh axis `context` splits: keys and values go round a ring (Liu et al. 2023, arXiv 2310.01889).

With n devices the length has 2n blocks, and device j holds blocks j and 2n-1-j, so that under a causal mask all have as much
to do in every turn (the balance of Brandon et al. 2023, arXiv 2311.09431, with two blocks instead of stripes). `balanced` brings
a stack's input into that order and `restored` its output out of it, so that neither data nor model nor loss ever sees it, and
that costs two exchanges a stack where permuting inside attention would cost four a layer.

B batch, T queries and S keys of a block, G key heads, R query heads of each, K head size; a 2 in front stands for the two blocks
of a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tfm_jax.errors import UserError
from tfm_jax.nn.masks import NEG, Mask
from tfm_jax.parallel.sharding import ways

AXIS = "context"
# Queries whose scores exist at a time, so that a block's memory does not grow with its square.
QUERIES = 512


def parts(length: int) -> int:
    """Over how many devices a length is split: 1 without a mesh that does, and for a single position.

    Raises:
      UserError: a length that does not divide.
    """
    n = ways("length")
    if n == 1 or length == 1:
        return 1
    if length % (2 * n):
        near = sorted({max(2 * n, length // (2 * n) * 2 * n), (length // (2 * n) + 1) * 2 * n})
        raise UserError(
            f"mesh.context={n} splits a sequence into {2 * n} blocks, and {length} positions are not a multiple of that."
            f" Nearest that are: {', '.join(map(str, near))}."
        )
    return n


def balanced(x: jax.Array) -> jax.Array:
    """(B, T, ...) in order to (B, T, ...) as the ring wants it; unchanged where nothing splits T."""
    return _exchanged(x, back=False)


def restored(x: jax.Array) -> jax.Array:
    """The inverse of `balanced`."""
    return _exchanged(x, back=True)


def _exchanged(x: jax.Array, *, back: bool) -> jax.Array:
    n = parts(x.shape[1])
    if n == 1:
        return x

    def sent(block: jax.Array, odd: int) -> jax.Array:
        homes = [min(2 * i + odd, 2 * n - 1 - 2 * i - odd) for i in range(n)]
        moved: jax.Array = jax.lax.ppermute(
            block, AXIS, [(home, i) if back else (i, home) for i, home in enumerate(homes)]
        )
        return moved

    def move(x: jax.Array) -> jax.Array:
        # A device's blocks are an even one and an odd one in either order: in sequence the even one first, balanced on every
        # other device the odd one.
        odd_first, blocks = jax.lax.axis_index(AXIS) % 2 == 1, _two(x, 1)
        blocks = jnp.where(odd_first, blocks[::-1], blocks) if back else blocks
        blocks = jnp.stack([sent(blocks[0], 0), sent(blocks[1], 1)])
        return _one(blocks if back else jnp.where(odd_first, blocks[::-1], blocks), 1)

    # The other axes stay the partitioner's, which splits rows as it likes.
    where = P(None, AXIS)
    out: jax.Array = jax.shard_map(move, in_specs=(where,), out_specs=where, axis_names={AXIS})(x)
    return out


class Keys(NamedTuple):
    """What goes round: keys and values, and who may see them."""

    k_2BGSK: jax.Array
    v_2BGSK: jax.Array
    valid_2BS: jax.Array | None
    segments_2BS: jax.Array | None


class Softmax(NamedTuple):
    """A softmax over the keys so far (Milakov and Gimelshein 2018): their highest score, and sums of exp(score - top) by itself
    and times the values. Float32."""

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


class Pair(NamedTuple):
    """A block of queries and a block of keys that it sees, each the first or second of its device."""

    query: Any
    key: Any
    causal: bool


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    """softmax(q k^T + mask) v of a device's queries with the keys of all, inside `jax.shard_map`.

    The backward pass sends keys and values round once more, and their gradients with them, so that what is kept grows with the
    length and not with its square.

    Args:
      q: (B, G, R, 2T, K), scaled; k, v: (B, G, 2S, K): this device's, balanced.
      mask: its arrays are this device's too. Without bias, positions of queries and offset. A query with no allowed key gets
        the mean of some values, and gives no gradient.

    Returns:
      (B, G, R, 2T, K) in v's dtype.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> tuple[jax.Array, Any]:
    queries = _two(q, 3)
    rows = queries.shape[:-1]
    state = Softmax(jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(queries.shape, jnp.float32))

    def work(state: Softmax, keys: Keys, turn: Any) -> Softmax:
        for pair in _pairs(mask, turn):
            given, seen = _at((state, queries), pair.query), _at(keys, pair.key)
            _, new = _in_pieces(_folded, None, given, _block_mask(pair, turn, mask, keys), seen)
            state = jax.tree.map(lambda whole, part, i=pair.query: whole.at[i].set(part), state, new)
        return state

    state = _round(work, state, _keys(k, v, mask), mask)
    out = _one(state.mixed / state.total[..., None], 3).astype(v.dtype)
    return out, (q, k, v, mask, out, _one(state.top + jnp.log(state.total), 3))


def _backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, mask, out, lse = kept
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries = tuple(_two(x, 3) for x in (q, lse, delta, d_out))
    nothing = jnp.zeros((2, *k.shape[:2], k.shape[2] // 2, k.shape[3]), jnp.float32)

    def work(state: Any, keys: Keys, turn: Any) -> Any:
        d_q, d_keys = state
        # Apart from those that come from other devices, which are on their way meanwhile.
        own = (nothing, nothing)
        for pair in _pairs(mask, turn):
            given, seen = _at(queries, pair.query), _at(keys, pair.key)
            new, d_block = _in_pieces(_pulled, _at(own, pair.key), given, _block_mask(pair, turn, mask, keys), seen)
            own = jax.tree.map(lambda whole, part, i=pair.key: whole.at[i].set(part), own, new)
            d_q = d_q.at[pair.query].add(d_block)
        return d_q, jax.tree.map(jnp.add, d_keys, own)

    start = (jnp.zeros(queries[0].shape, jnp.float32), (nothing, nothing))
    # Gradients travel with their keys and values, and home at last.
    d_q, d_keys = _round(work, start, _keys(k, v, mask), mask, sent=lambda s, steps: (s[0], _sent(s[1], steps)))
    d_k, d_v = (_one(x, 2) for x in d_keys)
    return _one(d_q, 3).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend.defvjp(_forward, _backward)


def _folded(nothing: None, given: Any, mask: Mask, seen: Keys) -> tuple[None, Softmax]:
    """The softmax of some queries over one more block of keys."""
    old, q = given
    scores, _ = _scores(q, seen, mask)
    top = jnp.maximum(old.top, jnp.max(scores, axis=-1))
    weights, kept = jnp.exp(scores - top[..., None]), jnp.exp(old.top - top)
    mixed = _product("bgrts,bgsk->bgrtk", weights.astype(seen.v_2BGSK.dtype), seen.v_2BGSK)
    return nothing, Softmax(top, old.total * kept + jnp.sum(weights, axis=-1), old.mixed * kept[..., None] + mixed)


def _pulled(sums: Any, given: Any, mask: Mask, seen: Keys) -> tuple[Any, jax.Array]:
    """The gradients of a block of keys and values, to which is added what some queries give, and of these queries. Float32."""
    (q, lse, delta, d_out), (d_k, d_v) = given, sums
    scores, allowed = _scores(q, seen, mask)
    weights = jnp.exp(scores - lse[..., None])
    weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
    d_weights = _product("bgrtk,bgsk->bgrts", d_out, seen.v_2BGSK)
    d_scores = (weights * (d_weights - delta[..., None])).astype(q.dtype)
    d_k = d_k + _product("bgrts,bgrtk->bgsk", d_scores, q)
    d_v = d_v + _product("bgrts,bgrtk->bgsk", weights.astype(d_out.dtype), d_out)
    return (d_k, d_v), _product("bgrts,bgsk->bgrtk", d_scores, seen.k_2BGSK)


def _product(spelling: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spelling, a, b, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, seen: Keys, mask: Mask) -> tuple[jax.Array, jax.Array | None]:
    """(B, G, R, T, S) float32 of one block of keys, and which of them are allowed."""
    scores = _product("bgrtk,bgsk->bgrts", q, seen.k_2BGSK)
    allowed = mask.block(slice(0, scores.shape[-2]), slice(0, scores.shape[-1]))
    if allowed is None:
        return scores, None
    allowed = jnp.broadcast_to(allowed[:, None, None], scores.shape)
    return jnp.where(allowed, scores, NEG), allowed


def _round(
    work: Callable[..., Any],
    state: Any,
    keys: Keys,
    mask: Mask,
    sent: Callable[[Any, int], Any] = lambda state, _: state,
) -> Any:
    """`work(state, keys, turn) -> state` in each turn, with the keys of the device so many behind.

    The next turn's keys are sent off before a turn's work, so that they travel meanwhile.

    Args:
      sent: the state as it is when the keys have gone so many steps.
    """
    n, at = jax.lax.axis_size(AXIS), 0
    runs = _runs(n, keys.k_2BGSK.shape[3], mask.window)
    # Nothing is sent on after the last turn.
    for (first, last), (following, _) in zip(runs, [*runs[1:], runs[-1][::-1]], strict=True):
        if first < last:
            state = sent(state, first - at - 1)

            def step(carry: Any, turn: jax.Array) -> tuple[Any, None]:
                state, keys = carry
                onward = _sent(keys, 1)
                return (work(sent(state, 1), keys, turn), onward), None

            (state, keys), _ = jax.lax.scan(step, (state, keys), jnp.arange(first, last))
            at = last - 1
        onward = _sent(keys, following - last)
        state, keys, at = work(sent(state, last - at), keys, last), onward, last
    return sent(state, n - at)


def _runs(n: int, size: int, window: int | None) -> list[tuple[int, int]]:
    """The turns of n that are worked in, as first and last of a run without gaps; the first turn is one by itself.

    A window hides all blocks from all queries in some: the nearest positions of two blocks of a size that are d blocks apart are
    (d - 1) size + 1 apart, and the nearest blocks of devices that are d apart on the ring are d blocks apart.
    """
    near = n if window is None else max(0, (window - 2) // size + 1)
    if near >= n // 2:
        return [(0, 0), (1, n - 1)]
    return [(0, 0), (1, near), (n - near, n - 1)] if near else [(0, 0)]


def _sent(tree: Any, steps: int) -> Any:
    """Each device's to the one so many ahead."""
    n = jax.lax.axis_size(AXIS)
    return tree if steps % n == 0 else jax.lax.ppermute(tree, AXIS, [(i, (i + steps) % n) for i in range(n)])


def _pairs(mask: Mask, turn: Any) -> list[Pair]:
    """The blocks to be worked on in a turn. Under a causal mask two whole ones, whichever device this is, and of its own keys
    one whole and two halves: second blocks are never seen by first ones, and first ones always by second ones."""
    if not mask.skips_future:
        return [Pair(query, key, mask.causal) for query in (0, 1) for key in (0, 1)]
    if isinstance(turn, int) and turn == 0:
        return [Pair(0, 0, True), Pair(1, 0, False), Pair(1, 1, True)]
    # Where the keys come from a later device (we are too near the start for one so far behind), second blocks are in order.
    later = (jax.lax.axis_index(AXIS) < turn).astype(jnp.int32)
    return [Pair(1, 0, False), Pair(later, later, False)]


def _block_mask(pair: Pair, turn: Any, mask: Mask, keys: Keys) -> Mask:
    """The mask between two blocks, with positions counted from the first of these keys."""
    n, here, size = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS), keys.k_2BGSK.shape[3]
    places, prefix = None, None
    if pair.causal or mask.window is not None:
        first = _number((here - turn) % n, pair.key, n) * size
        places = (_number(here, pair.query, n) * size - first + jnp.arange(size))[None]
        prefix = None if mask.prefix is None else mask.prefix - first
    segments = None if mask.query_segments is None else _two(mask.query_segments, 1)
    return Mask(
        causal=pair.causal,
        window=mask.window,
        query_positions=places,
        prefix=prefix,
        key_valid=_at(keys.valid_2BS, pair.key),
        query_segments=_at(segments, pair.query),
        key_segments=_at(keys.segments_2BS, pair.key),
    )


def _number(device: jax.Array, block: Any, n: int) -> jax.Array:
    """Which of the 2n blocks a device's first or second is."""
    return jnp.where(block == 0, device, 2 * n - 1 - device)


def _in_pieces(function: Callable[..., Any], carry: Any, given: Any, mask: Mask, seen: Keys) -> Any:
    """`function(carry, given, mask, seen) -> (carry, out)` over a block of queries, some at a time, which `given` and `out` have in
    their dimension 3."""
    length = jax.tree.leaves(given)[0].shape[3]
    count = next(c for c in range(-(-length // QUERIES), length + 1) if length % c == 0)
    of_queries = (mask.query_positions, mask.query_segments)

    def one(carry: Any, xs: Any) -> Any:
        given, (places, segments) = xs
        own = dataclasses.replace(mask, query_positions=places, query_segments=segments)
        return function(carry, given, own, seen)

    carry, out = jax.lax.scan(one, carry, (_split(given, 3, count), _split(of_queries, 1, count)))
    return carry, jax.tree.map(lambda x: _one(x, 3), out)


def _keys(k: jax.Array, v: jax.Array, mask: Mask) -> Keys:
    return Keys(
        _two(k, 2), _two(v, 2), *(None if x is None else _two(x, 1) for x in (mask.key_valid, mask.key_segments))
    )


def _two(x: jax.Array, axis: int) -> jax.Array:
    """A device's two blocks in front."""
    halves: jax.Array = _split(x, axis, 2)
    return halves


def _split(tree: Any, axis: int, count: int) -> Any:
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(split, tree)


def _one(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_two` and `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _at(tree: Any, block: Any) -> Any:
    return jax.tree.map(lambda x: x[block], tree)

"""Masks against loops over every (row, query, key)."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.nn.masks import Mask

B, T, S = 2, 7, 7
POSITIONS = jnp.array([[3, 4, 5, 6, 0, 1, 2], [0, 0, 1, 1, 2, 6, 6]], jnp.int32)
FAR_VALID = jnp.arange(S + 5)[None] < jnp.array([[12], [3]])
VALID = jnp.arange(S)[None] < jnp.array([[5], [2]])
SEGMENTS = jnp.array([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, 4, 4, 1]], jnp.int32)
CASES = [
    dict(causal=causal, window=window, query_positions=positions, key_valid=valid, query_segments=s, key_segments=s)
    for causal, window, positions, valid, s in itertools.product(
        (False, True), (None, 1, 3), (None, POSITIONS), (None, VALID), (None, SEGMENTS)
    )
]
# A beginning that is seen from everywhere.
PREFIX = [
    dict(causal=True, window=window, prefix=jnp.array([4, 1]), query_positions=positions, key_valid=valid)
    for window, positions, valid in itertools.product((None, 3), (None, POSITIONS), (None, VALID))
]
# More keys than queries, which stand behind the first few.
BEHIND = [
    dict(causal=causal, window=window, offset=offset, key_valid=valid)
    for causal, window, offset, valid in itertools.product((False, True), (None, 1, 3), (1, 5), (None, FAR_VALID))
]


def slow(mask: Mask, size: int = S) -> np.ndarray:
    allowed = np.ones((B, T, size), bool)
    for b, t, s in itertools.product(range(B), range(T), range(size)):
        at = mask.offset + t if mask.query_positions is None else int(mask.query_positions[b, t])
        if mask.causal and s > at and (mask.prefix is None or s >= mask.prefix[b]):
            allowed[b, t, s] = False
        if mask.window is not None and abs(s - at) >= mask.window:
            allowed[b, t, s] = False
        if mask.key_valid is not None and not mask.key_valid[b, s]:
            allowed[b, t, s] = False
        if mask.query_segments is not None and mask.query_segments[b, t] != mask.key_segments[b, s]:
            allowed[b, t, s] = False
    return allowed


def test_every_combination_against_loops():
    for case in CASES + PREFIX:
        mask = Mask(**case)
        block = mask.block(slice(0, T), slice(0, S))
        got = np.ones((B, T, S), bool) if block is None else np.broadcast_to(block, (B, T, S))
        np.testing.assert_array_equal(got, slow(mask), err_msg=str(case))


def test_queries_behind_a_memory():
    for case in BEHIND:
        mask = Mask(**case)
        want = slow(mask, S + 5)
        for queries, keys in ((slice(0, T), slice(0, S + 5)), (slice(3, 6), slice(2, 11))):
            block = mask.block(queries, keys)
            shape = (B, queries.stop - queries.start, keys.stop - keys.start)
            got = np.ones(shape, bool) if block is None else np.broadcast_to(block, shape)
            np.testing.assert_array_equal(got, want[:, queries, keys], err_msg=str(case))
    assert Mask(causal=True, offset=5).skips_future


@pytest.mark.parametrize(
    ("queries", "keys"), [(slice(2, 5), slice(0, 5)), (slice(3, 7), slice(2, 7)), (slice(6, 7), slice(0, 7))]
)
def test_a_block_is_a_part_of_the_whole(queries, keys):
    for case in CASES + PREFIX:
        mask = Mask(**case)
        if (part := mask.block(queries, keys)) is not None:
            part = np.broadcast_to(part, (B, queries.stop - queries.start, keys.stop - keys.start))
            np.testing.assert_array_equal(part, slow(mask)[:, queries, keys], err_msg=str(case))


def test_nothing_masked_is_none():
    assert Mask().block(slice(0, T), slice(0, S)) is None


def test_segments_need_both_sides():
    assert Mask(query_segments=SEGMENTS).block(slice(0, T), slice(0, S)) is None


def test_batch_dimension_is_one_unless_rows_differ():
    assert Mask(causal=True).block(slice(0, T), slice(0, S)).shape == (1, T, S)
    assert Mask(causal=True, key_valid=VALID).block(slice(0, T), slice(0, S)).shape == (B, T, S)


def test_the_future_is_skipped_only_when_positions_are_indices():
    assert Mask(causal=True).skips_future
    assert not Mask().skips_future
    assert not Mask(causal=True, prefix=jnp.array([4, 1])).skips_future
    assert not Mask(causal=True, query_positions=POSITIONS).skips_future

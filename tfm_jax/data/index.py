"""Which record a batch row holds: arithmetic on (seed, step) alone, so there is no iterator state to save.

An epoch's order is a Feistel network over the next power of two, walked along its cycles until it lands inside
[0, n) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 3.3): O(1) memory for any n.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tfm_jax.data.types import Rows

MAX_RECORDS = 2**40
ROUNDS = 8

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class EpochRecords(NamedTuple):
    """For every row: the epoch it belongs to and its record in [0, n), both int64."""

    epoch: np.ndarray
    record: np.ndarray


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of uint64 with good avalanche."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_ints(*parts: int | np.ndarray) -> np.ndarray:
    """A uint64 hash of integers, elementwise over arrays; the order of the parts matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = np.atleast_1d(np.asarray(part, dtype=np.int64)).view(np.uint64)
        state = _mix((state + _GOLDEN) ^ _mix(word + _GOLDEN))
    return state


def permute(index: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """A permutation of [0, n) applied to `index`; `key` is one integer or one for every index.

    For n below about 16 only some of the n! orders can come up: there are few bits to mix.
    """
    if not 1 <= n <= MAX_RECORDS:
        raise ValueError(f"n is {n}; it must lie in [1, 2**40].")
    index = np.asarray(index, dtype=np.int64)
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"An index lies outside [0, {n}).")
    bits = (n - 1).bit_length()
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = (np.uint64((1 << int(width)) - 1) for width in (low, high))
    keys = np.broadcast_to(hash_ints(key), index.shape if index.ndim else (1,)).ravel()
    out = index.ravel().astype(np.uint64)
    pending = np.arange(out.size)
    while pending.size:
        x, round_key = out[pending], keys[pending]
        left, right = x >> low, x & low_mask
        for _ in range(ROUNDS // 2):
            round_key = round_key + _GOLDEN
            left = left ^ (_mix(right ^ round_key) & high_mask)
            round_key = round_key + _GOLDEN
            right = right ^ (_mix(left ^ round_key) & low_mask)
        out[pending] = left << low | right
        pending = pending[out[pending] >= np.uint64(n)]
    return out.astype(np.int64).reshape(index.shape)


def epoch_records(step: int, batch_size: int, n: int, seed: int, rows: Rows = slice(None)) -> EpochRecords:
    """The records of the given rows of batch `step`; batches run on across the ends of epochs, nothing is dropped."""
    wanted = np.arange(batch_size, dtype=np.int64)[rows]
    epoch, place = np.divmod(np.int64(step) * batch_size + wanted, n)
    return EpochRecords(epoch, permute(place, n, hash_ints(seed, epoch).view(np.int64)))

import re

import numpy as np
import pytest

from tfm_jax.data.index import MAX_RECORDS, epoch_records, hash_ints, permute

MASK = 2**64 - 1


def slow_mix(x: int) -> int:
    """splitmix64's finalizer as published, on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_hash(*parts: int) -> int:
    state, golden = 0, 0x9E3779B97F4A7C15
    for part in parts:
        state = slow_mix(((state + golden) & MASK) ^ slow_mix((part + golden) & MASK))
    return state


@pytest.mark.parametrize("parts", [(0,), (1, 2), (2, 1), (-1,), (2**63 - 1, -(2**63), 5)])
def test_hash_agrees_with_python_integers(parts):
    assert hash_ints(*parts).tolist() == [slow_hash(*parts)]


def test_hash_is_elementwise_over_arrays():
    expected = [slow_hash(7, 1, part) for part in range(5)]
    assert hash_ints(7, 1, np.arange(5)).tolist() == expected


@pytest.mark.parametrize("n", [*range(1, 20), 31, 32, 33, 63, 64, 65, 1000, 1023, 1024, 1025, 4097])
def test_permute_is_a_bijection(n):
    for key in (0, 1, -1, 12345, 2**62, -(2**63)):
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**33 + 7, MAX_RECORDS - 1, MAX_RECORDS])
def test_permute_of_huge_ranges_stays_inside_and_never_collides(n):
    index = np.unique(np.random.default_rng(0).integers(0, n, 20_000))
    out = permute(index, n, 3)
    assert out.min() >= 0 and out.max() < n
    assert np.unique(out).size == index.size
    assert out.max() > 0.99 * n  # spread over the whole range, not a corner of it


def test_permute_with_a_key_each_is_permute_with_each_key():
    keys, index, n = np.array([5, -3, 5, 2**40]), np.array([0, 1, 99, 50]), 100
    expected = [int(permute(np.array([i]), n, int(k))[0]) for i, k in zip(index, keys, strict=True)]
    assert permute(index, n, keys).tolist() == expected


@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3)])
def test_permute_keeps_the_shape(shape):
    out = permute(np.zeros(shape, np.int64), 10, 1)
    assert out.shape == shape and out.dtype == np.int64


@pytest.mark.parametrize("n", [16, 20])
def test_where_an_index_goes_is_uniform_over_keys(n):
    draws = 1000 * n
    counts = np.bincount(permute(np.zeros(draws, np.int64), n, np.arange(draws)), minlength=n)
    # The standard deviation of a count is 31.
    assert counts.min() > 850 and counts.max() < 1150


def test_neighbours_do_not_stay_together():
    out = permute(np.arange(4096), 4096, 9)
    assert np.mean(np.abs(np.diff(out)) < 10) < 0.02
    assert np.mean(out == permute(np.arange(4096), 4096, 10)) < 0.01


def test_the_order_is_the_one_that_earlier_runs_used():
    # A resumed run continues this order: if it has to change, old runs cannot be resumed exactly.
    assert permute(np.arange(10), 10, 0).tolist() == [0, 8, 4, 9, 7, 5, 3, 6, 1, 2]
    assert epoch_records(1, 4, 10, seed=3).record.tolist() == [2, 6, 7, 1]


@pytest.mark.parametrize("n", [0, -1, MAX_RECORDS + 1])
def test_permute_refuses_a_range(n):
    with pytest.raises(ValueError, match=re.escape(f"n is {n}; it must lie in [1, 2**40].")):
        permute(np.array([0]), n, 0)


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_an_index_outside(index):
    with pytest.raises(ValueError, match=re.escape("An index lies outside [0, 5).")):
        permute(np.array([0, index]), 5, 0)


@pytest.mark.parametrize(("batch_size", "n"), [(4, 12), (4, 10), (7, 3), (1, 5), (5, 1), (16, 1000)])
def test_every_epoch_visits_every_record_once_and_batches_cross_its_end(batch_size, n):
    epochs = 3
    steps = -(-epochs * n // batch_size)
    found = [epoch_records(step, batch_size, n, seed=11) for step in range(steps)]
    epoch = np.concatenate([f.epoch for f in found])[: epochs * n]
    record = np.concatenate([f.record for f in found])[: epochs * n]
    assert epoch.tolist() == [place // n for place in range(epochs * n)]
    for number in range(epochs):
        assert sorted(record[epoch == number].tolist()) == list(range(n))


def test_epochs_and_seeds_have_their_own_orders():
    order = lambda seed, epoch: epoch_records(epoch, 50, 50, seed).record.tolist()  # noqa: E731
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    assert order(2, 3) == order(2, 3)


@pytest.mark.parametrize("rows", [slice(2, 5), slice(None, None, 3), slice(0, 0), np.array([6, 1, 1])])
def test_rows_are_rows_of_the_whole_batch(rows):
    for step in (0, 1, 2, 10**9):
        whole, part = epoch_records(step, 8, 11, seed=4), epoch_records(step, 8, 11, seed=4, rows=rows)
        assert part.epoch.tolist() == whole.epoch[rows].tolist()
        assert part.record.tolist() == whole.record[rows].tolist()


def test_a_far_step_is_found_without_the_ones_before():
    far = epoch_records(10**12, 3, 7, seed=0)
    assert far.epoch.tolist() == [(10**12 * 3 + row) // 7 for row in range(3)]

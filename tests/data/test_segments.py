"""Rows that go on from step to step, against lists."""

import itertools

import numpy as np
import pytest

from tests.errors import says
from tfm_jax.data import tokens
from tfm_jax.data.build import TokenStream
from tfm_jax.data.segments import Pass, Training, make


def numbered(size):
    """A stream whose tokens are their places, in three shards."""
    cuts = [0, size // 3, size // 2, size]
    whole = np.arange(size, dtype=np.uint16)
    return TokenStream(tuple(whole[a:b] for a, b in itertools.pairwise(cuts)), np.array(cuts))


def same(a, b):
    assert sorted(a) == sorted(b) == ["inputs", "targets", "weights"] and sorted(a["inputs"]) == ["fresh", "tokens"]
    for x, y in zip([*a["inputs"].values(), a["targets"], a["weights"]],
                    [*b["inputs"].values(), b["targets"], b["weights"]], strict=True):  # fmt: skip
        assert x.dtype == y.dtype and x.tolist() == y.tolist()
    return True


@pytest.mark.parametrize(("size", "seq_len", "rows"), [(1000, 7, 3), (337, 16, 4), (65, 16, 4), (200, 1, 5)])
def test_an_epoch_is_rows_that_go_on_and_do_not_overlap(size, seq_len, rows):
    data = Training(numbered(size), seq_len, rows, seed=3)
    room = min(seq_len, size - rows * seq_len)
    steps = (size - room) // (rows * seq_len)
    offsets = []
    for epoch in range(4):
        batches = [data.batch_at(epoch * steps + i) for i in range(steps)]
        for i, batch in enumerate(batches):
            assert batch["inputs"]["tokens"].shape == (rows, seq_len) and batch["inputs"]["tokens"].dtype == np.int32
            assert batch["inputs"]["fresh"].tolist() == [i == 0] * rows
            assert batch["targets"].tolist() == (batch["inputs"]["tokens"] + 1).tolist()
            assert batch["weights"].all() and batch["weights"].dtype == np.float32
        rows_of_epoch = np.concatenate([b["inputs"]["tokens"] for b in batches], axis=1)
        offsets.append(int(rows_of_epoch[0, 0]))
        # All rows one after another are one stretch of the stream.
        assert rows_of_epoch.ravel().tolist() == list(range(offsets[-1], offsets[-1] + rows * steps * seq_len))
        assert offsets[-1] < room and batches[-1]["targets"].max() < size
    assert len(set(offsets)) > 1 or room < 3


def test_batches_are_pure_functions_of_seed_and_step():
    data = Training(numbered(300), 16, 4, seed=7)
    first = [data.batch_at(step) for step in range(9)]
    assert all(same(Training(numbered(300), 16, 4, 7).batch_at(step), first[step]) for step in (8, 0, 3))
    assert any(
        Training(numbered(300), 16, 4, seed).batch_at(0)["targets"].tolist() != first[0]["targets"].tolist()
        for seed in (8, 9)
    )


@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, None), slice(1, None, 2), np.array([1, 4])])
def test_rows_are_rows_of_the_whole_batch(rows):
    for data in (Training(numbered(400), 16, 5, 7), Pass(numbered(397), 16, 5)):
        for step in range(6):
            whole, part = data.batch_at(step), data.batch_at(step, rows)
            whole = {
                "inputs": {name: x[rows] for name, x in whole["inputs"].items()},
                "targets": whole["targets"][rows],
                "weights": whole["weights"][rows],
            }
            assert same(part, whole)


@pytest.mark.parametrize(
    ("size", "seq_len", "rows"), [(200, 7, 3), (200, 64, 1), (197, 10, 8), (20, 4, 16), (9, 50, 2)]
)
def test_a_pass_predicts_each_token_after_the_first_exactly_once_in_rows_that_go_on(size, seq_len, rows):
    data = Pass(numbered(size), seq_len, rows)
    batches = [data.batch_at(step) for step in range(data.num_batches)]
    assert [b["inputs"]["fresh"].tolist() for b in batches] == [[i == 0] * rows for i in range(len(batches))]
    inputs, targets, weights = (
        np.concatenate(part, axis=1)
        for part in zip(*((b["inputs"]["tokens"], b["targets"], b["weights"]) for b in batches), strict=True)
    )
    assert set(weights.ravel().tolist()) <= {0.0, 1.0}
    assert targets[weights == 1].tolist() == list(range(1, size))
    assert inputs[weights == 1].tolist() == list(range(size - 1))
    # What weighs nothing is at the end of a row, behind everything that it remembers.
    assert (np.diff(weights, axis=1) <= 0).all()
    assert batches[-1]["weights"].any() and targets.max() < size


def arguments(tmp_path, **more):
    return (
        dict(source=f"text:{tmp_path}/books/*.txt", cache_dir=str(tmp_path / "cache"), workers=1, tokenizer="bytes")
        | more
    )


def test_make_reads_the_corpus_that_tokens_reads(tmp_path, books):
    data = make(**arguments(tmp_path, seq_len=32, batch_size=3, seed=5))
    plain = tokens.make(**arguments(tmp_path))
    assert (data.vocab_size, data.facts, data.fingerprint) == (257, plain.facts, plain.fingerprint)
    assert data.train.num_batches is None and data.train.batch_at(0)["targets"].shape == (3, 32)
    size = len("".join(books["validation"]).encode())
    for rows in (7, None):
        held = data.evals("validation", rows)
        assert held.batch_size == (rows or 3)
        assert sum(float(held.batch_at(step)["weights"].sum()) for step in range(held.num_batches)) == size + 1
    first = data.evals("validation", 1).batch_at(0)["targets"][0]
    assert first.tolist() == [*books["validation"][0].encode()][:32]


def test_wrong_numbers(tmp_path, books):
    size = len("".join(books["train"]).encode()) + 3
    asked = arguments(tmp_path, seq_len=50, batch_size=1000)
    with says(
        f"data.source={asked['source']!r} has {size} training tokens, too few for data.batch_size=1000 rows of"
        " data.seq_len=50 and the token after them."
    ):
        make(**asked)
    with says("data.seq_len=0: must be at least 1."):
        make(**arguments(tmp_path, seq_len=0))

"""Texts to write from texts to read: rows against a slow version, and the order of a pass."""

import json

import numpy as np
import pytest

from tests.data.test_examples import bert, write  # noqa: F401 - a fixture
from tests.errors import says
from tfm_jax.data.pairs import make

DRAW = np.random.default_rng(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 200), ("valid", 21)):
        words = [["whale", "ship", "sea", "sails"][i] for i in DRAW.integers(0, 4, 30)]
        rows = [
            {"en": " ".join(words[: 1 + i % 17]), "de": " ".join(words[i % 13 : 4 + i % 13 + i % 11]), "i": i}
            for i in range(count)
        ]
        write(base / f"{name}.jsonl", rows)
    return base


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def opened(folder, tokenizer, **settings):
    return make(source=f"jsonl:{folder}/*.jsonl", text="en", target="de", tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("own_marks", [True, False])
@pytest.mark.parametrize("seq_len", [16, 20])
def test_rows_are_source_and_target_with_their_marks(folder, bert, own_marks, seq_len):  # noqa: F811
    """[CLS] source [SEP], and [CLS] target [SEP] behind the start; without marks of its own, the end mark ends both."""
    data = opened(folder, f"file:{bert}" if own_marks else "chars", seq_len=seq_len, batch_size=8, decoder_start=1)
    codec = data.tokenizer
    before, after = ([2], [3]) if own_marks else ([codec.end_id], [codec.end_id])
    opening = [2] if own_marks else []
    found, rows = data.evals("train", 8), records(folder, "train")
    seen = []
    for step in range(found.num_batches):
        batch, (index, inside) = found.batch_at(step), found.places.at(step)
        assert found.references(step) == [[rows[i]["de"]] for i in index[inside]]
        seen += index[inside].tolist()
        for row, place in enumerate(index):
            source, target = (ids.tolist() for ids in codec.encode_batch([rows[place]["en"], rows[place]["de"]]))
            want = [*before, *source[: seq_len - len(before) - len(after)], *after]
            written = [*opening, *target[: seq_len - len(opening) - 1], codec.end_id]
            inputs = batch["inputs"]
            assert inputs["tokens"][row][inputs["valid"][row]].tolist() == want
            assert batch["targets"][row, : len(written)].tolist() == written
            assert inputs["decoder_tokens"][row, : len(written)].tolist() == [1, *written[:-1]]
            assert batch["weights"][row].sum() == (len(written) if inside[row] else 0)
    assert sorted(seen) == list(range(200))


def test_training_rows_are_of_the_whole_batch_and_even_in_length(folder, bert):  # noqa: F811
    data = opened(folder, f"file:{bert}", seq_len=32, batch_size=8)
    sizes = []
    for step in range(25):
        whole, part = data.train.batch_at(step), data.train.batch_at(step, np.array([5, 2]))
        for name in whole["inputs"]:
            np.testing.assert_array_equal(whole["inputs"][name][[5, 2]], part["inputs"][name])
        np.testing.assert_array_equal(whole["targets"][[5, 2]], part["targets"])
        sizes.append(np.maximum(whole["weights"].sum(1), whole["inputs"]["valid"].sum(1)))
    assert np.mean([x.max() - x.min() for x in sizes]) < 0.5 * np.ptp(np.concatenate(sizes))


def test_pairs_are_sorted_by_their_longer_side(folder, bert):  # noqa: F811
    """Each side has its own width: by the sum, a long source would widen a batch of longer pairs."""
    pairs = opened(folder, f"file:{bert}", seq_len=32, batch_size=8).train.examples
    both = [tuple(map(int, sides)) for sides in zip(*pairs.both(np.arange(len(pairs))), strict=True)]
    order = np.argsort(pairs.lengths(np.arange(len(pairs))), kind="stable")
    assert order.tolist() == sorted(range(len(pairs)), key=lambda i: (max(both[i]), sum(both[i])))
    assert order.tolist() != sorted(range(len(pairs)), key=lambda i: sum(both[i]))


def test_a_tokenizer_that_learns_reads_both_sides(folder):
    codec = opened(folder, "bpe:300").tokenizer
    assert codec.vocab_size <= 300 and len(codec.encode_batch(["whale ship"])[0]) <= 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(None, "is a NoneType, not text."), (3, "is a int, not text."), (["a", None], "is a NoneType, not text."), ([], "is empty.")],
)  # fmt: skip
def test_references_that_are_no_texts(tmp_path, wrong, message):
    row = {"en": "a", "de": "b", "all": ["b", "c"]}
    for split, rows in (("train", [row]), ("valid", [row, {**row, "all": wrong}])):
        write(tmp_path / f"{split}.jsonl", rows)
    with says(f"{tmp_path}/valid.jsonl, line 2: the field 'all' {message}"):
        opened(tmp_path, "bytes", references="all").evals("validation", 2).references(0)


def test_bad_input(folder):
    with says("data.source='stdlib' has no fields: pairs need jsonl:GLOB, tfds:NAME or hf:DIR."):
        make(source="stdlib")
    with says(f"{folder}/train.jsonl, line 1: no field 'fr'. Valid: de, en, i."):
        make(source=f"jsonl:{folder}/*.jsonl", text="en", target="fr", tokenizer="bytes")
    with says("data.seq_len=2: the marks alone take 2."):
        opened(folder, "bytes", seq_len=2)
    with says(f"data.source='jsonl:{folder}/*.jsonl' has no split 'test'. Valid: train, validation."):
        opened(folder, "bytes").evals("test", None)

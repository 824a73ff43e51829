import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests.errors import says
from tfm_jax.data import segments
from tfm_jax.data.build import build_tokens, open_split
from tfm_jax.data.corpus import cache_root
from tfm_jax.data.index import epoch_records, hash_ints
from tfm_jax.data.objectives import Next
from tfm_jax.data.sources import open_source
from tfm_jax.data.tokens import Pass, Training, make
from tfm_jax.data.vocabularies import byte_tokenizer
from tfm_jax.errors import UserError

END = 256


def joined(documents):
    return [END, *(token for text in documents for token in [*text.encode(), END])]


@pytest.fixture(params=[200, 64 << 20], ids=["many shards", "one shard"])
def streams(request, tmp_path, books):
    """(stream of the train split, its tokens as a list)"""
    source = open_source(f"text:{tmp_path}/books/*.txt", cache_dir=tmp_path, piece_bytes=100)
    folder, meta = build_tokens(source, byte_tokenizer(), tmp_path, shard_bytes=request.param)
    stream = open_split(folder, meta, "train")
    assert (len(stream.shards) > 5) == (request.param == 200)
    return stream, joined(books["train"])


def same(a, b):
    assert sorted(a) == sorted(b) == ["inputs", "targets", "weights"]
    for x, y in (
        (a["inputs"]["tokens"], b["inputs"]["tokens"]),
        (a["targets"], b["targets"]),
        (a["weights"], b["weights"]),
    ):
        assert x.dtype == y.dtype and x.tolist() == y.tolist()
    return True


def test_training_rows_are_stretches_of_the_stream_and_what_follows(streams):
    stream, slow = streams
    data = Training(stream, Next(17), batch_size=6, seed=3)
    for step in (0, 1, 50, 10**6):
        batch = data.batch_at(step)
        tokens, targets, weights = batch["inputs"]["tokens"], batch["targets"], batch["weights"]
        assert (tokens.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
        assert tokens.shape == targets.shape == weights.shape == (6, 17)
        assert tokens[:, 1:].tolist() == targets[:, :-1].tolist()
        assert weights.tolist() == np.ones((6, 17)).tolist()
        room = min(17, len(slow) - 17)
        index = epoch_records(step, 6, (len(slow) - room) // 17, 3)
        for row in range(6):
            offset = int(hash_ints(3, 1, int(index.epoch[row]))[0]) % room
            start = int(index.record[row]) * 17 + offset
            assert tokens[row].tolist() == slow[start : start + 17]
            assert targets[row].tolist() == slow[start + 1 : start + 18]


def test_an_epoch_of_training_sees_every_window_once_and_the_next_one_is_cut_elsewhere(streams):
    stream, slow = streams
    numbered = type(stream)((np.arange(stream.size, dtype=np.uint16),), np.array([0, stream.size]))
    data = Training(numbered, Next(16), batch_size=1, seed=0)
    windows = (len(slow) - 16) // 16
    offsets = []
    for epoch in range(4):
        starts = sorted(int(data.batch_at(epoch * windows + i)["inputs"]["tokens"][0, 0]) for i in range(windows))
        offsets.append(starts[0])
        assert starts == list(range(starts[0], starts[0] + windows * 16, 16))
        assert starts[0] < 16 and starts[-1] + 16 < len(slow)
    assert len(set(offsets)) > 1


def test_batches_are_pure_functions_of_seed_and_step(streams):
    stream, _ = streams
    data = Training(stream, Next(16), 4, seed=7)
    first = [data.batch_at(step) for step in range(5)]
    again = Training(stream, Next(16), 4, seed=7)
    assert all(same(again.batch_at(step), first[step]) for step in (4, 0, 3, 0, 1, 2))
    assert data.batch_at(1)["targets"].tolist() != first[0]["targets"].tolist()
    assert Training(stream, Next(16), 4, seed=8).batch_at(0)["targets"].tolist() != first[0]["targets"].tolist()
    first[0]["inputs"]["tokens"][:] = 0  # what a caller does to a batch stays with the batch
    assert data.batch_at(0)["inputs"]["tokens"].any()


@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, None), slice(1, None, 2), np.array([4, 0, 0])])
def test_rows_are_rows_of_the_whole_batch(streams, rows):
    stream, _ = streams
    for data in (Training(stream, Next(16), 5, 7), Pass(stream, Next(300), 5)):
        for step in (0, 1, 2):  # the pass ends in step 1 or 2: padding too
            whole, part = data.batch_at(step), data.batch_at(step, rows)
            whole = {
                "inputs": {"tokens": whole["inputs"]["tokens"][rows]},
                "targets": whole["targets"][rows],
                "weights": whole["weights"][rows],
            }
            assert same(part, whole)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 64), (17, 6), (64, 3), (100_000, 2)])
def test_a_pass_predicts_each_token_after_the_first_exactly_once(streams, seq_len, batch_size):
    stream, slow = streams
    data = Pass(stream, Next(seq_len), batch_size)
    batches = [data.batch_at(step) for step in range(data.num_batches)]
    inputs, targets, weights = (
        np.concatenate([b.ravel() for b in part])
        for part in zip(*((b["inputs"]["tokens"], b["targets"], b["weights"]) for b in batches), strict=True)
    )
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert targets[weights == 1].tolist() == slow[1:]
    assert inputs[weights == 1].tolist() == slow[:-1]
    assert all(b["targets"].shape == (batch_size, seq_len) for b in batches)
    assert batches[-1]["weights"].any() and targets.min() >= 0 and targets.max() <= END
    assert not data.batch_at(data.num_batches)["weights"].any()


@pytest.mark.parametrize("extra", [1, 2, 15, 16, 17, 33])
def test_streams_barely_long_enough(extra):
    from tfm_jax.data.build import TokenStream

    size = 16 + extra
    stream = TokenStream((np.arange(size, dtype=np.uint16),), np.array([0, size]))
    batches = [Training(stream, Next(16), 4, seed).batch_at(step) for seed in range(3) for step in range(5)]
    for batch in batches:
        starts = batch["inputs"]["tokens"][:, :1]
        assert batch["targets"].tolist() == (starts + np.arange(1, 17)).tolist()  # nothing was clipped at the end
        assert batch["weights"].all()


def arguments(tmp_path, **more):
    return dict(source=f"text:{tmp_path}/books/*.txt", cache_dir=str(tmp_path / "cache"), workers=1) | more


def test_make_puts_it_together(tmp_path, books):
    data = make(**arguments(tmp_path, tokenizer="bytes", seq_len=32, batch_size=3, seed=5))
    assert (data.vocab_size, data.tokenizer.end_id) == (257, END)
    assert data.train.num_batches is None and data.train.batch_at(0)["targets"].shape == (3, 32)
    size = len("".join(books["validation"]).encode())
    assert data.facts["validation"]["bytes"] == size and data.facts["validation"]["tokens"] == size + 2
    assert sum(float(data.evals("validation", 7).batch_at(step)["weights"].sum()) for step in range(99)) == size + 1
    assert (data.evals("validation", 7).batch_size, data.evals("validation", None).batch_size) == (7, 3)
    with says(f"data.source='text:{tmp_path}/books/*.txt' has no split 'valid'. Did you mean 'validation'?"):
        data.evals("valid", None)
    # The same text and tokenizer is the same fingerprint, whatever the batches are like.
    assert make(**arguments(tmp_path, tokenizer="bytes", seq_len=8, seed=1)).fingerprint == data.fingerprint
    assert make(**arguments(tmp_path, tokenizer="chars")).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("tokenizer", "whole"),
    [("bytes", True), ("chars", True), ("bpe:300", True), ("words", False), ("wordpiece:300", False)],
)
def test_rates_in_bytes_are_of_tokens_that_say_all_of_the_text(tmp_path, books, tokenizer, whole):
    for reader in (make, segments.make):
        found = reader(**arguments(tmp_path, tokenizer=tokenizer, seq_len=8, batch_size=2)).facts["validation"]
        assert found["tokens"] > 0 and ("bytes" in found) == ("gzip_bytes" in found) == whole


def test_every_document_must_come_back(tmp_path, caplog):
    """Not the first alone, which may be empty or plain; what does not is shown."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "abc def " * 20}) + "\n")
    asked = dict(source=f"jsonl:{tmp_path}/*.jsonl", feature="text", tokenizer="chars", seq_len=8, batch_size=2)
    for texts, whole in ((["", "abc"], True), (["", "abc", "fed xyz"], False)):
        (tmp_path / "valid.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with caplog.at_level("INFO"):
            found = make(**asked, cache_dir=str(tmp_path / "cache"), workers=1).facts["validation"]
        assert ("bytes" in found) == whole
        said = [record.message for record in caplog.records if "no bits per byte" in record.message]
        assert len(said) == (not whole) and all("'fed xyz' comes back as 'fed " in text for text in said)


def test_a_run_s_saved_tokenizer_is_used_instead_of_making_one(tmp_path, books):
    first = make(**arguments(tmp_path, tokenizer="bpe:300"))
    first.tokenizer.save(tmp_path / "run")
    (tmp_path / "books" / "a_train.txt").write_text("other text, for fine-tuning\n" * 50)
    again = make(**arguments(tmp_path, tokenizer="bpe:290", tokenizer_dir=str(tmp_path / "run"), seq_len=8))
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint and again.vocab_size == 300
    assert make(**arguments(tmp_path, tokenizer="bpe:290", seq_len=8)).vocab_size == 290


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "data.seq_len=0: must be at least 1."),
        ({"batch_size": -2}, "data.batch_size=-2: must be at least 1."),
        (
            {"seq_len": 10**6, "tokenizer": "bytes"},
            "data.source='{source}' has {tokens} training tokens, too few for one row of data.seq_len=1000000 and the "
            "token after it.",
        ),
    ],
)
def test_wrong_numbers(tmp_path, books, options, message):
    asked = arguments(tmp_path, **options)
    with says(message.format(source=asked["source"], tokens=len(joined(books["train"])))):
        make(**asked)


def test_a_stream_of_one_row_is_enough(tmp_path, books):
    tokens = len(joined(books["train"]))
    data = make(**arguments(tmp_path, tokenizer="bytes", seq_len=tokens - 1, batch_size=1))
    assert data.train.batch_at(3)["targets"][0].tolist() == joined(books["train"])[1:]
    with pytest.raises(UserError, match="too few for one row"):
        make(**arguments(tmp_path, tokenizer="bytes", seq_len=tokens))


@pytest.mark.parametrize("objective", ["next", "mask", "span", "denoise", "continue", "prefix"])
def test_a_held_out_split_of_which_nothing_is_predicted(tmp_path, books, objective):
    """Found before training, and not at the evaluation behind it."""
    tokens = len(joined(books["validation"]))
    common = arguments(tmp_path, tokenizer="bytes", objective=objective, batch_size=2)
    # Of a row that is cut off, what is there of its second half.
    enough = make(**common, seq_len=tokens - 1 if objective == "continue" else tokens // 2)
    assert enough.evals("validation", 1).batch_at(0)["weights"].any()
    data = make(**common, seq_len=tokens + 1)
    if objective == "next":
        assert data.evals("validation", 1).batch_at(0)["weights"].sum() == tokens - 1
        return
    with says(
        f"data.source='{common['source']}': the split 'validation' has {tokens} tokens, too few for one row of"
        f" data.seq_len={tokens + 1} and data.objective={objective!r}, which takes {data.train.objective.window}."
    ):
        data.evals("validation", None)


def test_where_prepared_data_goes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("TFM_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root(None) == Path("/home/me/.cache/tfm_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root(None) == Path("/x/tfm_jax")
    monkeypatch.setenv("TFM_JAX_CACHE", "~/own")
    assert cache_root(None) == Path("/home/me/own")
    assert cache_root("~/asked") == Path("/home/me/asked")


@pytest.mark.shared_data
def test_tiny_shakespeare_is_cut_and_spelt_as_nanogpt_does(shared_data, tmp_path):
    path = shared_data / "tinyshakespeare" / "input.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    data = make(source=f"text:{path}", tokenizer="chars", seq_len=64, batch_size=12, cache_dir=str(tmp_path))
    assert data.vocab_size == 65 + 2 and len(set(text)) == 65
    assert {split: facts["bytes"] for split, facts in data.facts.items()} == {"train": 1_003_854, "validation": 111_540}
    assert {split: facts["tokens"] for split, facts in data.facts.items()} == {
        "train": 1_003_854 + 2,
        "validation": 111_540 + 2,
    }
    held = data.evals("validation", 64)
    batches = [held.batch_at(step) for step in range(held.num_batches)]
    ids = np.concatenate([b["targets"][b["weights"] == 1] for b in batches])
    assert data.tokenizer.decode(ids) == text[1_003_854:]
    assert sum(float(b["weights"].sum()) for b in batches) == 111_541


@pytest.mark.shared_data
def test_wikitext2_has_the_published_counts(shared_data, tmp_path):
    """33,278 words with the end of a line as one, which ends every line, and the marks at both ends of a text."""
    data = make(
        source=f"text:{shared_data}/wikitext2/wiki.*.tokens.gz",
        tokenizer="words",
        split="names",
        cache_dir=str(tmp_path),
    )
    assert data.vocab_size == 33_278 + 1
    counts = {"train": 2_088_628, "validation": 217_646, "test": 245_569}
    assert {name: found["tokens"] for name, found in data.facts.items()} == {name: n + 2 for name, n in counts.items()}
    # No word of the train split is lost in them.
    batch, unknown = data.evals("test", 4).batch_at(7), data.tokenizer.unk_id
    assert (batch["targets"] == unknown).mean() < 0.2


@pytest.mark.shared_data
def test_books_are_documents(shared_data, tmp_path):
    source = open_source(f"jsonl:{shared_data}/books19c/*.jsonl.gz", cache_dir=tmp_path)
    found = {split: [d.text for p in pieces for d in p.documents()] for split, pieces in source.splits.items()}
    assert {split: len(texts) for split, texts in found.items()} == {"train": 26, "validation": 2, "test": 2}
    lengths = {split: sum(map(len, texts)) for split, texts in found.items()}
    assert lengths == {"train": 16_046_775, "validation": 859_886, "test": 812_852}
    lines = gzip.decompress((shared_data / "books19c" / "valid.jsonl.gz").read_bytes()).decode().splitlines()
    assert found["validation"] == [json.loads(line)["text"] for line in lines]

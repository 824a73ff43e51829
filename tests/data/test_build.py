import gzip
import hashlib
import json
import logging
import lzma
import re
import time

import numpy as np
import pytest

from tests.errors import says
from tfm_jax.data import build
from tfm_jax.data.build import build_tokens, open_split
from tfm_jax.data.sources import open_source
from tfm_jax.data.types import Document, Source
from tfm_jax.data.vocabularies import byte_tokenizer

END = 256


def opened(tmp_path, piece_bytes=300):
    return open_source(f"text:{tmp_path}/books/*.txt", cache_dir=tmp_path / "cache", piece_bytes=piece_bytes)


def joined(documents):
    """The stream of a split in bytes: an end mark first, and one behind every document."""
    out = [END]
    for text in documents:
        out += [*text.encode(), END]
    return out


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".json")}


# A builder whose tokenizer stops for ever at the n-th batch, as a process does that is about to be killed.
STUCK = """
import sys, time
from pathlib import Path
from tfm_jax.data import tokenizers
from tfm_jax.data.build import build_tokens
from tfm_jax.data.sources import open_source
from tfm_jax.data.vocabularies import byte_tokenizer
root, left = Path(sys.argv[1]), [int(sys.argv[2])]
whole = tokenizers.JsonTokenizer.encode_batch
def encode_batch(self, texts):
    left[0] -= 1
    if left[0] == 0:
        print("stuck", flush=True)
        time.sleep(60)
    return whole(self, texts)
tokenizers.JsonTokenizer.encode_batch = encode_batch
source = open_source(f"text:{root}/books/*.txt", cache_dir=root / "cache", piece_bytes=300)
folder, meta = build_tokens(source, byte_tokenizer(), root / "cache", workers=1, shard_bytes=500)
print(folder, flush=True)
"""


@pytest.mark.parametrize("shard_bytes", [1, 500, 64 << 20])
@pytest.mark.parametrize("piece_bytes", [100, 8 << 20])
def test_the_stream_is_the_raw_text_with_end_marks(tmp_path, books, shard_bytes, piece_bytes):
    folder, meta = build_tokens(opened(tmp_path, piece_bytes), byte_tokenizer(), tmp_path, shard_bytes=shard_bytes)
    for split, documents in books.items():
        stream = open_split(folder, meta, split)
        assert stream.at(np.arange(stream.size)).tolist() == joined(documents)
        assert (len(stream.shards) > 1) == (shard_bytes <= 500 and piece_bytes == 100)


def test_at_takes_positions_of_any_shape_across_shards(tmp_path, books):
    folder, meta = build_tokens(opened(tmp_path, 100), byte_tokenizer(), tmp_path, shard_bytes=200)
    stream, slow = open_split(folder, meta, "train"), joined(books["train"])
    place = np.random.default_rng(0).integers(0, stream.size, (5, 3, 40))
    found = stream.at(place)
    assert found.dtype == np.int32 and found.tolist() == np.array(slow)[place].tolist()
    borders = np.concatenate([stream.starts[1:-1] - 1, stream.starts[1:-1]])
    assert stream.at(borders).tolist() == [slow[i] for i in borders]
    assert stream.at(np.zeros((0, 4), np.int64)).shape == (0, 4)


def test_the_counts_are_those_of_the_raw_text(tmp_path, books):
    folder, meta = build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, shard_bytes=500)
    for split, documents in books.items():
        facts, raw = meta["splits"][split], "".join(documents).encode()
        assert facts["bytes"] == len(raw) and facts["documents"] == len(documents)
        assert facts["tokens"] == len(raw) + len(documents) + 1
        assert facts["tokens"] == sum(shard["tokens"] for shard in facts["shards"])
        for shard in facts["shards"]:
            assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    facts, raw = meta["splits"]["validation"], books["validation"][0].encode()
    # gzip's header holds the time, so lengths are all there is to compare.
    assert facts["gzip_bytes"] == len(gzip.compress(raw, 9, mtime=0))
    assert facts["xz_bytes"] == len(lzma.compress(raw, preset=9))
    assert "gzip_bytes" not in meta["splits"]["train"]
    assert {key: meta[key] for key in ("dtype", "vocab_size", "end_id", "source")} == {
        "dtype": "uint16",
        "vocab_size": 257,
        "end_id": END,
        "source": f"text:{tmp_path}/books/*.txt",
    }


def test_a_large_held_out_split_is_not_compressed(tmp_path, books, monkeypatch):
    monkeypatch.setattr(build, "_COMPRESS_LIMIT", 10)
    _, meta = build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path)
    assert "xz_bytes" not in meta["splits"]["validation"] and meta["splits"]["validation"]["bytes"] > 10


class Wide:
    """Ids above 65,535: a code point plus 70,000."""

    vocab_size, end_id, unk_id, fingerprint = 70_000 + 0x110000, 65_536, None, "wide"

    def encode_batch(self, texts):
        return [np.array([70_000 + ord(c) for c in text], np.int32) for text in texts]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path, books):
    folder, meta = build_tokens(opened(tmp_path), Wide(), tmp_path)
    stream = open_split(folder, meta, "validation")
    assert meta["dtype"] == "uint32" and stream.shards[0].dtype == np.uint32
    text = books["validation"][0]
    assert stream.at(np.arange(stream.size)).tolist() == [65_536, *(70_000 + ord(c) for c in text), 65_536]


class Listed:
    """A piece of texts given by hand."""

    def __init__(self, *texts):
        self.texts, self.size = texts, sum(map(len, texts))

    def documents(self):
        return iter([Document(text, True) for text in self.texts])


def test_a_shard_without_a_document_is_no_obstacle(tmp_path):
    # Happens where a hash holds out no record of a piece.
    pieces = {"train": [Listed("ab"), Listed(), Listed("c"), Listed()], "validation": [Listed(), Listed("d")]}
    for split in pieces.values():
        for piece in split:
            piece.size = 10
    source = Source("by hand", "names", "f", pieces)
    folder, meta = build_tokens(source, byte_tokenizer(), tmp_path, shard_bytes=10)
    for split, expected in (("train", ["ab", "c"]), ("validation", ["d"])):
        stream = open_split(folder, meta, split)
        assert stream.at(np.arange(stream.size)).tolist() == joined(expected)


def test_a_finished_build_is_not_touched_again(tmp_path, books):
    folder, meta = build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, shard_bytes=500)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, shard_bytes=500) == (folder, meta)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_other_text_tokenizer_or_cutting_goes_to_another_folder(tmp_path, books):
    found = {build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, shard_bytes=size)[0] for size in (500, 600)}
    found.add(build_tokens(opened(tmp_path), Wide(), tmp_path, shard_bytes=500)[0])
    (tmp_path / "books" / "valid.txt").write_text("changed\n")
    found.add(build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, shard_bytes=500)[0])
    assert len(found) == 4


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_a_killed_build_is_not_taken_for_whole_and_its_finished_shards_are_kept(tmp_path, books, start_python, batch):
    child = start_python(STUCK, tmp_path, batch)
    assert child.stdout.readline() == "stuck\n", child.communicate()[1]
    child.kill()  # SIGKILL
    assert child.wait() == -9
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    assert not (folder / "meta.json").exists()
    finished = {path: path.stat() for path in folder.iterdir() if not path.name.startswith(".")}
    # Every batch is a piece's documents, of 300 bytes or more; a shard is one piece or two.
    assert len([path for path in finished if path.suffix == ".bin"]) >= (batch - 1) // 2
    time.sleep(0.02)
    source = opened(tmp_path)
    assert build_tokens(source, byte_tokenizer(), tmp_path / "cache", workers=1, shard_bytes=500)[0] == folder
    for path, stat in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    whole, _ = build_tokens(source, byte_tokenizer(), tmp_path / "undisturbed", workers=1, shard_bytes=500)
    assert content(folder) == content(whole)


def test_a_shard_cut_short_or_without_counts_is_made_again(tmp_path, books):
    source = opened(tmp_path)
    folder, _ = build_tokens(source, byte_tokenizer(), tmp_path, shard_bytes=500)
    expected = content(folder)
    (folder / "meta.json").unlink()
    (folder / "train-00001.bin").write_bytes(expected["train-00001.bin"][:-2])
    (folder / "train-00002.json").unlink()
    (folder / "train-00003.bin").unlink()
    kept = (folder / "train-00000.bin").stat()
    build_tokens(source, byte_tokenizer(), tmp_path, shard_bytes=500)
    assert content(folder) == expected
    assert (folder / "train-00000.bin").stat().st_mtime_ns == kept.st_mtime_ns


def test_parallel_workers_write_the_bytes_of_a_serial_build(tmp_path, books, monkeypatch):
    source = opened(tmp_path)
    serial, _ = build_tokens(source, byte_tokenizer(), tmp_path / "serial", workers=1, shard_bytes=1500)
    monkeypatch.setattr(build, "_SERIAL_BYTES", 0)
    pools, pool = [], build.ProcessPoolExecutor
    monkeypatch.setattr(build, "ProcessPoolExecutor", lambda *a, **k: (pools.append(a[0]), pool(*a, **k))[1])
    parallel, _ = build_tokens(source, byte_tokenizer(), tmp_path / "parallel", workers=2, shard_bytes=1500)
    assert pools == [2] and len(content(serial)) > 6
    assert content(parallel) == content(serial)


def test_an_error_in_a_worker_reaches_the_user(tmp_path, books, monkeypatch):
    monkeypatch.setattr(build, "_SERIAL_BYTES", 0)
    path = tmp_path / "books" / "a_train.txt"
    path.write_bytes(path.read_bytes() + b"\xff")
    size = path.stat().st_size
    with says(f"{path} is not UTF-8 at byte {size - 1}."):
        build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, workers=2, shard_bytes=1500)
    assert not list(tmp_path.glob("tokens/*/meta.json"))


def test_two_processes_that_build_the_same_both_succeed(tmp_path, books, start_python):
    children = [start_python(STUCK, tmp_path, -1) for _ in range(2)]
    outs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert outs[0] == outs[1] != ""
    whole, _ = build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path / "alone", workers=1, shard_bytes=500)
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    assert content(folder) == content(whole)


@pytest.mark.parametrize("damage", ["gone", "short", "long"])
def test_a_damaged_finished_build_is_an_error(tmp_path, books, damage):
    folder, meta = build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path, shard_bytes=500)
    path = folder / "train-00001.bin"
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(data[:-1] if damage == "short" else data + b"0")
    with says(f"{path} is missing or truncated. Delete {folder} and start again: it is built anew."):
        open_split(folder, meta, "train")
    assert open_split(folder, meta, "validation").size > 1


def test_a_split_without_text(tmp_path):
    source = Source("by hand", "names", "f", {"train": [Listed("a")], "validation": [Listed("", "")]})
    with says("data.source='by hand': the split 'validation' has no text."):
        build_tokens(source, byte_tokenizer(), tmp_path)
    source = Source("by hand", "names", "g", {"train": [Listed("a")], "validation": []})
    with says("data.source='by hand': the split 'validation' has no text."):
        build_tokens(source, byte_tokenizer(), tmp_path)


def test_the_log_says_what_is_built_and_what_came_out(tmp_path, books, caplog):
    with caplog.at_level(logging.INFO, "tfm_jax.data.build"):
        folder, meta = build_tokens(opened(tmp_path), byte_tokenizer(), tmp_path)
    train, held = (f"{meta['splits'][split]['tokens']:,} tokens" for split in ("train", "validation"))
    said = [record.getMessage() for record in caplog.records if record.name == "tfm_jax.data.build"]
    assert said[0] == f"tokens: building 2 of 2 shards of text:{tmp_path}/books/*.txt ..."
    assert re.fullmatch(f"tokens: train {train}, validation {held} in \\d+\\.\\d s\\.", said[1])
    assert json.loads((folder / "meta.json").read_text()) == meta

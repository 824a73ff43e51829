import gzip
import json
import logging
import os
import time

import pytest

from tests.errors import says
from tfm_jax.data import files, sources
from tfm_jax.data.sources import open_source
from tfm_jax.data.splits import Keep


def texts(source, split):
    """The documents of a split, whole."""
    joined, found = "", []
    for piece in source.splits[split]:
        for document in piece.documents():
            joined += document.text
            if document.ends:
                found.append(joined)
                joined = ""
    assert joined == "", "the last document does not end"
    return found


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(folder, **named):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in named.items():
        (folder / f"{name}.txt").write_bytes(text.encode())


def test_names_of_text_files(tmp_path, cache, books, caplog):
    with caplog.at_level(logging.INFO):
        source = open_source(f"text:{tmp_path}/books/*.txt", cache_dir=cache)
    assert {split: texts(source, split) for split in source.splits} == books
    assert (source.name, source.rule) == (f"text:{tmp_path}/books/*.txt", "names")
    assert caplog.messages == [f"data.split=auto chose names for text:{tmp_path}/books/*.txt."]


@pytest.mark.parametrize("piece_bytes", [1, 333, 8 << 20])
def test_pieces_of_any_size_hold_the_same_documents(tmp_path, cache, books, piece_bytes):
    source = open_source(f"text:{tmp_path}/books/*.txt", cache_dir=cache, piece_bytes=piece_bytes)
    assert {split: texts(source, split) for split in source.splits} == books
    assert (len(source.splits["train"]) > 10) == (piece_bytes < 8 << 20)


def test_gzipped_files_are_the_text_in_them(tmp_path, cache, books):
    for path in (tmp_path / "books").glob("*.txt"):
        path.with_suffix(".txt.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    source = open_source(f"text:{tmp_path}/books/*", cache_dir=cache, split="names", piece_bytes=200)
    assert {split: texts(source, split) for split in source.splits} == books


def test_a_recursive_glob_below_the_home_folder(tmp_path, cache, monkeypatch):
    write(tmp_path / "a" / "b", train="deep\n", other="other\n")
    write(tmp_path / "a", valid="held\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_source("text:~/a/**/[tv]*.txt", cache_dir=cache)
    assert (texts(source, "train"), texts(source, "validation")) == (["deep\n"], ["held\n"])


def test_a_test_split_by_name_is_kept_apart(tmp_path, cache):
    write(tmp_path / "d", train="a\n", val="b\n", test="c\n")
    source = open_source(f"text:{tmp_path}/d/*", cache_dir=cache)
    assert {split: texts(source, split) for split in source.splits} == {
        "train": ["a\n"],
        "validation": ["b\n"],
        "test": ["c\n"],
    }


@pytest.mark.parametrize("fraction", [None, 0.25])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_tail_of_a_single_text_is_counted_in_characters(tmp_path, cache, make_text, fraction, suffix):
    text = make_text(4, 200)
    path = tmp_path / f"input.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    source = open_source(f"text:{path}", cache_dir=cache, valid_fraction=fraction, piece_bytes=500)
    border = int(len(text) * (1 - (fraction or 0.1)))
    assert texts(source, "train") == [text[:border]]
    assert texts(source, "validation") == [text[border:]]
    assert source.rule == f"tail {fraction or 0.1}"


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_many_texts_are_shared_out_by_the_hash_of_their_relative_path(tmp_path, cache, fraction):
    for folder in ("x", "y"):
        write(tmp_path / "d" / folder, **{f"n{i}": f"{folder}/n{i}.txt" for i in range(60)})
    source = open_source(f"text:{tmp_path}/d/**/*.txt", cache_dir=cache, valid_fraction=fraction)
    every = sorted(f"{folder}/n{i}.txt" for folder in "xy" for i in range(60))
    held = [name for name in every if Keep("validation", fraction or 0.05)(name)]
    assert texts(source, "validation") == held and 0 < len(held) < 60
    assert texts(source, "train") == [name for name in every if name not in held]
    assert source.rule == f"hash {fraction or 0.05}"


def test_a_moved_folder_is_the_same_data(tmp_path, cache):
    write(tmp_path / "d", **{f"n{i}": f"text {i}" for i in range(60)})
    before = open_source(f"text:{tmp_path}/d/*.txt", cache_dir=cache)
    held = texts(before, "validation")
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    after = open_source(f"text:{tmp_path}/elsewhere/*.txt", cache_dir=cache)
    assert after.fingerprint == before.fingerprint and texts(after, "validation") == held


def test_the_fingerprint_changes_with_everything_that_changes_the_text(tmp_path, cache, books):
    glob = f"text:{tmp_path}/books/*.txt"
    base = open_source(glob, cache_dir=cache).fingerprint
    assert open_source(glob, cache_dir=cache).fingerprint == base
    others = {
        open_source(glob, cache_dir=cache, split="hash", valid_fraction=0.5).fingerprint,
        open_source(glob, cache_dir=cache, split="hash", valid_fraction=0.6).fingerprint,
        open_source(glob, cache_dir=cache, piece_bytes=100).fingerprint,
        open_source(f"text:{tmp_path}/books/[av]*.txt", cache_dir=cache).fingerprint,
    }
    path = tmp_path / "books" / "valid.txt"
    path.write_bytes(path.read_bytes().replace(b"s", b"S", 1))
    others.add(open_source(glob, cache_dir=cache).fingerprint)
    assert len(others | {base}) == 6


def test_files_are_read_through_once_and_again_when_they_change(tmp_path, cache, books, monkeypatch):
    paths = sorted((tmp_path / "books").iterdir())
    long_ago = time.time() - 100
    for path in paths:
        os.utime(path, (long_ago, long_ago))
    read, index_file = [], files.index_file
    monkeypatch.setattr(files, "index_file", lambda path, *rest: (read.append(path), index_file(path, *rest))[1])
    glob = f"text:{tmp_path}/books/*.txt"
    first = open_source(glob, cache_dir=cache)
    assert read == paths
    second = open_source(glob, cache_dir=cache)
    assert read == paths and second == first
    os.utime(paths[0], (long_ago + 1, long_ago + 1))
    open_source(glob, cache_dir=cache)
    assert read == paths * 2
    # A file changed a moment ago may change again within the clock's resolution: nothing is remembered.
    paths[0].write_text("new\n")
    for _ in range(2):
        assert texts(open_source(glob, cache_dir=cache), "train")[0] == "new\n"
    assert read == paths * 4


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_by_names(tmp_path, cache, suffix):
    for name, count in (("train", 7), ("valid", 2), ("test", 3)):
        write_jsonl(
            tmp_path / f"{name}.jsonl{suffix}", [{"body": f"{name} {i}\nline", "text": 1} for i in range(count)]
        )
    source = open_source(f"jsonl:{tmp_path}/*.jsonl{suffix}", cache_dir=cache, feature="body", piece_bytes=30)
    assert texts(source, "train") == [f"train {i}\nline" for i in range(7)]
    assert texts(source, "validation") == [f"valid {i}\nline" for i in range(2)]
    assert texts(source, "test") == [f"test {i}\nline" for i in range(3)]


def test_jsonl_by_the_hash_of_file_and_line(tmp_path, cache):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}.jsonl:{i}"} for i in range(1, 101)])
    source = open_source(f"jsonl:{tmp_path}/*.jsonl", cache_dir=cache, valid_fraction=0.2, piece_bytes=200)
    every = [f"{name}.jsonl:{i}" for name in "ab" for i in range(1, 101)]
    held = [key for key in every if Keep("validation", 0.2)(key)]
    assert texts(source, "validation") == held and 15 < len(held) < 75
    assert texts(source, "train") == [key for key in every if key not in held]
    assert source.rule == "hash 0.2"


@pytest.mark.parametrize(
    ("rule", "names", "message"),
    [
        ("names", ["train", "odd"], "data.split=names, but 'odd.txt' names no split (train, valid, test)."),
        ("names", ["train", "test"], "data.split=names, but no file names the validation split."),
        ("names", ["valid", "test"], "data.split=names, but no file names the train split."),
        ("tail", ["a", "b", "c"], "data.split=tail wants a single text, not 3 files."),
        ("hash", ["a"], "data.split=hash wants several files, not one; use data.split=tail."),
    ],
)
def test_a_rule_that_does_not_fit_the_text_files(tmp_path, cache, rule, names, message):
    write(tmp_path / "d", **{name: "text\n" for name in names})
    with says(f"text:{tmp_path}/d/*.txt: {message}"):
        open_source(f"text:{tmp_path}/d/*.txt", cache_dir=cache, split=rule)


def test_tail_is_not_for_jsonl(tmp_path, cache):
    write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    with says(f"jsonl:{tmp_path}/x.jsonl: data.split=tail is for a single text; use hash or names."):
        open_source(f"jsonl:{tmp_path}/x.jsonl", cache_dir=cache, split="tail")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("txt:x", {}, "data.source: unknown kind 'txt' in 'txt:x'. Did you mean 'text'?"),
        ("?", {}, "data.source: unknown kind '?' in '?'. Valid: hf, jsonl, stdlib, text, tfds."),
        ("text", {}, "data.source: 'text' should look like 'text:GLOB'."),
        ("hf:", {}, "data.source: 'hf:' should look like 'hf:DIR'."),
        ("stdlib:3", {}, "data.source: 'stdlib:3' should look like 'stdlib'."),
        (
            "text:x",
            {"feature": "body"},
            "data.feature is 'body', but a text source has no features to choose from.",
        ),
        ("text:x", {"split": "name"}, "data.split is 'name'. Did you mean 'names'?"),
        ("text:x", {"valid_fraction": 2}, "data.valid_fraction is 2; it must lie between 0 and 1."),
    ],
)
def test_a_wrong_source(cache, source, options, message):
    with says(message):
        open_source(source, cache_dir=cache, **options)


def test_a_glob_that_matches_nothing_points_to_what_is_there(tmp_path, cache, books, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with says("data.source: text:books/vaild.txt matches no file. Did you mean 'books/valid.txt'?"):
        open_source("text:books/vaild.txt", cache_dir=cache)
    with says(
        f"data.source: text:{tmp_path}/books/valid.text matches no file. Did you mean '{tmp_path}/books/valid.txt'?"
    ):
        open_source(f"text:{tmp_path}/books/valid.text", cache_dir=cache)
    with says(f"data.source: jsonl:{tmp_path}/book/*.jsonl matches no file. Did you mean '{tmp_path}/books'?"):
        open_source(f"jsonl:{tmp_path}/book/*.jsonl", cache_dir=cache)


def test_a_cache_folder_that_cannot_be_written(tmp_path, books):
    for path in (tmp_path / "books").iterdir():
        os.utime(path, (0, 0))
    (tmp_path / "cache").write_text("in the way")
    with says(f"The cache folder {tmp_path}/cache/files cannot be written: Not a directory."):
        open_source(f"text:{tmp_path}/books/*.txt", cache_dir=tmp_path / "cache")


def test_the_stdlib_source_reads_the_prepared_folder(cache, monkeypatch, tmp_path):
    from tfm_jax.data import stdlib

    write(tmp_path / "lib")
    for i in range(60):
        (tmp_path / "lib" / f"m{i}.py").write_text(f"x = {i}\n")
    monkeypatch.setattr(stdlib, "library_root", lambda: tmp_path / "lib")
    source = open_source("stdlib", cache_dir=cache)
    held = {i for i in range(60) if stdlib.in_validation(f"m{i}.py")}
    assert set(texts(source, "validation")) == {f"x = {i}\n" for i in held} and held
    assert set(texts(source, "train")) == {f"x = {i}\n" for i in range(60) if i not in held}
    assert source.rule == "names" and sources.PLAN_VERSION == 1
    with says("data.feature is 'path', but a stdlib source has no features to choose from."):
        open_source("stdlib", cache_dir=cache, feature="path")


def test_few_files_leave_one_to_validate_with(tmp_path, cache):
    """At 5 % a file none of six would be held out here; the one with the lowest hash is."""
    write(tmp_path / "few", **{f"b{i}": f"text {i}" for i in range(6)})
    assert not any(Keep("validation", sources.HASH_FRACTION)(f"b{i}.txt") for i in range(6))
    source = open_source(f"text:{tmp_path}/few/*.txt", cache_dir=cache)
    assert len(texts(source, "validation")) == 1 and len(texts(source, "train")) == 5
    lowest = min(range(6), key=lambda i: sources.draw(f"b{i}.txt"))
    assert texts(source, "validation") == [f"text {lowest}"]


def test_all_of_it_in_both_splits(tmp_path, cache):
    write(tmp_path / "few", train_a="one", valid_b="two")
    source = open_source(f"text:{tmp_path}/few/*.txt", split="all", cache_dir=cache)
    assert texts(source, "train") == texts(source, "validation") == ["one", "two"]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(30)))
    source = open_source(f"jsonl:{path}", split="all", cache_dir=cache)
    assert texts(source, "train") == texts(source, "validation") == [f"t{i}" for i in range(30)]


def test_a_model_that_came_without_data_asks_for_some(cache):
    with says("This model came without data. Give its text: --config.data.source=text:GLOB, or another."):
        open_source("missing", cache_dir=cache)

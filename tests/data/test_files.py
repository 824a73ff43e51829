import gzip
import hashlib
import json
import re

import pytest

from tests.errors import says
from tfm_jax.data import files
from tfm_jax.data.files import TextPiece, TextSpan, byte_of_character, index_file, jsonl_pieces, text_pieces, text_spans
from tfm_jax.data.splits import Keep
from tfm_jax.errors import UserError


@pytest.fixture(params=[7, 64, 1 << 20])
def block(request, monkeypatch):
    """Blocks so small that newlines and characters fall across their borders, and the real size."""
    monkeypatch.setattr(files, "BLOCK", request.param)


def slow_cuts(data: bytes, piece_bytes: int) -> list[tuple[int, int]]:
    """Line by line: a cut after the first newline that lies `piece_bytes` or more behind the last cut."""
    cuts, at, lines = [(0, 0)], 0, 0
    for line in data.splitlines(keepends=True):
        at, lines = at + len(line), lines + line.endswith(b"\n")
        if line.endswith(b"\n") and at - 1 - cuts[-1][0] >= piece_bytes:
            cuts.append((at, lines))
    return cuts if cuts[-1][0] == len(data) else [*cuts, (len(data), lines)]


@pytest.mark.parametrize("piece_bytes", [1, 50, 300, 10**6])
@pytest.mark.parametrize("ending", ["", "no newline at the end"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_index_agrees_with_reading_line_by_line(tmp_path, make_text, block, piece_bytes, ending, suffix):
    text = make_text(0, 60) + ending
    data = text.encode()
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    found = index_file(path, "x.txt", piece_bytes)
    assert (found.path, found.name) == (str(path), "x.txt")
    assert (found.size, found.characters) == (len(data), len(text))
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert [tuple(cut) for cut in found.cuts] == slow_cuts(data, piece_bytes)


def test_an_empty_file_has_only_its_start(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    found = index_file(tmp_path / "x", "x", 10)
    assert (found.size, found.characters, [tuple(c) for c in found.cuts]) == (0, 0, [(0, 0)])


def test_the_byte_of_a_character(tmp_path, make_text, block):
    text = make_text(5, 6)
    (tmp_path / "x").write_bytes(text.encode())
    for character in range(len(text) + 1):
        assert byte_of_character(str(tmp_path / "x"), character) == len(text[:character].encode())


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
def test_text_pieces_join_to_the_bytes_asked_for(tmp_path, make_text, suffix, piece_bytes):
    texts = [make_text(seed, 20) for seed in range(3)]
    spans = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.txt{suffix}"
        path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
        spans += text_spans(index_file(path, path.name, piece_bytes), 0, len(text.encode()))
    pieces = text_pieces(spans, piece_bytes)
    found = [document for piece in pieces for document in piece.documents()]
    assert "".join(document.text for document in found) == "".join(texts)
    joined = "".join(document.text + "\0" * document.ends for document in found)
    assert joined == "\0".join(texts) + "\0"  # the ends are where the files end
    assert sum(piece.size for piece in pieces) == len("".join(texts).encode())
    assert all(piece.size >= piece_bytes for piece in pieces[:-1])
    assert len(pieces) > 3 if piece_bytes == 1 else len(pieces) >= 1


def test_spans_of_a_part_begin_and_end_where_asked(tmp_path):
    (tmp_path / "x").write_bytes(b"one\ntwo\nthree\n")
    index = index_file(tmp_path / "x", "x", 1)
    spans = [(s.start, s.stop, s.ends) for s in text_spans(index, 2, 10)]
    assert spans == [(2, 4, False), (4, 8, False), (8, 10, True)]


def test_jsonl_documents_are_the_lines_that_are_not_blank(tmp_path, make_text):
    texts = [make_text(seed, 2) for seed in range(30)]
    lines = [json.dumps({"body": text, "n": i}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    lines.insert(4, "   ")
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    for piece_bytes in (1, 200, 10**6):
        pieces = jsonl_pieces(index_file(path, "x.jsonl.gz", piece_bytes), "body", None)
        found = [document for piece in pieces for document in piece.documents()]
        assert [document.text for document in found] == texts
        assert all(document.ends for document in found)
        assert sum(piece.size for piece in pieces) == len("\n".join(lines).encode())


@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
def test_which_lines_are_held_out_does_not_depend_on_the_cutting(tmp_path, piece_bytes):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(1, 201)))
    keep = Keep("validation", 0.2)
    pieces = jsonl_pieces(index_file(path, "sub/x.jsonl", piece_bytes), "text", keep)
    found = [document.text for piece in pieces for document in piece.documents()]
    assert found == [f"line {i}" for i in range(1, 201) if keep(f"sub/x.jsonl:{i}")]
    assert 20 < len(found) < 60


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    (piece,) = jsonl_pieces(index_file(path, "x", 100), "text", None)
    assert [document.text for document in piece.documents()] == ["a?b", "😀"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ', "not JSON: Expecting value: line 1 column 10 (char 9)."),
        ('["text"]', "a JSON list, not an object."),
        ('{"txt": "x"}', "no field 'text'. Did you mean 'txt'?"),
        ('{"a": 1, "b": "x"}', "no field 'text'. Valid: a, b."),
        ('{"text": 3}', "the field 'text' is a int, not text."),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    pieces = jsonl_pieces(index_file(path, "x", 1), "text", None)
    with says(f"{path}, line 3: {problem}"):
        [list(piece.documents()) for piece in pieces]


def test_bytes_that_are_not_utf8_are_named_by_their_place_in_the_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"good line\nbad \xff line\n")
    first, second = text_pieces(text_spans(index_file(path, "x", 1), 0, 21), 1)
    assert [document.text for document in first.documents()] == ["good line\n"]
    with says(f"{path} is not UTF-8 at byte 14."):
        list(second.documents())


def test_a_file_that_shrinks(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"short")
    with says(f"{path} became shorter while it was being read."):
        list(TextPiece((TextSpan(str(path), 0, 6, True),)).documents())


def test_gzip_files_that_are_not_whole(tmp_path, make_text):
    path = tmp_path / "x.txt.gz"
    whole = gzip.compress(make_text(0, 500).encode())
    path.write_bytes(whole[:-20])
    with says(f"{path} is not a whole gzip file: Compressed file ended before the end-of-stream marker was reached."):
        index_file(path, "x", 100)
    path.write_bytes(b"plain text")
    with says(f"{path} is not a whole gzip file: Not a gzipped file (b'pl')."):
        index_file(path, "x", 100)
    path.write_bytes(whole[:100] + bytes(100) + whole[200:])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is not a whole gzip file: "):
        index_file(path, "x", 100)


def test_a_file_that_is_gone(tmp_path):
    with says(f"{tmp_path}/x cannot be read: No such file or directory."):
        index_file(tmp_path / "x", "x", 100)

import hashlib
import json

import numpy as np
import pytest

from tfm_jax.data import stdlib
from tfm_jax.data.stdlib import in_validation, library_files, prepare, read_source

PREPARE = """
import json, sys
from pathlib import Path
from tfm_jax.data import stdlib
from tfm_jax.data.sources import open_source
stdlib.library_root = lambda: Path(sys.argv[1])
source = open_source("stdlib", cache_dir=Path(sys.argv[2]))
texts = {split: [d.text for p in pieces for d in p.documents()] for split, pieces in source.splits.items()}
print(json.dumps([texts, source.fingerprint, "tensorflow" in sys.modules]))
"""


@pytest.fixture
def library(tmp_path):
    """A small standard library: 80 modules and what is to be skipped."""
    root = tmp_path / "lib"
    for folder in ("", "pkg/inner", "pkg/tests", "test", "site-packages/numpy", "lib-dynload", "pkg/__pycache__"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "skipped_or_not.py").write_text(f"# {folder}\n")
    for i in range(77):
        (root / f"m{i:02}.py").write_text(f"x = {i}  # ж\n")
    (root / "pkg" / "__init__.py").write_text("")
    (root / "pkg" / "data.txt").write_text("no module")
    (root / "pkg" / "last.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    return root


def kept(library):
    return sorted(
        [*(f"m{i:02}.py" for i in range(77)), "pkg/inner/skipped_or_not.py", "pkg/last.py", "skipped_or_not.py"]
    )


def test_the_files_are_the_modules_that_hold_text(library):
    assert library_files(library) == kept(library)


def test_it_prepares_and_reads_without_tensorflow(tmp_path, library, start_python):
    out, errors = start_python(PREPARE, library, tmp_path / "cache").communicate()
    assert out, errors
    texts, fingerprint, tensorflow = json.loads(out.splitlines()[-1])
    assert not tensorflow
    paths = kept(library)
    assert texts["train"] == [read_source(library / p) for p in paths if not in_validation(p)]
    assert texts["validation"] == [read_source(library / p) for p in paths if in_validation(p)]
    assert 0 < len(texts["validation"]) < 20
    # Another cache folder, another time: the same data.
    again = json.loads(start_python(PREPARE, library, tmp_path / "other").communicate()[0].splitlines()[-1])
    assert again == [texts, fingerprint, False]


def test_it_is_prepared_once_for_each_state_of_the_library(tmp_path, library, monkeypatch):
    monkeypatch.setattr(stdlib, "library_root", lambda: library)
    first = prepare(tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert prepare(tmp_path / "data") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times
    (library / "m00.py").write_text("x = 'patched'\n")
    assert prepare(tmp_path / "data") != first


def test_the_split_is_a_hash_of_the_path_so_that_a_new_file_moves_no_other():
    paths = [f"package{i % 7}/module{i}.py" for i in range(4000)]
    draw = lambda path: int(hashlib.md5(path.encode()).hexdigest()[:16], 16) / 2**64  # noqa: E731
    assert [in_validation(path) for path in paths] == [draw(path) < 0.05 for path in paths]
    assert 0.035 < np.mean([in_validation(path) for path in paths]) < 0.065
    # These have been where they are in every run so far.
    few = ("abc.py", "asyncio/tasks.py", "collections/abc.py", "heapq.py", "json/decoder.py", "os.py")
    assert [path for path in few if in_validation(path)] == ["asyncio/tasks.py", "collections/abc.py", "heapq.py"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"x = '\xc3\xa9'\n", "x = 'é'\n"),
        (b"# coding: latin-1\nx = '\xe9'\n", "# coding: latin-1\nx = 'é'\n"),
        (b"\xef\xbb\xbfx = 1\n", "x = 1\n"),
        (b"x = '\xff'\n", "x = '\ufffd'\n"),
        (b"# coding: no-such-codec\nx = '\xc3\xa9'\n", "# coding: no-such-codec\nx = 'é'\n"),
    ],
)
def test_source_is_read_in_its_declared_encoding(tmp_path, raw, text):
    (tmp_path / "x.py").write_bytes(raw)
    assert read_source(tmp_path / "x.py") == text


def test_the_real_library_is_there():
    found = library_files(stdlib.library_root())
    assert len(found) > 400 and {"os.py", "json/decoder.py"} <= set(found)
    assert not [path for path in found if path.startswith(("test/", "site-packages/"))]

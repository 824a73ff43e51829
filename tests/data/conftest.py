"""Shared by the tests of the data side."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
WORDS = ["the", "sea", "ship", "naïve", "Ωmega", "日本語", "😀", "it's", "1851", "don't", "", "two\ttabs"]
WORDS += ["whale", "e\u0301", "captain", "said"]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    asked = os.environ.get("TFM_JAX_SHARED_DATA")
    folder = Path(asked) if asked else REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data sets: {folder} is absent (set TFM_JAX_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    """(seed, lines) -> that many lines of words of one to four bytes a character."""

    def make(seed: int, lines: int) -> str:
        draw = np.random.default_rng(seed)
        return "".join(" ".join(draw.choice(WORDS, draw.integers(0, 12))) + "\n" for _ in range(lines))

    return make


@pytest.fixture
def books(tmp_path: Path, make_text: Callable[[int, int], str]) -> dict[str, list[str]]:
    """Texts of two training files and a validation file, written to `tmp_path/books/*.txt`, by split and in order."""
    texts = {"a_train.txt": make_text(1, 90), "b_train.txt": make_text(2, 40), "valid.txt": make_text(3, 30)}
    (tmp_path / "books").mkdir()
    for name, text in texts.items():
        (tmp_path / "books" / name).write_bytes(text.encode())
    return {"train": [texts["a_train.txt"], texts["b_train.txt"]], "validation": [texts["valid.txt"]]}


@pytest.fixture
def start_python(spawn: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., "subprocess.Popen[str]"]:
    """Start `python -c code *arguments` that can import this checkout."""
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
        return spawn(["-c", code, *arguments], env={**os.environ, "PYTHONPATH": path})

    return start

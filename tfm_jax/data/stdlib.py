"""The running Python's standard library as a TFDS builder: about 11 MB of real text on every machine, no download."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from tfm_jax.data.locks import locked
from tfm_jax.data.records import write_data_set

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)
VALIDATION_FRACTION = 0.05
log = logging.getLogger(__name__)


def library_files(root: Path) -> list[str]:
    """Relative posix paths of the non-empty `.py` files under `root`, sorted, without the skipped folders."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [path.relative_to(root).as_posix() for path in paths if path.stat().st_size]
    return sorted(found)


def in_validation(path: str) -> bool:
    """Whether a file is held out: a stable hash of its relative path, so that a new file moves no other."""
    return int.from_bytes(hashlib.md5(path.encode()).digest()[:8], "big") < VALIDATION_FRACTION * 2**64


def read_source(path: Path) -> str:
    """The text of a Python file in its declared encoding (PEP 263).

    Bytes that do not decode become U+FFFD: the set of documents then depends on the file names alone.
    """
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    except SyntaxError:  # an unknown or contradictory coding cookie
        encoding = "utf-8"
    return raw.decode(encoding, errors="replace")


class StdlibSource(tfds.core.GeneratorBasedBuilder):
    """`{"path", "text"}` of every standard library module, in path order, about 5 % of them in validation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"path": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="The Python standard library's own source code.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        paths = library_files(library_root())
        return {
            "train": self._generate_examples([path for path in paths if not in_validation(path)]),
            "validation": self._generate_examples([path for path in paths if in_validation(path)]),
        }

    def _generate_examples(self, paths: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
        for index, path in enumerate(paths):
            yield index, {"path": path, "text": read_source(library_root() / path)}


def library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def prepare(data_dir: Path) -> Path:
    """The folder of the prepared data set under `data_dir`, made first where it is not there yet.

    The config's name holds the Python version and a digest of the files' names and sizes, so interpreters and
    patched libraries never share a folder.
    """
    root = library_root()
    listing = "\n".join(f"{path} {(root / path).stat().st_size}" for path in library_files(root))
    name = f"py{platform.python_version()}-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"
    config = tfds.core.BuilderConfig(name=name, version=StdlibSource.VERSION)
    with locked(data_dir / name):
        builder = StdlibSource(config=config, data_dir=str(data_dir), file_format="array_record")
        if not builder.is_prepared():
            log.info("Reading the sources of Python %s's standard library (once).", platform.python_version())
            # TFDS announces a download, of which there is none here.
            with contextlib.redirect_stdout(io.StringIO()):
                write_data_set(builder)
    return Path(builder.data_dir)

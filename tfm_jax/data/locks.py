"""One process at a time per cache folder."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock file beside `folder`, waiting for whoever has it. The kernel frees it when its holder dies."""
    path = folder.with_name(f"{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"The cache folder {path.parent} cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Waiting for another process that is making %s.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of a file of a cache, made by the first process that wants it."""
    # What is there is read from a folder that cannot be written too.
    if not path.is_file():
        with locked(path):
            if not path.is_file():
                write_atomic(path, make())
    return path.read_bytes()

"""Files that a crash, or a reader at the wrong moment, never finds half written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file, flushed to disk, so that its name always stands for the old content or the new."""
    # Not the process's number: in a shared folder another host's, or another thread's, may be the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        # No later call takes its name.
        temporary.unlink(missing_ok=True)
        raise


def digest(path: Path) -> str:
    """SHA-256 of a file's content, which is that of what is in it where its name ends in `.gz`."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def path_id(path: Path) -> str:
    """16 letters that stand for a path, and for no other."""
    return hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]


def folders_beside(path: Path) -> list[str]:
    """The names of the folders where `path` would be, for the error that it is not there."""
    above = path.expanduser().absolute().parent
    return sorted(one.name for one in above.iterdir() if one.is_dir()) if above.is_dir() else []


def read_status(run: Path) -> dict[str, Any]:
    """What `status.json` says; nothing where there is none.

    Raises:
      ValueError: it is damaged.
    """
    try:
        found = json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict) or "state" not in found:
        raise ValueError("it says no state")
    return found


def write_status(run: Path, state: str, reason: str = "", **more: Any) -> None:
    """A run's `status.json`: running, finished, preempted or failed, with the reason."""
    record = {"state": state, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
    write_atomic(run / "status.json", json.dumps(record) + "\n")

"""What several runs in one process print, each into its own log."""

from __future__ import annotations

import io
import threading
from typing import TextIO


class ByThread(io.TextIOBase):
    """What a thread prints goes to its own file, if it has one."""

    def __init__(self, otherwise: TextIO) -> None:
        self._otherwise, self._own = otherwise, threading.local()

    def to(self, file: TextIO) -> None:
        self._own.file = file

    def write(self, text: str) -> int:
        return getattr(self._own, "file", self._otherwise).write(text)

    def flush(self) -> None:
        getattr(self._own, "file", self._otherwise).flush()

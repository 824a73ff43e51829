"""Being told to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """SIGTERM and Ctrl-C as a flag that the loop looks at between steps; the second one stops at once."""

    def __init__(self) -> None:
        self.asked, self.name = False, ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; a sweep that runs trials in threads keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked, self.name = True, signal.Signals(number).name
        signal.signal(number, self._previous[number])

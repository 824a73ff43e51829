"""Being told to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from tfm_jax import interrupt


class StopRequest:
    """SIGTERM and Ctrl-C as a question that the loop asks between steps; the second one stops at once.

    Where there are several processes JAX has its own handler of SIGTERM: what one of them is told it spreads to all, and
    it agrees on a step that none has passed. Ctrl-C is made a SIGTERM there.
    """

    def __init__(self) -> None:
        self.asked, self.name = False, "SIGTERM"
        self._shared = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def told(self, step: int) -> bool:
        """Whether to stop before this step; with several processes, true in all of them at the same one.

        Every process must ask at every step.
        """
        return multihost_utils.reached_preemption_sync_point(step) if self._shared else self.asked

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; a sweep that runs trials in threads keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self._shared else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
            if interrupt.asked:
                self._ask(signal.SIGINT, None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, self._previous[number])
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.asked, self.name = True, signal.Signals(number).name

"""Ctrl-C that is not forgotten: a KeyboardInterrupt in a destructor, or in a callback of C code, is printed and lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType

asked = False


def listen() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt and is remembered, for `train.stop.StopRequest`; where it is ignored (a
    shell's background job) it stays so."""
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global asked
    asked = True
    raise KeyboardInterrupt

"""A background thread that keeps batches ready ahead of the step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Iterates over `(step, make(step))` for `start <= step < stop`, in order, at most `depth` items ahead.

    An exception in `make` is raised in the consumer, after the items before it, with the thread's traceback.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1.")
        self.wait_seconds = 0.0
        """How long the consumer was blocked, in all."""
        self._make, self._next, self._stop, self._depth = make, start, stop, depth
        self._ready: deque[tuple[int, T]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, start: int) -> None:
        try:
            for step in range(start, self._stop):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                item = self._make(step)
                with self._changed:
                    self._ready.append((step, item))
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[int, T]]:
        return self

    def __next__(self) -> tuple[int, T]:
        started = time.perf_counter()
        with self._changed:
            if self._next >= self._stop or self._closed:
                raise StopIteration
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            self.wait_seconds += time.perf_counter() - started
            if self._ready:
                self._next += 1
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self, timeout: float = 5.0) -> None:
        """Stop and wait for the item in the making, at most `timeout` seconds. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""A profile of some steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces `count` steps from step `first`, or from the first one that comes after it."""

    def __init__(self, folder: Path, first: int, count: int) -> None:
        self._folder, self._first, self._count = folder, first, count
        self._end: int | None = None

    def before(self, step: int, state: Any) -> None:
        if self._end is None and step >= self._first:
            jax.profiler.start_trace(str(self._folder))
            self._end = step + self._count
        elif step == self._end:
            self.stop(state)

    def stop(self, state: Any) -> None:
        """Write what was traced, once; `state` is waited for, since its computation belongs to the trace."""
        if self._end is not None and self._count:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._count = 0

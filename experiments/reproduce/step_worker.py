"""One side of a step benchmark in a process of its own: a line on stdin runs a step, its seconds go to stdout.

In one process the two frameworks' allocators and thread pools get in each other's way, by a factor of two at shape B.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping


def in_turns(first: Worker, second: Worker, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides' steps, in turns of a few, so that a drifting machine favours neither."""
    out: tuple[list[float], list[float]] = ([], [])
    for turn in range(1 + rounds):
        for worker, seconds in zip((first, second), out, strict=True):
            worker.step()  # pays for the memory that the system took back while the other side had its turn
            found = [worker.step() for _ in range(steps)]
            seconds += found if turn else []  # the first turn compiles, and fills caches
    first.close()
    second.close()
    return out


class Worker:
    """A side, started; `step()` runs one step there and returns its seconds.

    Args:
      make: `module:function`, which makes a step from the arguments.
      arguments: integers stay integers.
      environment: this process's if None.
    """

    def __init__(self, make: str, *arguments: int | str, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "experiments.reproduce.step_worker", make, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("A side of the step benchmark ended; its error stands above.")
        return float(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _main() -> None:
    module, _, function = sys.argv[1].partition(":")
    make: Callable[..., Callable[[], float]] = getattr(importlib.import_module(module), function)
    step = make(*(int(x) if x.isdigit() else x for x in sys.argv[2:]))
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _main()

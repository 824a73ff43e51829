"""One side of the step benchmark in a process of its own: a line on stdin runs a step, its seconds go to stdout.

In one process the two frameworks' allocators and thread pools get in each other's way, by a factor of two at shape B.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence


class Worker:
    """A side, started; `step()` runs one training step there and returns its seconds."""

    def __init__(self, side: str, shape: Sequence[int]) -> None:
        command = [sys.executable, "-m", "experiments.reproduce.step_worker", side, *map(str, shape)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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
    side, shape = sys.argv[1], [int(x) for x in sys.argv[2:]]
    make: Callable[..., Callable[[], float]]
    if side == "tfm_jax":
        from experiments.benchmark import our_step as make
    else:
        from experiments.reproduce.torch_gpt import step as make
    step = make(*shape)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _main()

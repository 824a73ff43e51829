"""Calls of one program by several threads as one call over a population axis: on an accelerator many small products cost little
more than one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


class Together:
    """`together(numbers, *arguments)`, called by each of several threads again and again.

    Calls that wait are stacked, mapped over (`jax.vmap`) and taken apart in one compiled program. Programs are made for powers
    of two, and a round of other size is several calls: one that has left costs nothing, and no padding is computed.

    Args:
      function: of the numbers and the arguments of one call.
      options: of `jax.jit`, as for `function(numbers, *arguments)`.
      patience: seconds that a round waits at least for those who were in the last; twice as long as that has taken if that is
        more. One that has left, or evaluates, is waited for once.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        examples: Sequence[Any] = (),
        *,
        patience: float = 1.0,
    ) -> None:
        del examples  # programs are made when it is known for how many
        self._function, self._options = function, options
        self._least = self._patience = patience
        self._programs: dict[int, Callable[..., Any]] = {}
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []
        self._expected: set[int] = set()

    def __call__(self, numbers: Sequence[Any], *arguments: Any) -> Any:
        call = _Call(numbers, arguments)
        with self._changed:
            self._waiting.append(call)
            self._expected.add(call.thread)
            self._changed.notify_all()
            first = self._waiting[0] is call
            if first:
                self._changed.wait_for(lambda: len(self._waiting) >= len(self._expected), self._patience)
                calls, self._waiting = self._waiting, []
                self._expected = {one.thread for one in calls}
        if first:
            self._run(calls)
        call.done.wait()
        if call.error is not None:
            raise call.error
        return call.out

    @property
    def sizes(self) -> list[int]:
        """Of the programs that were made."""
        return sorted(self._programs)

    def _run(self, calls: Sequence[_Call]) -> None:
        began = time.monotonic()
        try:
            while calls:
                size = 1 << (len(calls).bit_length() - 1)
                some, calls = calls[:size], calls[size:]
                try:
                    arguments = zip(*(one.arguments for one in some), strict=True)
                    outs = jax.block_until_ready(self._program(size)([one.numbers for one in some], *arguments))
                    for one, out in zip(some, outs, strict=True):
                        one.out = out
                        one.done.set()
                except Exception as error:
                    # It is that of each of them: their threads raise it.
                    for one in some:
                        one.error = error
                        one.done.set()
        finally:
            with self._changed:
                self._patience = max(self._least, 2 * (time.monotonic() - began))

    def _program(self, size: int) -> Callable[..., Any]:
        if size not in self._programs:

            def population(*members: Sequence[Any]) -> list[Any]:
                stacked = [jax.tree.map(lambda *x: jnp.stack(x), *one) for one in members]
                # The size is said, for calls without numbers or arguments.
                out = jax.vmap(self._function, axis_size=size)(*stacked)
                return [jax.tree.map(lambda x, i=i: x[i], out) for i in range(size)]

            options = dict(self._options)
            if "in_shardings" in options:
                _, *shardings = options["in_shardings"]
                options["in_shardings"] = ([None] * size, *((one,) * size for one in shardings))
            if "out_shardings" in options:
                options["out_shardings"] = [options["out_shardings"]] * size
            self._programs[size] = jax.jit(population, **options)
        return self._programs[size]


class _Call:
    """What a thread asks for, and gets."""

    def __init__(self, numbers: Sequence[Any], arguments: Sequence[Any]) -> None:
        self.numbers, self.arguments, self.thread = numbers, arguments, threading.get_ident()
        self.done = threading.Event()
        self.out: Any = None
        self.error: Exception | None = None

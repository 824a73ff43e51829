"""A small process beside each training process, which notices when another one ends and says whose end it was.

It is a process, not a thread: when process 0 dies, JAX's client ends this one from C++ within milliseconds, and a
collective whose partner is gone may never return; neither leaves Python a chance to speak. Process 0's watchdog listens
and the others connect to it; each knows by a pipe whether its own process lives. It needs nothing but the standard
library, so it starts in a moment and costs a few megabytes.

A process that dies is noticed at once, a host that vanishes without a word after `timeout` seconds. The others then have
`GRACE` seconds to end by themselves before they are killed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tfm_jax.files import write_status

GRACE = 10.0
# The end of process 0 makes JAX end the others at once: for so long hear first whether it was that.
HEARSAY = 1.0
# A collective fails because its partner is gone: for so long wait to be told whose end it was.
PATIENCE = 5.0


class Watchdog:
    """The watchdog of this process, as this process sees it."""

    def __init__(self, process: int, timeout: float, token: str, hub: tuple[str, int] | None = None) -> None:
        """Start it, and on processes other than 0 connect it to process 0's.

        Args:
          timeout: seconds of silence after which a host counts as gone.
          token: a secret that all processes share; who does not know it is not listened to.
          hub: host and port of process 0's watchdog; None on process 0, where `port` then says it.

        Raises:
          ConnectionError: process 0's watchdog cannot be reached.
        """
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"process": process, "timeout": timeout, "token": token, "hub": hub, "parent": os.getpid()}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tfm_jax.parallel.watchdog", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._child.stdout is not None
        ready = json.loads(self._child.stdout.readline() or '{"problem": "the watchdog did not start"}')
        if "problem" in ready:
            raise ConnectionError(ready["problem"])
        self.port: int = ready["port"]
        self._process, self._cause = process, ""
        self._told, self._alone = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="watchdog", daemon=True).start()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            message = json.loads(line)
            self._cause = message.get("cause", self._cause)
            (self._told if "cause" in message else self._alone).set()
        self._alone.set()

    def lost(self) -> str:
        """Whose end made this process fail, or nothing; waits a little to be told."""
        self._told.wait(PATIENCE)
        self._told.set()  # asked once
        return self._cause

    def guard(self, run: Path) -> None:
        """When another process ends, say so in this run's `status.json`."""
        self._tell(run=str(run.absolute()))

    def finish(self) -> None:
        """This process is about to end well."""
        self._tell(finishing=True)

    def leave(self, code: int, reason: str) -> None:
        """End this process by an error, and tell the others why.

        Not through JAX's shutdown, which waits for all processes, and these may wait for this one in a collective.
        Process 0 goes last: its end ends the others with an exit code that says nothing.
        """
        self._tell(failed=reason)
        if self._process == 0:
            self._alone.wait(GRACE + 2)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _tell(self, **message: Any) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and said why
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()


here: Watchdog | None = None
"""The watchdog of this process, where there are several processes."""


def lost() -> str:
    """Whose end made this process fail, or nothing."""
    return here.lost() if here is not None else ""


class _Line:
    """A connection to another watchdog."""

    def __init__(self, connection: socket.socket, name: str = "") -> None:
        connection.settimeout(5)
        self.connection, self.heard, self._rest = connection, time.monotonic(), b""
        self.name = name  # none until it has said the secret

    def send(self, **message: str) -> None:
        with contextlib.suppress(OSError):  # a connection that is gone reads as closed
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, str]] | None:
        """Messages that have come in; None when the connection is closed, or talks of something else."""
        try:
            data = self.connection.recv(1 << 16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            self.heard = time.monotonic()
            return [dict(json.loads(line)) for line in lines] if data else None
        except (OSError, ValueError, TypeError):
            return None


class _Loop:
    """What a watchdog does; process 0's has a listener, the others one line, to it."""

    def __init__(self, process: int, timeout: float, token: str, hub: list[Any] | None, parent: int) -> None:
        self.timeout, self.token, self.parent = timeout, token, parent
        self.me = f"Process {process} ({socket.gethostname()} pid {parent})"
        self.cause = self.run = ""
        self.finishing = self.failed = False
        self.ended = self.concluded = math.inf  # when: the own process, and the question of whose end it was
        self.listener: socket.socket | None = None
        self.lines: list[_Line] = []
        if hub is None:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self.listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
            self.port: int = self.listener.getsockname()[1]
        else:
            self.port = hub[1]
            line = _Line(socket.create_connection((hub[0], hub[1]), timeout), f"Process 0 ({hub[0]})")
            self.lines.append(line)
            line.send(token=self.token, name=self.me)

    def watch(self) -> None:
        """Until the own process is over, or has to be."""
        pipe, rest, beat = sys.stdin.fileno(), b"", time.monotonic()
        while not self._over():
            ready = self._ready(pipe)
            # Connections before the own process: what ended another one may have ended this one too.
            for line in [line for line in self.lines if line.connection in ready]:
                self._hear(line)
            if self.listener is not None and self.listener in ready:
                self.lines.append(_Line(self.listener.accept()[0]))
            if pipe in ready:
                *messages, rest = (rest + (data := os.read(pipe, 1 << 16))).split(b"\n")
                for message in messages:
                    self._obey(**json.loads(message))
                if not data:
                    self.ended = time.monotonic()
            now = time.monotonic()
            if now - beat > self.timeout / 6:
                beat = now
                self._tell_all(beat="")
            for line in [line for line in self.lines if now - line.heard > self.timeout]:
                self._lose(line, f"has not been heard of for {self.timeout:g} s")

    def _ready(self, pipe: int) -> list[Any]:
        with selectors.DefaultSelector() as found:
            for source in (*(line.connection for line in self.lines), *filter(None, [self.listener])):
                found.register(source, selectors.EVENT_READ)
            if self.ended == math.inf:
                found.register(pipe, selectors.EVENT_READ)
            return [key.fileobj for key, _ in found.select(min(0.2, self.timeout / 6))]

    def _over(self) -> bool:
        now = time.monotonic()
        if self.ended < math.inf:
            if not self.cause and not self.finishing:
                if self.listener is None and self.lines and now < self.ended + HEARSAY:
                    return False
                self._conclude(f"{self.me} died.")
            if self.cause and not self.failed:
                print(self.cause, file=sys.stderr, flush=True)
            self._tell_all(bye="")
            return True
        if self.cause and now > self.concluded + GRACE:
            print(f"{self.cause} {self.me} is killed.", file=sys.stderr, flush=True)
            os.kill(self.parent, signal.SIGKILL)
            return True
        return False

    def _obey(self, run: str = "", finishing: bool = False, failed: str = "") -> None:
        """What the own process says."""
        self.run = run or self.run
        self.finishing |= finishing or bool(failed)
        if failed:
            self.failed = True
            if not self.cause:
                self.cause = f"{self.me} failed: {failed}"  # what the others come to is a consequence
                self._tell_all(end=self.cause)
            self._say_alone()

    def _hear(self, line: _Line) -> None:
        """What another watchdog says."""
        messages = line.receive()
        if messages is None:
            return self._lose(line, "died")
        for message in messages:
            if message.get("token") == self.token:
                self._meet(line, message["name"])
            if not line.name or "bye" in message:
                return self._drop(line)
            if "end" in message:
                self._conclude(message["end"])
        return None

    def _meet(self, line: _Line, name: str) -> None:
        """The other one knows the secret; who connects says it first, so that a stranger never hears it."""
        line.name = name
        if self.listener is not None:
            line.send(token=self.token, name=self.me)
            if self.cause:
                line.send(end=self.cause)

    def _lose(self, line: _Line, how: str) -> None:
        self._drop(line)
        if line.name:  # else a stranger
            self._conclude(f"{line.name} {how}.")

    def _drop(self, line: _Line) -> None:
        self.lines.remove(line)
        line.connection.close()
        self._say_alone()

    def _conclude(self, cause: str) -> None:
        """The first cause is the one; what follows from it is not news."""
        if self.cause:
            return
        self.cause, self.concluded = cause, time.monotonic()
        self._tell_all(end=cause)
        if self.run:
            with contextlib.suppress(OSError):  # a full disk; it is said on standard error too
                write_status(Path(self.run), "failed", cause)
        self._say(cause=cause)

    def _say_alone(self) -> None:
        if self.failed and not self.lines:
            self._say(alone=True)

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the own process is over
            print(json.dumps(message), flush=True)

    def _tell_all(self, **message: str) -> None:
        for line in self.lines:
            if line.name:
                line.send(**message)


def main() -> None:
    # A notice to stop is for the training process, which may need its watchdog until the very end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a line for each process
    try:
        loop = _Loop(**json.loads(sys.argv[1]))
    except OSError as error:
        print(json.dumps({"problem": str(error)}), flush=True)
        return
    print(json.dumps({"port": loop.port}), flush=True)
    loop.watch()


if __name__ == "__main__":
    main()

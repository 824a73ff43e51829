"""Real processes with a watchdog each: whose end it was is said everywhere, and a stranger changes nothing."""

import functools
import json
import os
import signal
import socket
import time

import pytest

from tfm_jax.parallel.watchdog import Watchdog

# Starts a watchdog, says where it is, and does what its standard input says.
PROCESS = """
import json, sys
from pathlib import Path
from tfm_jax.parallel.watchdog import Watchdog
index, timeout, hub, run = json.loads(sys.argv[1])
dog = Watchdog(index, timeout, "secret", hub and tuple(hub))
dog.guard(Path(run))
print(json.dumps({"port": dog.port, "child": dog._child.pid}), flush=True)
for line in sys.stdin:
    if line == "finish\\n":
        dog.finish()
        sys.exit(0)
    if line == "fail\\n":
        dog.leave(7, "no such file.")
    if line == "lost\\n":
        print(json.dumps(dog.lost()), flush=True)
"""


class Process:
    def __init__(self, child):
        self.child, self.pid = child, child.pid

    @functools.cached_property
    def facts(self):
        return self.hear()

    def hear(self):
        return json.loads(self.child.stdout.readline())

    def say(self, word):
        self.child.stdin.write(f"{word}\n")
        self.child.stdin.flush()

    def lost(self):
        self.say("lost")
        return self.hear()


@pytest.fixture
def start(spawn, command_env, tmp_path):
    """Start `count` processes whose watchdogs know each other, each with a run directory."""

    def make(count, timeout=30.0):
        processes = []
        for index in range(count):
            (tmp_path / str(index)).mkdir()
            hub = ["127.0.0.1", processes[0].facts["port"]] if processes else None
            settings = json.dumps([index, timeout, hub, str(tmp_path / str(index))])
            processes.append(Process(spawn(["-c", PROCESS, settings], env=command_env(), stdin=-1)))
        assert all(process.facts for process in processes)
        time.sleep(0.5)  # until the first one has heard the others' names
        return processes

    return make


def named(index, process):
    return f"Process {index} ({socket.gethostname()} pid {process.pid})"


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_is_named_to_all(start, tmp_path, victim):
    processes = start(3)
    processes[victim].child.kill()
    began = time.monotonic()
    for index, process in enumerate(processes):
        if index != victim:
            assert process.lost() == f"{named(victim, processes[victim])} died."
            status = json.loads((tmp_path / str(index) / "status.json").read_text())
            assert (status["state"], status["reason"]) == ("failed", f"{named(victim, processes[victim])} died.")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_says_nothing_more(start, victim):
    """A watchdog that is stopped is a machine that is gone: nothing closes its connections."""
    processes = start(2, timeout=2)
    os.kill(processes[victim].facts["child"], signal.SIGSTOP)
    assert processes[1 - victim].lost() == f"{named(victim, processes[victim])} has not been heard of for 2 s."
    os.kill(processes[victim].facts["child"], signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_leaves_with_its_own_code_and_says_why(start, victim):
    processes = start(2)
    processes[victim].say("fail")
    assert processes[1 - victim].lost() == f"{named(victim, processes[victim])} failed: no such file."
    # Process 0 goes last.
    assert (processes[0].child.poll() is None) and (victim == 0 or processes[1].child.wait(5) == 7)
    processes[1 - victim].say("fail")
    assert [process.child.wait(8) for process in processes] == [7, 7]


def test_strangers_and_a_good_end_are_no_news(start, tmp_path):
    processes = start(2)
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "guess", "name": "Process 7", "end": "all is lost"}\n',
        b"[1]\n",
    ):
        with socket.create_connection(("127.0.0.1", processes[0].facts["port"])) as stranger:
            stranger.sendall(said)
            time.sleep(0.1)
    processes[1].say("finish")
    assert processes[1].child.wait(5) == 0
    time.sleep(0.5)
    processes[0].say("finish")
    assert processes[0].child.wait(5) == 0
    assert not list(tmp_path.rglob("status.json"))


def test_who_only_listens_is_told_nothing(start):
    """Neither the secret, nor the beats (here three a second), nor whose end it was."""
    processes = start(2, timeout=2.0)
    stranger = socket.create_connection(("127.0.0.1", processes[0].facts["port"]), timeout=1.0)
    with stranger:
        with pytest.raises(TimeoutError):
            stranger.recv(1)
        os.kill(processes[1].pid, signal.SIGKILL)
        assert "died" in processes[0].lost()
        stranger.settimeout(10)
        assert stranger.recv(1) == b""  # for who says nothing in two seconds the line is closed


def test_out_of_reach():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="refused"):
            Watchdog(1, 2.0, "secret", ("127.0.0.1", probe.getsockname()[1]))

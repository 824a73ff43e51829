"""Processes on this machine, each with devices of its own."""

from __future__ import annotations

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Literal

from tfm_jax.errors import UserError
from tfm_jax.launch.job import FAILED, FINISHED, MISTAKE, PREEMPTED, Ended, Job, at_least, recorded, say, supervise
from tfm_jax.parallel.watchdog import GRACE


def launch(
    job: Job,
    *,
    processes: int = 1,
    devices: int = 1,
    platform: Literal["cpu", "cuda"] = "cpu",
    restarts: int = 3,
    elastic: int | None = None,
    host_timeout: float = 30.0,
    dry_run: bool = False,
) -> int:
    """Run the job here, and again from its newest checkpoint when a process dies.

    Args:
      processes: how many.
      devices: of each process; on a CPU they are simulated.
      platform: `cpu`, or `cuda` to deal out the GPUs that CUDA_VISIBLE_DEVICES names (else the first ones).
      restarts: how often to start again after a failure or a notice to stop that came to a process.
      elastic: go on with fewer processes after a failure, but not with fewer than this; their number divides the first one.
      host_timeout: seconds after which a process that is silent counts as gone.
      dry_run: print the commands and stop.

    Raises:
      UserError: numbers that do not fit each other or the GPUs.
    """
    at_least(1, processes=processes, devices=devices, elastic=elastic)
    if elastic is not None and elastic > processes:
        raise UserError(f"--elastic={elastic} is more than --processes={processes}.")
    gpus = _gpus(processes * devices) if platform == "cuda" else []
    command = job.command(sys.executable)

    def environment(index: int, count: int, port: int) -> dict[str, str]:
        found = {"TFM_JAX_HOST_TIMEOUT": f"{host_timeout:g}", "JAX_PLATFORMS": platform}
        if platform == "cpu":
            found["JAX_NUM_CPU_DEVICES"] = str(devices)
        else:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * devices : (index + 1) * devices])
        if count > 1:
            found |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        return found

    if dry_run:
        for index in range(processes):
            setting = " ".join(f"{key}={value}" for key, value in environment(index, processes, 12355).items())
            print(f"{setting} {shlex.join(command)}")
        return 0
    count = processes

    def attempt(last: Ended | None) -> Ended:
        nonlocal count
        if elastic is not None and last is not None and last.code != PREEMPTED:
            fewer = [n for n in range(elastic, count) if processes % n == 0]
            if fewer:
                count = fewer[-1]
                say(f"going on with {count} of {processes} processes.")
        port = _free_port()
        return _run(job, command, [environment(index, count, port) for index in range(count)], host_timeout)

    return supervise(job.run, attempt, restarts)


def _run(job: Job, command: list[str], environments: list[dict[str, str]], host_timeout: float) -> Ended:
    """One attempt: start all processes, pass signals on, and wait until all have ended."""
    began, stopped = time.time(), False
    # In sessions of their own: what a terminal sends to its group would reach them twice.
    children = [subprocess.Popen(command, env=os.environ | env, start_new_session=True) for env in environments]
    say(f"started {len(children)} processes, pid {', '.join(str(child.pid) for child in children)}.")

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopped
        for child in children:
            child.kill() if stopped else child.terminate()
        stopped = True

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    first, deadline = None, math.inf
    try:
        while any(child.poll() is None for child in children):
            time.sleep(0.05)
            if first is None and (over := [i for i, child in enumerate(children) if child.returncode is not None]):
                # The others have ended by then, unless their watchdogs have died with them.
                first, deadline = over[0], time.monotonic() + host_timeout + 2 * GRACE
            if time.monotonic() > deadline:
                for child in children:
                    child.kill()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return _ended(job, [child.returncode for child in children], first or 0, stopped, began)


def _ended(job: Job, codes: list[int], first: int, stopped: bool, began: float) -> Ended:
    if not any(codes):
        return Ended(FINISHED, "finished.", stopped)
    if MISTAKE in codes:
        return Ended(MISTAKE, "stopped by a mistake that starting again would repeat; see above.", stopped)
    if set(codes) <= {FINISHED, PREEMPTED}:
        return Ended(PREEMPTED, "told to stop, and saved.", stopped)
    code = codes[first]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return Ended(FAILED, recorded(job.run, began) or f"Process {first} of {len(codes)} {how}.", stopped)


def _gpus(wanted: int) -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(i) for i in range(wanted)] if named is None else [name for name in named.split(",") if name]
    if len(found) < wanted:
        raise UserError(
            f"--processes times --devices is {wanted} GPUs, but CUDA_VISIBLE_DEVICES={named} has {len(found)}."
        )
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

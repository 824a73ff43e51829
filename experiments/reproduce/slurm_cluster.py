"""A Slurm cluster of one node, on this machine, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    absent = [name for name in _PROGRAMS if _find(name) is None]
    if absent:
        return f"{', '.join(absent)} is not here: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd has to be started by root"


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 8) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and slurmd with everything they write in `folder`; gives the variables for their clients.

    Args:
      cpus: that the node claims to have.
    """
    folder = folder.absolute()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    # JAX makes a port of a job's number, so that two clusters on a machine must not both begin with 1.
    first, ports = random.randint(1, 1 << 20), _free_ports(2)
    (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=host, cpus=cpus, ports=ports, first=first))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for name, *arguments in commands:
            with open(folder / f"{name}.out", "wb") as out:
                program = _find(name)
                assert program is not None
                daemons.append(subprocess.Popen([program, *arguments], env=env, stdout=out, stderr=out))
            if name == "munged":
                _wait((folder / "munge.socket").exists, folder, name)
        _wait(lambda: "idle" in _state(env), folder, "slurmctld", "slurmd")
        yield {"SLURM_CONF": env["SLURM_CONF"]}
    finally:
        _cancel_all(env)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def _state(env: dict[str, str]) -> str:
    return subprocess.run(["sinfo", "--noheader", "--format=%t"], env=env, capture_output=True, text=True).stdout


def _cancel_all(env: dict[str, str]) -> None:
    """What still runs would outlive the daemons."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        shown = subprocess.run(["squeue", "--noheader", "--format=%i"], env=env, capture_output=True, text=True)
        if not shown.stdout.split():
            return
        # Twice: the signal that ends the tasks, and the one that takes the job out of the queue.
        subprocess.run(["scancel", "--signal=KILL", "--full", *shown.stdout.split()], env=env, capture_output=True)
        subprocess.run(["scancel", *shown.stdout.split()], env=env, capture_output=True)
        time.sleep(0.5)


def _wait(ready: object, folder: Path, *names: str) -> None:
    assert callable(ready)
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline:
            said = "\n".join((folder / f"{name}.out").read_text()[-2000:] for name in names)
            raise RuntimeError(f"{' and '.join(names)} did not start:\n{said}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


_CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
FirstJobId={first}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

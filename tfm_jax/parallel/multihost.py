"""Several processes as one program: start, agree, and load only the rows that are needed here."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from tfm_jax.errors import UserError
from tfm_jax.parallel import watchdog

# Variables that say a launcher started several processes; JAX finds their details itself.
_LAUNCHERS = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
_OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialise() -> None:
    """Join the other processes if the environment says that there are any; otherwise do nothing.

    Either all of JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or a launcher that
    JAX knows (Slurm's srun, Open MPI's mpirun, a TPU pod) started this process. A watchdog then ends this process when
    another one ends by an error or dies; TFM_JAX_HOST_TIMEOUT is for how many seconds a host may be silent (30).

    Raises:
      UserError: only some of the three are set; a timeout that is none; process 0's watchdog is out of reach.
    """
    timeout = _host_timeout()
    # JAX's own heartbeats come second: they end a process without saying whose end it was.
    beats = int(timeout + 2 * watchdog.GRACE)
    given = [name for name in _OWN if os.environ.get(name)]
    if given:
        if len(given) < len(_OWN):
            missing = ", ".join(sorted(set(_OWN) - set(given)))
            raise UserError(f"{', '.join(given)} is set, but {missing} is not: set all three or none.")
        address, count, index = (os.environ[name] for name in _OWN)
        jax.distributed.initialize(address, int(count), int(index), heartbeat_timeout_seconds=beats)
        return _watch(timeout)
    launched = any(int(os.environ.get(size, "1")) > 1 and rank in os.environ for size, rank in _LAUNCHERS)
    if launched or _tpu_hosts() > 1:
        jax.distributed.initialize(heartbeat_timeout_seconds=beats)
        _watch(timeout)


def _tpu_hosts() -> int:
    """Hosts of the TPU pod or slices that this is one of: what Kubernetes says, or Google's metadata server, which JAX asks."""
    from jax._src.clusters import cloud_tpu_cluster as tpu

    found = (cluster for cluster in (tpu.GkeTpuCluster, tpu.GceTpuCluster) if cluster.is_env_present())
    return next((int(cluster.get_process_count()) for cluster in found), 1)


def _host_timeout() -> float:
    text = os.environ.get("TFM_JAX_HOST_TIMEOUT", "30")
    try:
        timeout = float(text)
    except ValueError:
        timeout = 0.0
    if not timeout >= 1:
        raise UserError(f"TFM_JAX_HOST_TIMEOUT={text}: must be a number of seconds, at least 1.")
    return timeout


def _watch(timeout: float) -> None:
    """Start the watchdog; process 0's says through JAX's key-value store where the others find it."""
    state = distributed.global_state
    assert state.client is not None and state.coordinator_address is not None
    if state.num_processes == 1:
        return
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    try:
        if state.process_id == 0:
            token = secrets.token_hex(16)
            watchdog.here = watchdog.Watchdog(0, timeout, token)
            state.client.key_value_set("tfm_jax/watchdog", f"{watchdog.here.port} {token}")
        else:
            port, token = state.client.blocking_key_value_get("tfm_jax/watchdog", 60_000).split()
            watchdog.here = watchdog.Watchdog(state.process_id, timeout, token, (host, int(port)))
    except ConnectionError as error:
        raise UserError(
            f"The watchdog of process 0 on {host} cannot be reached: {error}. The hosts of a run must be able to connect"
            " to each other on any port."
        ) from None


def is_main() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def agree(facts: Mapping[str, str], problem: str = "") -> None:
    """Stop unless every process has the same facts (config, code revision, data) and none has a problem.

    Args:
      problem: why this process cannot go on; without it the others would wait for it in vain.

    Raises:
      UserError: on every process, naming the first process with a problem, or that differs from process 0 and in what.
    """
    if jax.process_count() == 1:
        return
    mine = {"host": f"{socket.gethostname()} pid {os.getpid()}", "problem": problem, "facts": dict(facts)}
    gathered = [json.loads(text) for text in _gather_text(json.dumps(mine))]
    for index, other in enumerate(gathered):
        if other["problem"]:
            raise UserError(f"Process {index} ({other['host']}) cannot start: {other['problem']}")
    first = gathered[0]
    for index, other in enumerate(gathered):
        for name in facts:
            if other["facts"][name] != first["facts"][name]:
                raise UserError(
                    f"Process {index} ({other['host']}) has {name} {other['facts'][name]}, but process 0 ({first['host']}) has"
                    f" {first['facts'][name]}. All processes must run the same code, config and data."
                )


def global_batch(dataset: Any, step: int, sharding: NamedSharding) -> Any:
    """The batch of a step as arrays split over the mesh; each process loads only the rows its devices hold."""
    if jax.process_count() == 1:
        return jax.device_put(dataset.batch_at(step), sharding)
    size = dataset.batch_size
    held = sharding.addressable_devices_indices_map((size,)).values()
    rows = np.unique(np.concatenate([np.arange(size)[index[0]] for index in held if index is not None]))
    local = dataset.batch_at(step, rows)

    def assemble(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = np.arange(size)[index[0]]
            piece: np.ndarray = leaf[np.searchsorted(rows, wanted)][(slice(None), *index[1:])]
            return piece

        return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(assemble, local)


def whole(tree: Any) -> Any:
    """Arrays that are split over devices and processes, as numpy arrays; every process must call this."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _gather_text(text: str) -> list[str]:
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(data.size))
    padded = np.zeros(int(np.max(lengths)), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[: int(n)]).decode() for row, n in zip(rows, np.ravel(lengths), strict=True)]

"""Several processes as one program: start, agree, and load only the rows that are needed here."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from tfm_jax.errors import UserError

# Variables that say a launcher started several processes; JAX finds their details itself.
_LAUNCHERS = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))
_OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialise() -> None:
    """Join the other processes if the environment says that there are any; otherwise do nothing.

    Either all of JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or a launcher that
    JAX knows (Slurm's srun, Open MPI's mpirun, a TPU pod) started this process.

    Raises:
      UserError: only some of the three are set.
    """
    given = [name for name in _OWN if os.environ.get(name)]
    if given:
        if len(given) < len(_OWN):
            missing = ", ".join(sorted(set(_OWN) - set(given)))
            raise UserError(f"{', '.join(given)} is set, but {missing} is not: set all three or none.")
        address, count, index = (os.environ[name] for name in _OWN)
        jax.distributed.initialize(address, int(count), int(index))
        return
    launched = any(int(os.environ.get(size, "1")) > 1 and rank in os.environ for size, rank in _LAUNCHERS)
    if launched or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


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


def any_process(flag: bool) -> bool:
    """Whether the flag is set anywhere; every process must call this at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


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

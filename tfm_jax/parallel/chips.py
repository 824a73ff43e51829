"""What chips can do, from their makers' data sheets, and how long they take to tell each other something."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.parallel.devices import PEAK, peak_flops
from tfm_jax.parallel.hlo import Collective


@dataclass(frozen=True)
class Chip:
    """One chip of a pod.

    Attributes:
      flops: of bfloat16 products, a second.
      hbm: bytes of memory.
      hbm_rate: bytes a second to and from it.
      link_rate: bytes a second both ways together, along one dimension of the torus of chips; of GPUs, through their switch.
      network_rate: bytes a second between slices, its share of the host's.
    """

    name: str
    flops: float
    hbm: float
    hbm_rate: float
    link_rate: float
    network_rate: float


_GIB = 2.0**30
# cloud.google.com/tpu/docs, pages of each version: inter-chip bandwidth over the dimensions of its torus (two for v5e and v6e,
# three for v5p), data-centre bandwidth over the chips of a host. GPUs: the makers' data sheets of the SXM cards, NVLink, and
# one 400 Gb/s adapter for each (200 Gb/s for A100).
CHIPS = {
    "v5e": Chip("v5e", PEAK["v5e"], 16 * _GIB, 819e9, 100e9, 6.25e9),
    "v5p": Chip("v5p", PEAK["v5p"], 95 * _GIB, 2765e9, 200e9, 6.25e9),
    "v6e": Chip("v6e", PEAK["v6e"], 32 * _GIB, 1640e9, 224e9, 12.5e9),
    "A100": Chip("A100", PEAK["A100"], 80e9, 2039e9, 600e9, 25e9),
    "H100": Chip("H100", PEAK["H100"], 80e9, 3350e9, 900e9, 50e9),
    "H200": Chip("H200", PEAK["H200"], 141e9, 4800e9, 900e9, 50e9),
}
# From a chip to its neighbour.
HOP = 1e-6


def seconds(chip: Chip, collective: Collective, *, dimensions: int, across: bool) -> float:
    """How long all runs of a collective take, alone on its links: bytes over their rate, but at least a hop for each chip on the
    way.

    A gather and a scatter move all but their own part, both ways round a ring in each dimension; a reduction is both. In an
    all-to-all the average byte goes a quarter of the way round. A permutation goes one way.

    Args:
      dimensions: of the torus along which its groups lie.
      across: whether they reach into other slices.
    """
    rate = chip.network_rate if across else chip.link_rate * max(dimensions, 1)
    n = collective.group
    others = (n - 1) / n
    moved = {
        "all-gather": others,
        "reduce-scatter": others,
        "all-reduce": 2 * others,
        "all-to-all": n / 4 * others,
        "ragged-all-to-all": n / 4 * others,
        "collective-permute": 2.0,
    }[collective.kind]
    hops = n ** (1 / max(dimensions, 1)) * max(dimensions, 1) / 2 if collective.kind != "collective-permute" else 1
    return collective.times * max(moved * collective.size / rate, math.ceil(hops) * HOP)


def of(devices: Sequence[Any]) -> Chip:
    """What devices that are here can do: GPUs by their data sheet, CPU devices, which share the cores, by a quick measurement.

    Raises:
      UserError: a GPU whose data sheet is not here.
    """
    kind = devices[0].device_kind
    if devices[0].platform != "cpu":
        found = next((chip for name, chip in CHIPS.items() if name.lower() in kind.lower()), None)
        if found is None:
            raise UserError(f"There is no data sheet of {kind!r} in CHIPS, which has: {', '.join(CHIPS)}.")
        return found
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    # A collective of simulated devices is a copy.
    rate = _copied(devices[0]) / len(devices)
    flops = (peak_flops() or 0.0) * len(jax.local_devices()) / len(devices)
    return Chip("cpu", flops, memory, rate, rate, rate)


def _copied(device: Any) -> float:
    """Bytes a second that a sum with a number reads and writes, in the best of five runs over 256 MiB."""
    x = jax.device_put(jnp.zeros(2**26, jnp.float32), device)
    add, best = jax.jit(lambda x: x + 1.0), math.inf
    add(x).block_until_ready()
    for _ in range(5):
        began = time.perf_counter()
        add(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * x.nbytes / best

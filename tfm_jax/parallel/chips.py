"""What chips can do, from their makers' data sheets, and how long they take to tell each other something."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tfm_jax.parallel.hlo import Collective


@dataclass(frozen=True)
class Chip:
    """One chip of a pod.

    Attributes:
      flops: of bfloat16 products, a second.
      hbm: bytes of memory.
      hbm_rate: bytes a second to and from it.
      link_rate: bytes a second both ways together, along one dimension of the torus of chips.
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
# three for v5p), data-centre bandwidth over the chips of a host.
CHIPS = {
    "v5e": Chip("v5e", 197e12, 16 * _GIB, 819e9, 100e9, 6.25e9),
    "v5p": Chip("v5p", 459e12, 95 * _GIB, 2765e9, 200e9, 6.25e9),
    "v6e": Chip("v6e", 918e12, 32 * _GIB, 1640e9, 224e9, 12.5e9),
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

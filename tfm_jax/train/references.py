"""What general compressors make of the held-out bytes, to stand beside a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def compressors(facts: Mapping[str, Mapping[str, Any]], split: str = "validation") -> dict[str, float]:
    """Bits per byte of general compressors on a split, where the data set knows them."""
    found = facts.get(split, {})
    return {
        f"{tool} -9": 8 * found[f"{tool}_bytes"] / found["bytes"] for tool in ("gzip", "xz") if f"{tool}_bytes" in found
    }


def as_loss(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The same rates in nats a token, the unit of the loss."""
    found = facts.get("validation", {})
    return {
        name: rate * math.log(2) * found["bytes"] / (found["tokens"] - 1) for name, rate in compressors(facts).items()
    }

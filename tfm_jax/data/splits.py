"""Which split a file or record belongs to."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from tfm_jax.errors import UserError, nearest

RULES = ("auto", "names", "hash", "tail", "all")
NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Keep:
    """Take only the records that fall into `split` when `fraction` of them, by a hash of their key, is validation."""

    split: str
    fraction: float

    def __call__(self, key: str) -> bool:
        return (draw(key) < self.fraction) == (self.split == "validation")


def draw(key: str) -> float:
    """A number in [0, 1) that is a hash of the key."""
    return int.from_bytes(hashlib.md5(key.encode()).digest()[:8], "big") / 2**64


def split_in_name(name: str) -> str | None:
    """The split that a file or split name holds as a word of its own; None for none, or for two."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {NAMES[word] for word in words if word in NAMES}
    return found.pop() if len(found) == 1 else None


def check_rule(rule: str, valid_fraction: float | None) -> None:
    if rule not in RULES:
        raise UserError(f"data.split is {rule!r}.{nearest(rule, RULES)}")
    if valid_fraction is not None and not 0 < valid_fraction < 1:
        raise UserError(f"data.valid_fraction is {valid_fraction}; it must lie between 0 and 1.")

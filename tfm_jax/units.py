"""Numbers as people read them."""

from __future__ import annotations


def short(value: float) -> str:
    """1.23 M."""
    value = float(f"{value:.3g}")  # first, so that 999,600 is 1 M
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

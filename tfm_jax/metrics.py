"""Which way a metric is better, by its name."""

from __future__ import annotations

from typing import Literal

Goal = Literal["lower", "higher"]

# The last words of names that leave no doubt.
_RISING = (
    "accuracy", "top5", "f1", "precision", "recall", "exact_match", "matthews", "pearson", "spearman", "bleu", "bleu_lowercase",
    "chrf", "rouge1", "rouge2", "rougeL", "per_s", "per_sec",
)  # fmt: skip
_FALLING = ("loss", "perplexity", "bits_per_byte", "error", "seconds", "norm", "frac", "_s")


def goal_of(metric: str) -> Goal | None:
    """Whether less or more of a metric is better; None where its name does not say."""
    name = metric.rpartition("/")[2]
    # A rate ends as a time does.
    if name.endswith(_RISING):
        return "higher"
    return "lower" if name.endswith(_FALLING) else None


def direction(metric: str) -> Goal:
    """As `goal_of`; where the name does not say, more is better: most figures that people make up are scores."""
    return goal_of(metric) or "higher"

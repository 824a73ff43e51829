"""Which way a metric is better, by its name."""

from __future__ import annotations

from typing import Literal

Goal = Literal["lower", "higher"]

# The last words of names that leave no doubt.
_RISING = (
    "accuracy", "top5", "f1", "precision", "recall", "exact_match", "matthews", "pearson", "spearman", "bleu", "bleu_lowercase",
    "chrf", "rouge1", "rouge2", "rougeL",
)  # fmt: skip
_FALLING = ("loss", "perplexity", "bits_per_byte", "error", "seconds", "norm", "frac", "_s")


def goal_of(metric: str) -> Goal | None:
    """Whether less or more of a metric is better; None where its name does not say."""
    name = metric.rpartition("/")[2]
    if name.endswith(_FALLING) and not name.endswith("per_s"):
        return "lower"
    return "higher" if name.endswith(_RISING) else None

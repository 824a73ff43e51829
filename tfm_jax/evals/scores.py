"""Scores of a split's predictions as a whole: Matthews' and Pearson's and Spearman's correlation, F1 (extra: metrics)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluator, first_prediction, needed, predictions
from tfm_jax.tasks.base import targets_of

Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]
NUMBERS = ("pearson", "spearman")


def make(
    context: Context,
    *,
    metrics: Sequence[Metric],
    split: str = "validation",
    batch_size: int | None = None,
) -> Evaluator:
    """An evaluator of a training state, from 0 to 1 (correlations from -1).

    Args:
      metrics: for classes `accuracy`, `f1` (of class 1 among two), `macro_f1`, `matthews` (1975); for numbers `pearson` and
        `spearman`.
      split: of the data set.
      batch_size: rows at a time; the training batch if None.

    Raises:
      UserError: no metric is asked for, a library is not installed, the task predicts no classes or numbers, or a score is not of
        what the data has; given a state, a score that is not of what the task predicts.
    """
    if not metrics:
        raise UserError("evals: metrics is empty: give for instance ('matthews',).")
    needed("sklearn", "evals: scores")
    needed("scipy", "evals: scores")
    if "predict" not in context.task.predict_fns:
        raise UserError("evals: scores needs a task that predicts a class or a number for each example.")
    dataset = context.data.evals(split, context.rows(batch_size))
    kind = targets_of(dataset.batch_at(0)).dtype.kind
    if "f1" in metrics:
        _check_two(_classes(context.model, split))
    for metric in metrics:
        if kind == "f" and metric not in NUMBERS:
            raise UserError(f"evals: {metric} is a score of classes, and this data has numbers: {', '.join(NUMBERS)}.")
        if kind != "f" and metric in NUMBERS:
            classes = ", ".join(name for name in get_args(Metric) if name not in NUMBERS)
            raise UserError(f"evals: {metric} is a score of numbers, and this data has classes: {classes}.")

    def evaluate(state: Any) -> dict[str, float]:
        targets, found = list[np.ndarray](), list[np.ndarray]()
        for batch, made in predictions(context, state, dataset, "predict"):
            shown = batch["weights"] > 0
            targets.append(targets_of(batch)[shown])
            found.append(made["prediction"][shown])
        wanted, values = np.concatenate(targets), np.concatenate(found)
        return {metric: scored(metric, wanted, values) for metric in metrics} | {"examples": float(len(wanted))}

    def gives(state: Any) -> tuple[str, ...]:
        found = first_prediction(context, state, dataset, "predict")["prediction"]
        for metric in metrics:
            _check_kind(metric, found.ndim)
        return (*metrics, "examples")

    return Evaluator(evaluate, gives)


def _classes(model: Any, split: str) -> int | None:
    """How many a model tells apart, of a mixture that of the split's part; None where it does not say."""
    found = getattr(model, "classes", None)
    return found.get(split.partition("/")[0]) if isinstance(found, Mapping) else found


def _check_two(classes: int | None) -> None:
    if classes not in (None, 2):
        raise UserError(f"evals: f1 is of class 1 among two; this task has {classes}. Take macro_f1.")


def _check_kind(metric: str, ndim: int) -> None:
    """Predictions are logits (N, C) of classes, or numbers (N,)."""
    if metric in NUMBERS and ndim != 1:
        raise UserError(f"evals: {metric} is a score of numbers, and this task predicts classes.")
    if metric not in NUMBERS and ndim != 2:
        raise UserError(f"evals: {metric} is a score of classes, and this task predicts numbers.")


def scored(metric: str, wanted: np.ndarray, found: np.ndarray) -> float:
    """One score of predictions: logits (N, C) of classes (N,), or numbers (N,)."""
    _check_kind(metric, found.ndim)
    if metric in NUMBERS:
        stats = needed("scipy.stats", "evals: scores")
        which = stats.pearsonr if metric == "pearson" else stats.spearmanr
        return float(which(wanted, found).statistic)
    measures, chosen = needed("sklearn.metrics", "evals: scores"), np.argmax(found, axis=-1)
    if metric == "accuracy":
        return float(measures.accuracy_score(wanted, chosen))
    if metric == "matthews":
        return float(measures.matthews_corrcoef(wanted, chosen))
    if metric == "f1":
        _check_two(found.shape[1])
    return float(measures.f1_score(wanted, chosen, average="binary" if metric == "f1" else "macro"))

"""Exact match and F1 of answers, by the rules of SQuAD 1.1 (Rajpurkar et al. 2016, section 6.1)."""

from __future__ import annotations

import collections
import logging
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluator, first_prediction, predictions

log = logging.getLogger(__name__)


def make(context: Context, *, split: str = "validation", longest: int = 30, batch_size: int | None = None) -> Evaluator:
    """An evaluator of a training state.

    The answer to a question is the stretch of at most `longest` tokens, in any of its windows, whose first and last token
    have the largest sum of logits.

    Args:
      split: of a data set of questions (`data.questions`).
      longest: tokens of an answer.
      batch_size: windows at a time; the training batch if None.

    Returns:
      A function from a `TrainState` to `exact_match` and `f1`, from 0 to 100, and `questions`.

    Raises:
      UserError: the data or the task is not one of questions.
    """
    if longest < 1:
        raise UserError(f"evals: longest={longest}: must be at least 1.")
    dataset: Any = context.data.evals(split, context.rows(batch_size))
    if not hasattr(dataset, "shown"):
        raise UserError("evals: squad needs questions with answers: data.name=questions.")
    if "spans" not in context.task.predict_fns:
        raise UserError("evals: squad needs a task that marks spans: task.name=span_extraction.")

    def evaluate(state: Any) -> dict[str, float]:
        found, wanted = answers(context, state, dataset, longest), dataset.references
        log.info("evals: for instance %r, where the answer is %r.", found[len(found) // 2], wanted[len(found) // 2][0])
        return scored(found, wanted) | {"questions": float(len(wanted))}

    def gives(state: Any) -> tuple[str, ...]:
        first_prediction(context, state, dataset, "spans")
        return "exact_match", "f1", "questions"

    return Evaluator(evaluate, gives)


def answers(context: Context, state: Any, dataset: Any, longest: int) -> list[str]:
    """One for each question, in the data's own order; see `make`."""
    best: dict[int, tuple[float, str]] = {}
    for step, (_, made) in enumerate(predictions(context, state, dataset, "spans")):
        for row, (owner, first, places) in zip(made["logits"], dataset.shown(step), strict=False):
            found = best_span(row[first : first + len(places)], longest)
            if found is not None and (owner not in best or found[0] > best[owner][0]):
                score, start, stop = found
                # A byte-level token's stretch begins with the space before its word.
                best[owner] = score, dataset.text(owner, int(places[start, 0]), int(places[stop, 1])).strip()
    return [best.get(i, (0.0, ""))[1] for i in range(len(dataset.references))]


def best_span(logits: np.ndarray, longest: int) -> tuple[float, int, int] | None:
    """Score, first and last of the best stretch of positions, from (n, 2) logits; None where there is no position."""
    if not len(logits):
        return None
    sums = logits[:, 0][:, None] + logits[:, 1][None, :]
    apart = np.arange(len(logits))[None, :] - np.arange(len(logits))[:, None]
    sums = np.where((apart >= 0) & (apart < longest), sums, -np.inf)
    start, stop = np.unravel_index(np.argmax(sums), sums.shape)
    return float(sums[start, stop]), int(start), int(stop)


def normal(answer: str) -> str:
    """Lower case, without punctuation, articles and more than one space."""
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def overlap(made: str, wanted: str) -> float:
    """F1 of two answers as bags of words."""
    ours, theirs = normal(made).split(), normal(wanted).split()
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def scored(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over questions, each by its best reference."""
    exact = [max(normal(made) == normal(text) for text in texts) for made, texts in zip(found, wanted, strict=True)]
    f1 = [max(overlap(made, text) for text in texts) for made, texts in zip(found, wanted, strict=True)]
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}

"""Precision, recall and F1 of whole entities, as CoNLL counts them (Tjong Kim Sang and De Meulder 2003), by seqeval."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluator, first_prediction, needed, predictions

SCORES = ("precision", "recall", "f1")


def make(context: Context, *, split: str = "validation", batch_size: int | None = None) -> Evaluator:
    """An evaluator of a training state.

    An entity is right if its type, its first word and its last agree; it begins at `B-TYPE`, and at an `I-TYPE` behind another
    type or `O`; `E-TYPE` ends one, `S-TYPE` is one. Words behind a row's end, and those of a class that the data has no tag
    for, count as outside of any.

    Args:
      split: of a data set of tags (`data.tags`).
      batch_size: rows at a time; the training batch if None.

    Returns:
      A function from a `TrainState` to `precision`, `recall` and `f1`, from 0 to 1, and `sentences`.

    Raises:
      UserError: seqeval is not installed, or the data has no tags, or they mark no entities.
    """
    needed("seqeval", "evals: entities")
    dataset: Any = context.data.evals(split, context.rows(batch_size))
    if not hasattr(dataset, "tagged_words"):
        raise UserError("evals: entities needs words with tags: data.name=tags.")
    strange = [name for name in dataset.names if name != "O" and name[:2] not in ("B-", "I-", "E-", "S-")]
    if strange:
        raise UserError(
            f"evals: entities are marked by O, B-TYPE and I-TYPE (or E-TYPE, S-TYPE); {strange[0]!r} is none of these."
        )

    wanted = [own for step in range(dataset.num_batches) for own, _, _ in dataset.tagged_words(step)]

    def evaluate(state: Any) -> dict[str, float]:
        return scored(wanted, tags(context, state, dataset, "O")) | {"sentences": float(len(wanted))}

    def gives(state: Any) -> tuple[str, ...]:
        first_prediction(context, state, dataset, "next_token")
        return (*SCORES, "sentences")

    return Evaluator(evaluate, gives)


def tags(context: Context, state: Any, dataset: Any, unseen: str | None) -> list[list[str | None]]:
    """Those of each sentence's words, in the pass's order; `unseen` for words without a place in their row, and for classes that
    are no tag of the data's."""
    found = list[list[str | None]]()
    for step, (_, made) in enumerate(predictions(context, state, dataset, "next_token")):
        chosen = np.argmax(made["logits"], axis=-1)
        # A model may have more classes than the data has tags.
        names = [*dataset.names, *[unseen] * (made["logits"].shape[-1] - len(dataset.names))]
        for row, (own, shown, place) in zip(chosen, dataset.tagged_words(step), strict=False):
            guess = [unseen] * len(own)
            for word, position in zip(shown, place, strict=True):
                guess[word] = names[row[position]]
            found.append(guess)
    return found


def scored(wanted: list[list[str]], found: list[list[str | None]]) -> dict[str, float]:
    """Of the tags of each sentence's words."""
    measures = needed("seqeval.metrics", "evals: entities")
    return {name: float(getattr(measures, f"{name}_score")(wanted, found, zero_division=0)) for name in SCORES}

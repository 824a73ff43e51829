"""What is predicted, by name: from the config's keys to what makes a batch of rows of a token stream."""

from __future__ import annotations

import hashlib
from typing import Literal

from tfm_jax.data.noise import Continue, Denoise, Mask, Next, Objective, Prefix, PrefixNext, Span, span_sizes
from tfm_jax.data.segment_pairs import Question, SegmentPairs
from tfm_jax.data.spelling import Words, spelled, word_parts
from tfm_jax.data.types import Tokenizer
from tfm_jax.errors import UserError

Name = Literal["next", "mask", "span", "denoise", "continue", "prefix", "prefix_lm", "order", "follow"]
Unit = Literal["token", "word"]
MASKS = ("[MASK]", "<mask>")


def make(
    name: Name,
    seq_len: int,
    tokenizer: Tokenizer,
    *,
    mask_rate: float | None,
    span_length: float | None,
    decoder_start: int | None = None,
    mask_unit: Unit = "token",
    shuffle_sentences: float = 0.0,
) -> Objective:
    """The objective of the config keys `data.objective`, `data.mask_rate` and so on.

    Raises:
      UserError: a value out of its range, or a key that this objective does not have.
    """
    for key, value in (("mask_rate", mask_rate), ("span_length", span_length)):
        if value is not None and (name in _WHOLE or (key == "span_length" and name in _MASKED)):
            raise UserError(f"data.{key}={value}: the objective {name!r} has none. Leave it out.")
    if mask_unit != "token" and name not in _MASKED:
        raise UserError(f"data.mask_unit={mask_unit!r}: the objective {name!r} masks no tokens. Leave it out.")
    if not 0 <= shuffle_sentences <= 1:
        raise UserError(f"data.shuffle_sentences={shuffle_sentences}: a share of the rows in [0, 1].")
    if shuffle_sentences and name != "denoise":
        raise UserError(f"data.shuffle_sentences={shuffle_sentences}: only the objective 'denoise' does. Leave it out.")
    if name in ("prefix", "prefix_lm") and seq_len < 2:
        raise UserError(f"data.seq_len={seq_len}: the objective {name!r} needs at least 2.")
    if decoder_start is not None and name in ("next", "prefix_lm", *_MASKED):
        raise UserError(f"data.decoder_start={decoder_start}: the objective {name!r} has no decoder. Leave it out.")
    start = tokenizer.end_id if decoder_start is None else decoder_start
    if mask_rate is not None and not 0 < mask_rate < 1:
        raise UserError(f"data.mask_rate={mask_rate}: a share of the tokens in (0, 1).")
    if span_length is not None and span_length < 1:
        raise UserError(f"data.span_length={span_length}: must be at least 1.")
    first = tokenizer.vocab_size
    if name == "next":
        return Next(seq_len)
    if name == "prefix_lm":
        return PrefixNext(seq_len)
    if name == "continue":
        return Continue(seq_len, start)
    if name == "prefix":
        return Prefix(seq_len, tokenizer.end_id, start)
    mask = next((found for mark in MASKS if (found := tokenizer.token_id(mark)) is not None), None)
    if name in _MASKED:
        words = word_parts(tokenizer.pieces()) if mask_unit == "word" else None
        made = Mask(seq_len, tokenizer.end_id, first if mask is None else mask, first, mask_rate or 0.15, words)
        question = next((question for question in _QUESTIONS if question == name), None)
        return made if question is None else SegmentPairs.of(made, tokenizer.frame(), question)
    if name == "denoise":
        mask = first if mask is None else mask
        texts = spelled(tokenizer.pieces()) if shuffle_sentences else ()
        return Denoise(
            seq_len,
            tokenizer.end_id,
            start,
            mask,
            first,
            mask_rate or 0.3,
            span_length or 3.0,
            shuffle_sentences,
            texts,
        )
    window, noise, spans = span_sizes(seq_len, mask_rate or 0.15, span_length or 3.0)
    sentinels = [tokenizer.token_id(f"<extra_id_{i}>") for i in range(spans)]
    own = [i for i in sentinels if i is not None]
    if own and len(own) < spans:
        raise UserError(
            f"data.seq_len={seq_len} needs {spans} spans, but the tokenizer has only {len(own)} sentinels"
            " (<extra_id_0>, ...). Shorten it, or take longer spans (data.span_length)."
        )
    marks = own or list(range(first, first + spans))
    return Span(window, noise, tuple(marks), tokenizer.end_id, start, first)


def marks(objective: Objective) -> list[str]:
    """Names of the ids that an objective has put behind the tokenizer's own, as other libraries write them."""
    if isinstance(objective, Span):
        return [f"<extra_id_{i}>" for i in range(objective.added)]
    return [MASKS[0]] * objective.added


def fingerprint(objective: Objective) -> str:
    """Of the rows that an objective makes: what it is, and a digest of what its text does not show of the vocabulary."""
    words: Words | None = getattr(getattr(objective, "mask", objective), "words", None)
    # WordPiece's words are those of its own marks, now as in runs from before this digest.
    tables = [*words] if words and any(words.last) else []
    if texts := getattr(objective, "spelled", ()):
        tables.append(b"\n".join(texts))
    return " ".join([repr(objective), *(hashlib.sha256(table).hexdigest() for table in tables)])


# Objectives that hide nothing of what they show, and those of masked tokens.
_WHOLE = ("next", "continue", "prefix", "prefix_lm")
_QUESTIONS: tuple[Question, ...] = ("order", "follow")
_MASKED = ("mask", *_QUESTIONS)

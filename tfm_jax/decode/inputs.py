"""What every way of decoding begins with: prompts and sources as arrays, and the model as a function of one step.

B batch, P prompt length (padded), S source length (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.errors import UserError

# (tokens, positions, caches, whether it is the first call) -> logits (B, T, V) float32, caches.
Forward = Callable[[jax.Array, jax.Array, Any, bool], tuple[jax.Array, Any]]


class Inputs(NamedTuple):
    """tokens (B, P) int32 and lengths (B,); for encoder-decoders also the source (B, S) int32 and valid (B, S) bool; for
    prefix language models the lengths once more, of what is seen both ways."""

    tokens: Any
    lengths: Any
    source: Any
    valid: Any
    prefix: Any


def ends_of(end_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a text; none for None."""
    return () if end_id is None else (end_id,) if isinstance(end_id, int) else tuple(end_id)


def is_end(tokens: jax.Array, ends: tuple[int, ...]) -> jax.Array:
    found = jnp.zeros(tokens.shape, bool)
    for end in ends:
        found = found | (tokens == end)
    return found


def largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k`; without the barrier XLA on CPU joins it with slices of its results, and sorts the whole instead."""
    values, places = jax.lax.optimization_barrier(jax.lax.top_k(x, count))
    return values, places


def prepare(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None,
    max_new: int,
    prefix: bool = False,
) -> Inputs:
    """Prompts (a decoder's first tokens, where there are sources) padded at their ends.

    Raises:
      UserError: an empty prompt or source, an id outside the vocabulary, more positions than the model has.
    """
    if not prompts or any(not p for p in prompts):
        raise UserError("The prompt is empty: give at least one token (the end mark starts a new document).")
    if sources is not None and any(not s for s in sources):
        raise UserError("The source is empty: an encoder needs at least one token.")
    vocab, limit = getattr(model, "vocab_size", None), getattr(model, "max_len", None)
    for name, rows in (("prompt", prompts), ("source", sources or [[0]])):
        if vocab is not None and max(map(max, rows)) >= vocab:
            raise UserError(f"The {name} has the id {max(map(max, rows))}, but model.vocab_size={vocab}.")
    check_room(model, max(map(len, prompts)), max_new)
    if sources is not None and limit is not None and max(map(len, sources)) > limit:
        raise UserError(f"A source of {max(map(len, sources))} tokens is longer than model.max_len={limit}.")
    tokens, lengths = _padded(prompts, limit if limit is None else limit - max_new)
    if sources is None:
        return Inputs(tokens, lengths, None, None, lengths if prefix else None)
    source, sizes = _padded(sources, limit)
    return Inputs(tokens, lengths, source, np.arange(source.shape[1])[None] < sizes[:, None], None)


def check_room(model: nn.Module, longest: int, max_new: int) -> None:
    """Whether so many tokens fit behind the longest prompt; `prepare` asks it too."""
    if max_new < 1:
        raise UserError(f"max_new={max_new}: must be at least 1.")
    limit = getattr(model, "max_len", None)
    if limit is not None and longest + max_new > limit:
        raise UserError(
            f"A prompt of {longest} token{'s' * (longest != 1)} and max_new={max_new} need {longest + max_new} positions, but"
            f" model.max_len={limit}. Ask for at most {max(limit - longest, 0)} new tokens, or shorten the prompt."
        )


def _padded(rows: Sequence[Sequence[int]], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """To a power of two, so that a session compiles a handful of shapes and not one a prompt."""
    width = 1 << (max(map(len, rows)) - 1).bit_length()
    out = np.zeros((len(rows), width if limit is None else min(width, limit)), np.int32)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out, np.array([len(row) for row in rows], np.int32)


def forward_of(model: nn.Module, params: Any, inputs: Inputs, allowed: int | None) -> Forward:
    """The model with caches; ids at or above `allowed` get logits of -inf."""

    def forward(tokens: jax.Array, positions: jax.Array, caches: Any, first: bool) -> tuple[jax.Array, Any]:
        own = {"positions": positions, "caches": caches, "train": False}
        if inputs.source is None:
            own |= {"prefix": inputs.prefix} if first and inputs.prefix is not None else {}
            out = model.apply({"params": params}, tokens, **own)
        else:
            out = model.apply({"params": params}, inputs.source if first else None, tokens, valid=inputs.valid, **own)
        logits: jax.Array = out["logits"]
        if allowed is not None and allowed < logits.shape[-1]:
            logits = jnp.where((jnp.arange(logits.shape[-1]) >= allowed)[None, None], -jnp.inf, logits)
        return logits, out["caches"]

    return forward


def read_prompt(model: nn.Module, forward: Forward, inputs: Inputs, max_new: int) -> tuple[jax.Array, Any]:
    """The logits behind each row's prompt, (B, V), and caches with room for `max_new` more.

    Positions behind a row's prompt hold padding; they are overwritten before any query can see them.
    """
    batch, padded = inputs.tokens.shape
    caches = model.init_caches(batch, padded + max_new)  # type: ignore[attr-defined]
    places = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32)[None], (batch, padded))
    logits, caches = forward(inputs.tokens, places, caches, True)
    return jnp.take_along_axis(logits, (inputs.lengths - 1)[:, None, None], axis=1)[:, 0], caches

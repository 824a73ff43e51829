"""Beam search with a key/value cache: source, prompt and search are one compiled function.

B batch, K beams, N new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.decode.inputs import Inputs, ends_of, forward_of, is_end, largest, prepare, read_prompt
from tfm_jax.errors import UserError
from tfm_jax.parallel.multihost import whole

Stop = Literal["likely", "sure"]


class Hypothesis(NamedTuple):
    """Tokens without the end mark, and log-probability / length^penalty, the end mark counted in both."""

    tokens: list[int]
    score: float


class _Search(NamedTuple):
    """Where a search is. Scores of live beams are log-probabilities, of finished ones divided by length^penalty."""

    step: jax.Array  # tokens made so far
    logits: jax.Array  # (B, K, V) behind each live beam
    caches: Any  # of B * K rows
    live: jax.Array  # (B, K, N) int32
    live_scores: jax.Array  # (B, K)
    finished: jax.Array  # (B, K, N) int32, -1 behind the end
    finished_scores: jax.Array  # (B, K), -inf where there is none yet
    over: jax.Array  # (B,) bool, rows whose search has ended


def beam_search(
    model: nn.Module,
    params: Any,
    prompts: list[list[int]],
    *,
    sources: list[list[int]] | None = None,
    prefix: bool = False,
    beams: int = 5,
    max_new: int,
    length_penalty: float = 1.0,
    stop: Stop = "likely",
    end_id: int | Sequence[int],
    allowed: int | None = None,
) -> list[list[Hypothesis]]:
    """The likeliest continuations of each prompt, best first, at most `beams` of them.

    Of all continuations of the live beams by a token, the likeliest `beams` that do not end live on; those that end, and
    are among the likeliest `beams`, are finished. A row's search is over when no live beam would be better than its worst
    finished one; at `max_new` tokens the live beams count as finished.

    Args:
      model, prompts, sources, prefix, max_new, allowed: as in `sample.generate`.
      length_penalty: exponent of the length that a log-probability is divided by; above 0 favours longer texts.
      stop: whether a live beam is judged as it is now (`likely`, the default of `transformers`), or by the best that it can
        come to (`sure`, its `never`), which with a penalty above 0 mostly goes on to `max_new`.

    Raises:
      UserError: fewer than one beam, or see `inputs.prepare`.
    """
    check_beams(model, beams, end_id, allowed)
    inputs = prepare(model, prompts, sources, max_new, prefix)
    found, scores = _search(model, params, inputs, beams, max_new, length_penalty, stop, ends_of(end_id), allowed)
    out = []
    # The model may have split the rows over processes.
    for rows, row_scores in zip(*whole((found, scores)), strict=True):
        kept = [(row, score) for row, score in zip(rows, row_scores, strict=True) if score > -np.inf]
        out.append([Hypothesis([int(t) for t in row if t >= 0], float(score)) for row, score in kept])
    return out


def check_beams(model: nn.Module, beams: int, end_id: int | Sequence[int], allowed: int | None) -> None:
    """Whether so many can be looked at; `beam_search` asks it too."""
    if beams < 1:
        raise UserError(f"beams={beams}: must be at least 1.")
    vocab = min(x for x in (allowed, getattr(model, "vocab_size", None), 1 << 31) if x is not None)
    ends = ends_of(end_id)
    if (1 + len(ends)) * beams > vocab:
        raise UserError(f"beams={beams}: too many for the {vocab} tokens there are, of which {len(ends)} end a text.")


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6, 7, 8))
def _search(
    model: nn.Module,
    params: Any,
    inputs: Inputs,
    beams: int,
    max_new: int,
    penalty: float,
    stop: Stop,
    end_ids: tuple[int, ...],
    allowed: int | None,
) -> tuple[jax.Array, jax.Array]:
    batch = inputs.tokens.shape[0]
    last, caches = read_prompt(model, forward_of(model, params, inputs, allowed), inputs, max_new)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), inputs)
    forward = forward_of(model, params, repeated, allowed)
    blank = jnp.full((batch, beams, max_new), -1, jnp.int32)
    nothing = jnp.full((batch, beams), -jnp.inf, jnp.float32)

    def advance(s: _Search) -> _Search:
        """One more token for every live beam; the logits of the new ones are not made yet."""
        logp = jax.nn.log_softmax(s.logits, axis=-1) + s.live_scores[:, :, None]
        values, places = largest(logp.reshape(batch, -1), (1 + len(end_ids)) * beams)
        parent, token = places // logp.shape[-1], (places % logp.shape[-1]).astype(jnp.int32)
        grown = jnp.take_along_axis(s.live, parent[:, :, None], axis=1)
        ends = is_end(token, end_ids)
        # As many continuations of a beam end as there are end marks, so that K of those looked at live on.
        ended = jnp.where(ends[:, :beams] & ~s.over[:, None], values[:, :beams] / _norm(s.step + 1, penalty), -jnp.inf)
        finished = _best(
            jnp.concatenate([s.finished, grown[:, :beams]], 1), jnp.concatenate([s.finished_scores, ended], 1), beams
        )
        live_scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, values), beams)
        token, parent = (jnp.take_along_axis(x, kept, axis=1) for x in (token, parent))
        live = jnp.take_along_axis(grown, kept[:, :, None], axis=1).at[:, :, s.step].set(token)
        rows = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        step = s.step + 1
        # Without a penalty above 0 the shortest that a live beam can end with is the best.
        length = step + 1 if penalty <= 0 else step if stop == "likely" else jnp.int32(max_new)
        done = live_scores[:, 0] / _norm(length, penalty) <= finished[1][:, -1]
        over = s.over | (done & (step < max_new))
        return _Search(step, s.logits, _reordered(s.caches, rows), live, live_scores, *finished, over)

    def body(s: _Search) -> _Search:
        tokens = jax.lax.dynamic_index_in_dim(s.live, s.step - 1, axis=2, keepdims=False).reshape(-1, 1)
        positions = (repeated.lengths + s.step - 1)[:, None]
        logits, caches = forward(tokens, positions, s.caches, False)
        return advance(s._replace(logits=logits.reshape(s.logits.shape), caches=caches))

    def going(s: _Search) -> jax.Array:
        return (s.step < max_new) & ~jnp.all(s.over)

    start = nothing.at[:, 0].set(0.0)
    logits = jnp.broadcast_to(last[:, None], (batch, beams, last.shape[-1]))
    caches = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=x.ndim - 4), caches)
    none = jnp.zeros(batch, bool)
    first = advance(_Search(jnp.int32(0), logits, caches, blank, start, blank, nothing, none))
    s = jax.lax.while_loop(going, body, first)
    cut = jnp.where(s.over[:, None], -jnp.inf, s.live_scores / _norm(max_new, penalty))
    return _best(jnp.concatenate([s.finished, s.live], 1), jnp.concatenate([s.finished_scores, cut], 1), beams)


def _norm(length: Any, penalty: float) -> jax.Array:
    return jnp.asarray(length, jnp.float32) ** penalty


def _best(found: jax.Array, scores: jax.Array, beams: int) -> tuple[jax.Array, jax.Array]:
    scores, kept = jax.lax.top_k(scores, beams)
    return jnp.take_along_axis(found, kept[:, :, None], axis=1), scores


def _reordered(caches: Any, rows: jax.Array) -> Any:
    """Caches of which row i goes on from row `rows[i]`. The batch stands before slots, heads and head size.

    An encoder's keys and values are the same for all beams of a row, so they stay.
    """
    many = not hasattr(caches, "own")
    layers = list(caches) if many else [caches]
    moved = [
        layer._replace(own=jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), layer.own)) for layer in layers
    ]
    return tuple(moved) if many else moved[0]

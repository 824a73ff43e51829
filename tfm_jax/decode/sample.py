"""Generate tokens with a key/value cache: prompt and loop are one compiled function.

B batch, P prompt length (padded), N new tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from tfm_jax.decode.inputs import Inputs, ends_of, forward_of, is_end, largest, prepare, read_prompt
from tfm_jax.errors import UserError


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw from the k likeliest only; 0 for all (Fan et al. 2018).
      top_p: draw from the smallest set whose probability reaches p (Holtzman et al. 2020, section 3.1).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: must be at least 0 (0 is greedy).")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be at least 0 (0 is all).")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: a probability in (0, 1].")


def filter_logits(logits_BV: jax.Array, how: Sampling) -> jax.Array:
    """Logits over temperature, with what may not be drawn at -inf."""
    logits = logits_BV / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        least = largest(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < how.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _draw(logits_BV: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    if how.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits_BV, how), axis=-1).astype(jnp.int32)


def generate(
    model: nn.Module,
    params: Any,
    prompts: list[list[int]],
    *,
    sources: list[list[int]] | None = None,
    prefix: bool = False,
    max_new: int,
    sampling: Sampling = Sampling(),
    end_id: int | Sequence[int] | None = None,
    allowed: int | None = None,
    seed: int = 0,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new` tokens, ending at `end_id`, or one of them (which is left out).

    Args:
      model: has `init_caches(batch, length)`, and takes `tokens`, `positions` and `caches`; an encoder-decoder as
        `nn.encdec.EncoderDecoder` does.
      prompts: token ids, at least one each; they may differ in length. A decoder's first ones where there are sources.
      sources: what an encoder reads, one for each prompt.
      prefix: a prompt's tokens see each other both ways, as they have in training with `data.objective=prefix_lm`.
      allowed: ids at or above this are never drawn (a vocabulary padded beyond its tokenizer's).
      on_token: called with the (B,) ids of each step as they come, on the host, while the loop runs; -1 for rows
        that have ended.

    Raises:
      UserError: see `inputs.prepare`.
    """
    sampling.check()
    inputs = prepare(model, prompts, sources, max_new, prefix)
    ends, stream = ends_of(end_id), _Stream(on_token)
    out = _generate(model, params, inputs, jax.random.key(seed), max_new, sampling, ends, allowed, stream)
    # All rows are read at once; the loop leaves -1 after each row's end.
    return [[int(t) for t in row if t >= 0] for row in np.asarray(out)]


class _Stream:
    """The host's side of a stream. Equal by whether there is a listener, so that a new one compiles nothing."""

    current: Callable[[np.ndarray], None] | None = None

    def __init__(self, listener: Callable[[np.ndarray], None] | None) -> None:
        self.listens = listener is not None
        _Stream.current = listener

    def __hash__(self) -> int:
        return hash(self.listens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.listens == self.listens

    @staticmethod
    def emit(ids: Any) -> None:
        if _Stream.current is not None:
            _Stream.current(np.asarray(ids))


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def _generate(
    model: nn.Module,
    params: Any,
    inputs: Inputs,
    key: jax.Array,
    max_new: int,
    how: Sampling,
    ends: tuple[int, ...],
    allowed: int | None,
    stream: _Stream,
) -> jax.Array:
    batch, lengths_B = inputs.tokens.shape[0], inputs.lengths
    forward = forward_of(model, params, inputs, allowed)

    def emit(ids: jax.Array) -> None:
        if stream.listens:
            io_callback(_Stream.emit, None, ids, ordered=True)

    def settle(token: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        done = done | is_end(token, ends)
        return jnp.where(done, -1, token), done

    last, caches = read_prompt(model, forward, inputs, max_new)
    first, done = settle(_draw(last, jax.random.fold_in(key, 0), how), jnp.zeros((batch,), bool))
    emit(first)
    out = jnp.full((batch, max_new), -1, jnp.int32).at[:, 0].set(first)

    def body(carry: Any) -> Any:
        i, token, done, caches, out = carry
        logits, caches = forward(jnp.maximum(token, 0)[:, None], (lengths_B + i - 1)[:, None], caches, False)
        token, done = settle(_draw(logits[:, 0], jax.random.fold_in(key, i), how), done)
        emit(token)
        return i + 1, token, done, caches, out.at[:, i].set(token)

    def going(carry: Any) -> jax.Array:
        return (carry[0] < max_new) & ~jnp.all(carry[2])

    result: jax.Array = jax.lax.while_loop(going, body, (jnp.int32(1), first, done, caches, out))[4]
    return result

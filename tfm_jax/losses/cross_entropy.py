"""Softmax cross-entropy over a vocabulary, with the logits made a chunk at a time if asked.

N positions, in as many dimensions as one likes, D width, V vocabulary, C chunk of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_NV: jax.Array, targets_N: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    """Negative log-likelihood of each target in nats, (N,) float32.

    Args:
      logits_NV: any float dtype; computed in float32.
      targets_N: int ids in [0, V).
      label_smoothing: weight of the uniform distribution in the target (Szegedy et al. 2016, section 7).
      z_loss: weight of log(Z)^2, which keeps the logits from drifting (Chowdhery et al. 2022, section 5).
    """
    logits = logits_NV.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.sum(jnp.where(_one_hot(targets_N, logits.shape[-1]), logits, 0.0), axis=-1)
    return _combine(lse, target, jnp.mean(logits, axis=-1), label_smoothing, z_loss)


def linear_cross_entropy(
    hidden_ND: jax.Array,
    unembedding_VD: jax.Array,
    targets_N: jax.Array,
    *,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of `hidden @ unembedding.T`, and whether the target has the largest logit.

    With `chunk=0` the logits are made once, in the dtype of `hidden`, and kept for the backward pass. With `chunk=C`
    at most (N, C) of them exist at a time: a running log-sum-exp over the vocabulary (Milakov and Gimelshein 2018),
    and once more in the backward pass, which costs a third more arithmetic in this layer.

    Args:
      hidden_ND: (..., D); its dtype is that of the logits and of its gradient; sums are float32.
      unembedding_VD: the table. Products take their operands in its dtype or in that of `hidden`, whichever is narrower.
      targets_N: (...) int ids in [0, V).
      chunk: C, or 0 for the whole vocabulary.
      label_smoothing, z_loss: as in `cross_entropy`.

    Returns:
      loss (N,) float32, and correct (N,) bool, which carries no gradient.
    """
    if chunk < 0:
        raise ValueError(f"chunk={chunk}: must be 0 or a number of vocabulary entries.")
    chunk = 0 if chunk >= unembedding_VD.shape[0] else chunk
    loss, correct = _linear_cross_entropy(hidden_ND, unembedding_VD, targets_N, chunk, label_smoothing, z_loss)
    return loss, jax.lax.stop_gradient(correct)


def _one_hot(targets_N: jax.Array, size: int) -> jax.Array:
    # A comparison fuses into the reductions and splits over a sharded vocabulary; a gather does neither.
    shape = (*targets_N.shape, size)
    return jax.lax.broadcasted_iota(targets_N.dtype, shape, targets_N.ndim) == targets_N[..., None]


def _combine(lse: jax.Array, target: jax.Array, mean: jax.Array, label_smoothing: float, z_loss: float) -> jax.Array:
    loss = lse - (1 - label_smoothing) * target - label_smoothing * mean
    return loss + z_loss * jnp.square(lse)


def _logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return _product(hidden, table, [hidden.ndim - 1], [1], hidden.dtype)


def _split(table_VD: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(n, C, D) chunks and the (n, C) ids of their rows, -1 where padded.

    Strided, so that each chunk takes rows from every shard of a vocabulary that is split over devices.
    """
    vocab, width = table_VD.shape
    count = -(-vocab // chunk)
    rows = -(-vocab // count)
    table = jnp.pad(table_VD, ((0, rows * count - vocab), (0, 0)))
    ids = jnp.arange(rows * count, dtype=jnp.int32)
    ids = jnp.where(ids < vocab, ids, -1)
    return table.reshape(rows, count, width).swapaxes(0, 1), ids.reshape(rows, count).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _linear_cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, chunk: int, label_smoothing: float, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, table, targets, chunk, label_smoothing, z_loss)[0]


def _forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, chunk: int, label_smoothing: float, z_loss: float
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    vocab = table.shape[0]
    if chunk == 0:
        kept = _logits(hidden, table)
        logits = kept.astype(jnp.float32)
        top = jnp.max(logits, axis=-1)
        lse = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
        target = jnp.sum(jnp.where(_one_hot(targets, vocab), logits, 0.0), axis=-1)
        mean = jnp.sum(logits, axis=-1) / vocab
    else:
        kept = None

        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            top, total, target, summed = carry
            rows, ids = xs
            logits = _logits(hidden, rows).astype(jnp.float32)
            ids = _last(ids, targets.ndim)
            real = ids >= 0
            new_top = jnp.maximum(top, jnp.max(jnp.where(real, logits, -jnp.inf), axis=-1))
            weights = jnp.where(real, jnp.exp(logits - new_top[..., None]), 0.0)
            total = total * jnp.exp(top - new_top) + jnp.sum(weights, axis=-1)
            hit = ids == targets[..., None]
            target = target + jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
            return (new_top, total, target, summed + jnp.sum(jnp.where(real, logits, 0.0), axis=-1)), None

        zero = jnp.zeros(targets.shape, jnp.float32)
        (top, total, target, summed), _ = jax.lax.scan(body, (zero - jnp.inf, zero, zero, zero), _split(table, chunk))
        lse, mean = top + jnp.log(total), summed / vocab
    loss = _combine(lse, target, mean, label_smoothing, z_loss)
    return (loss, target >= top), (hidden, table, targets, lse, kept)


def _backward(
    chunk: int, label_smoothing: float, z_loss: float, residuals: Any, cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array, None]:
    hidden, table, targets, lse, kept = residuals
    scale, vocab = cotangents[0][..., None], table.shape[0]

    def logit_gradient(logits: jax.Array, hit: jax.Array, real: jax.Array | None) -> jax.Array:
        p = jnp.exp(logits.astype(jnp.float32) - lse[..., None]) * (1 + 2 * z_loss * lse)[..., None]
        gradient = (p - (1 - label_smoothing) * hit - label_smoothing / vocab) * scale
        return (gradient if real is None else jnp.where(real, gradient, 0.0)).astype(_narrower(hidden, table))

    if chunk == 0:
        d_logits = logit_gradient(kept, _one_hot(targets, vocab), None)
        return _times(d_logits, table, hidden.dtype), _outer(d_logits, hidden).astype(table.dtype), None

    def body(d_hidden: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        rows, ids = xs
        ids = _last(ids, targets.ndim)
        d_logits = logit_gradient(_logits(hidden, rows), ids == targets[..., None], ids >= 0)
        d_hidden = d_hidden + _times(d_logits, rows, jnp.dtype(jnp.float32))
        return d_hidden, _outer(d_logits, hidden)

    start = jnp.zeros(hidden.shape, jnp.float32)
    d_hidden, d_chunks = jax.lax.scan(body, start, _split(table, chunk))
    d_table = d_chunks.swapaxes(0, 1).reshape(-1, table.shape[1])[:vocab]
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype), None


def _outer(d_logits: jax.Array, hidden: jax.Array) -> jax.Array:
    over = range(hidden.ndim - 1)
    return _product(d_logits, hidden, over, over, jnp.dtype(jnp.float32))


def _times(d_logits: jax.Array, table: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _product(d_logits, table, [d_logits.ndim - 1], [0], dtype)


def _product(a: jax.Array, b: jax.Array, of_a: Sequence[int], of_b: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    operands = _narrower(a, b)
    sums = ((of_a, of_b), ((), ()))
    return jax.lax.dot_general(a.astype(operands), b.astype(operands), sums, preferred_element_type=dtype)


def _narrower(a: jax.Array, b: jax.Array) -> jnp.dtype:
    return min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)


def _last(ids_C: jax.Array, ndim: int) -> jax.Array:
    """Beside positions in so many dimensions."""
    return ids_C.reshape((1,) * ndim + (-1,))


_linear_cross_entropy.defvjp(_forward, _backward)

"""Predict tokens: causal or masked language models, sequence to sequence. The data says which tokens.

B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.losses.cross_entropy import cross_entropy, linear_cross_entropy
from tfm_jax.parallel.sharding import merged
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of


def make(*, vocab_chunk: int = 0, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Task:
    """Cross-entropy of `targets` (B, T), weighted by `weights` (B, T).

    Args:
      vocab_chunk: make the logits this many vocabulary entries at a time, so that (B*T, V) never exists in memory;
        0 makes them at once, which is faster where they fit. Needs a model that returns `hidden` and `unembedding`.
      label_smoothing: weight of the uniform distribution in the training target; evaluation has none.
      z_loss: weight of log(Z)^2 in the training loss; evaluation has none. 1e-4 is usual.
    """
    if vocab_chunk < 0:
        raise UserError(f"task.vocab_chunk={vocab_chunk}: 0 for no chunks, or the entries in one.")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"task.label_smoothing={label_smoothing}: a weight in [0, 1).")
    if z_loss < 0:
        raise UserError(f"task.z_loss={z_loss}: must be at least 0.")

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        rngs = None if rng is None else {"dropout": rng}
        out = apply(params, **batch["inputs"], train=train, rngs=rngs)
        if isinstance(targets_of(batch), dict):
            raise UserError(
                "task.name=token_prediction wants no pairs of segments (data.objective=order or follow): set"
                " task.name='masked_pairs'."
            )
        if targets_of(batch).ndim != 2:
            shape = targets_of(batch).shape
            raise UserError(f"task.name=token_prediction wants a token a position; this data's targets are {shape}.")
        targets, weights = merged(targets_of(batch), keep=0), merged(batch["weights"], keep=0)
        smoothing, z = (label_smoothing, z_loss) if train else (0.0, 0.0)
        if "logits" not in out:
            raise UserError(
                f"This model predicts no tokens: it returns {', '.join(sorted(out))}. Give it a task of its own"
                " (task.name), or take its parameters into a model that does (checkpoint.init_from)."
            )
        if "unembedding" in out:
            hidden = merged(out["hidden"])
            nll, correct = linear_cross_entropy(
                hidden, out["unembedding"], targets, chunk=vocab_chunk, label_smoothing=smoothing, z_loss=z
            )
        elif vocab_chunk:
            raise UserError(
                f"task.vocab_chunk={vocab_chunk} needs a model that returns 'hidden' and 'unembedding';"
                f" this one returns {', '.join(sorted(out))}."
            )
        else:
            logits = merged(out["logits"])
            nll = cross_entropy(logits, targets, label_smoothing=smoothing, z_loss=z)
            correct = jnp.argmax(logits, axis=-1) == targets
        # A padded position may hold anything, infinities included; weight 0 must silence it.
        total = jnp.sum(jnp.where(weights > 0, nll * weights, 0.0))
        weight = jnp.sum(weights)
        metrics = {"loss": (total, weight), "accuracy": (jnp.sum(correct * weights), weight)}
        aux: dict[str, Any] = {name: out[name] for name in ("mutables", "memory") if name in out}
        return LossOut(total, weight, metrics, aux)

    return Task(loss=loss, predict_fns={"next_token": _next_token})


def _next_token(apply: Apply, params: Params, extra: Extra, batch: Any) -> dict[str, Any]:
    """The logits at every position, (B, T, V) float32."""
    return {"logits": apply(params, **batch["inputs"], train=False)["logits"]}

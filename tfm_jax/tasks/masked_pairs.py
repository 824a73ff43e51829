"""BERT's pretraining: masked tokens, and how two segments belong together. B batch, T length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.losses.cross_entropy import cross_entropy
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of


def make(*, pair_weight: float = 1.0, vocab_chunk: int = 0) -> Task:
    """The cross-entropy of masked tokens plus that of `pair_logits` (B, 2) with the targets `pair` (B,).

    Next-sentence prediction (Devlin et al. 2019, section 3.1) with `data.objective=follow`, sentence-order prediction (Lan et
    al. 2020) with `order`. The mean of the latter weighs each row by its masked tokens, so that the loss of a batch is a sum
    over its rows.

    Args:
      pair_weight: of the segments' loss.
      vocab_chunk: see `tasks.token_prediction`.
    """
    if pair_weight < 0:
        raise UserError(f"task.pair_weight={pair_weight}: must be at least 0.")
    tokens = token_prediction.make(vocab_chunk=vocab_chunk)

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        targets, said = targets_of(batch), dict[str, Any]()
        if not isinstance(targets, dict):
            raise UserError("task.name=masked_pairs needs pairs of segments: data.objective=order or follow.")

        def listened(params: Params, /, **inputs: Any) -> dict[str, Any]:
            said.update(apply(params, **inputs))
            return said

        out = tokens.loss(listened, params, extra, {**batch, "targets": targets["tokens"]}, rng, train)
        if "pair_logits" not in said:
            raise UserError("task.name=masked_pairs needs a model with model.outputs=('tokens', 'pair').")
        rows = jnp.sum(batch["weights"], axis=1)
        shown = (rows > 0).astype(jnp.float32)
        nll = jnp.where(rows > 0, cross_entropy(said["pair_logits"], targets["pair"]), 0.0)
        right = jnp.argmax(said["pair_logits"], axis=-1) == targets["pair"]
        total = out.total + pair_weight * jnp.sum(nll * rows)
        metrics = {
            "loss": (total, out.weight),
            "token_loss": out.metrics["loss"],
            "token_accuracy": out.metrics["accuracy"],
            "pair_loss": (jnp.sum(nll), jnp.sum(shown)),
            "pair_accuracy": (jnp.sum(right * shown), jnp.sum(shown)),
        }
        return LossOut(total, out.weight, metrics, out.aux)

    # A weight of 1 is a masked token, but the loss is not its negative log-likelihood alone.
    return Task(loss=loss, predict_fns=tokens.predict_fns, unit="position")

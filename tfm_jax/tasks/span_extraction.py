"""Where in a text the answer to a question stands (Devlin et al. 2019, section 4.2). B batch, T length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.losses.cross_entropy import cross_entropy
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of


def make() -> Task:
    """Cross-entropy of `span_logits` (B, T, 2) over the positions with `targets` (B, 2), the first and last of the answer.

    Half of it for each of the two; padding is left out of the softmax. Metrics are `loss` and `accuracy`, how often both
    are right; a window without the answer has the first position for both.
    """

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        rngs = None if rng is None else {"dropout": rng}
        out = apply(params, **batch["inputs"], train=train, rngs=rngs)
        targets, weights = targets_of(batch), batch["weights"]
        if "span_logits" not in out:
            raise UserError(
                f"This model marks no spans: it returns {', '.join(sorted(out))}. Try model.outputs=('span',)."
            )
        if targets.ndim != 2 or targets.shape[1] != 2:
            raise UserError(
                f"task.name=span_extraction wants a first and a last position a row; this data's targets are {targets.shape}."
            )
        logits = _masked(out["span_logits"], batch["inputs"]["valid"])
        nll = (
            cross_entropy(logits[..., 0], targets[:, 0], label_smoothing=0.0)
            + cross_entropy(logits[..., 1], targets[:, 1], label_smoothing=0.0)
        ) / 2
        # A padded row may hold anything, infinities included; weight 0 must silence it.
        total, weight = jnp.sum(jnp.where(weights > 0, nll * weights, 0.0)), jnp.sum(weights)
        right = jnp.all(jnp.argmax(logits, axis=1) == targets, axis=-1)
        metrics = {"loss": (total, weight), "accuracy": (jnp.sum(right * weights), weight)}
        aux = {"mutables": out["mutables"]} if "mutables" in out else {}
        return LossOut(total, weight, metrics, aux)

    return Task(loss=loss, predict_fns={"spans": _spans}, unit="window")


def _masked(logits: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid[..., None], logits, -1e9)


def _spans(apply: Apply, params: Params, extra: Extra, batch: Any) -> dict[str, Any]:
    """The logits of each position being the first and the last, (B, T, 2) float32."""
    out = apply(params, **batch["inputs"], train=False)
    return {"logits": _masked(out["span_logits"], batch["inputs"]["valid"])}

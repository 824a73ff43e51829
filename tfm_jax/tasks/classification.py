"""One class for each example. B batch, C classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.losses.cross_entropy import cross_entropy
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of

TOP = 5


def make(*, label_smoothing: float = 0.0) -> Task:
    """Cross-entropy of `logits` (B, C) with `targets` (B,), weighted by `weights` (B,).

    Metrics are `loss`, `accuracy`, and with more than five classes `top5`: how often the target is among the five
    largest logits.

    Args:
      label_smoothing: weight of the uniform distribution in the training target (Szegedy et al. 2016, section 7);
        evaluation has none.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"task.label_smoothing={label_smoothing}: a weight in [0, 1).")

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        rngs = None if rng is None else {"dropout": rng}
        out = apply(params, **batch["inputs"], train=train, rngs=rngs)
        if "logits" not in out:
            raise UserError(f"This model gives no class: it returns {', '.join(sorted(out))}. See model.outputs.")
        logits, targets, weights = out["logits"], targets_of(batch), batch["weights"]
        if targets.ndim != 1:
            raise UserError(f"task.name=classification wants one class a row; this data's targets are {targets.shape}.")
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise UserError(
                "task.name=classification wants classes, and this data's targets are numbers: try regression."
            )
        if logits.ndim != 2:
            raise UserError(f"This model's logits are {logits.shape}, a class for each example wants (B, classes).")
        nll = cross_entropy(logits, targets, label_smoothing=label_smoothing if train else 0.0)
        # A padded row may hold anything, infinities included; weight 0 must silence it.
        total = jnp.sum(jnp.where(weights > 0, nll * weights, 0.0))
        weight = jnp.sum(weights)
        metrics = {"loss": (total, weight)}
        for name, k in {"accuracy": 1, f"top{TOP}": TOP}.items():
            if k == 1 or k < logits.shape[-1]:
                hit = jnp.any(jax.lax.top_k(logits, k)[1] == targets[:, None], axis=-1)
                metrics[name] = (jnp.sum(hit * weights), weight)
        aux = {"mutables": out["mutables"]} if "mutables" in out else {}
        return LossOut(total, weight, metrics, aux)

    return Task(loss=loss, predict_fns={"predict": _predict}, unit="example")


def _predict(apply: Apply, params: Params, extra: Extra, batch: Any) -> dict[str, Any]:
    """The logits of every class, (B, C) float32."""
    return {"prediction": apply(params, **batch["inputs"], train=False)["logits"]}

"""A number for each example. B batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of


def make(*, scale: float = 1.0) -> Task:
    """Squared error of `logits` (B, 1) and `targets` (B,) over `scale`, weighted by `weights` (B,).

    Metrics are `loss`, and `absolute_error` in the targets' own unit.

    Args:
      scale: the targets are divided by it, so that a model learns numbers near 1 (5 for similarities from 0 to 5).
    """
    if scale <= 0:
        raise UserError(f"task.scale={scale}: must be above 0.")

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        rngs = None if rng is None else {"dropout": rng}
        out = apply(params, **batch["inputs"], train=train, rngs=rngs)
        if "logits" not in out:
            raise UserError(f"This model gives no number: it returns {', '.join(sorted(out))}. See model.outputs.")
        if out["logits"].ndim != 2 or out["logits"].shape[1] != 1:
            raise UserError(
                f"This model's logits are {out['logits'].shape}, a number for each example wants (B, 1): data.kind='number' has it."
            )
        targets = targets_of(batch)
        if targets.ndim != 1:
            raise UserError(f"task.name=regression wants one number a row; this data's targets are {targets.shape}.")
        # A padded row may hold anything, infinities included; weight 0 must silence it.
        weights = batch["weights"]
        error = jnp.where(weights > 0, out["logits"][:, 0] - targets / scale, 0.0)
        weight = jnp.sum(weights)
        total = jnp.sum(error**2 * weights)
        metrics = {"loss": (total, weight), "absolute_error": (scale * jnp.sum(jnp.abs(error) * weights), weight)}
        aux = {"mutables": out["mutables"]} if "mutables" in out else {}
        return LossOut(total, weight, metrics, aux)

    return Task(loss=loss, predict_fns={"predict": _predict(scale)}, unit="example")


def _predict(scale: float) -> Any:
    def predict(apply: Apply, params: Params, extra: Extra, batch: Any) -> dict[str, Any]:
        """The number of each example, (B,) float32."""
        return {"prediction": scale * apply(params, **batch["inputs"], train=False)["logits"][:, 0]}

    return predict

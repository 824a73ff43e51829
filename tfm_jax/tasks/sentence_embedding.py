"""Texts as points: near each other if they mean the same. B pairs of texts, T length, D width."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.losses.contrastive import in_batch
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, targets_of


def make(
    *, loss: Literal["contrastive", "cosine"] = "contrastive", temperature: float = 0.05, scale: float = 1.0
) -> Task:
    """One model's `embedding` (B, D) of the texts in `inputs` and of those in `other`, which belong together.

    `contrastive`: each text is to find its partner among the batch's, see `losses.contrastive`; targets are not read. The metric
    `accuracy` says how often it does. `cosine`: the squared error of their cosine and `targets` (B,) over `scale`
    (Reimers and Gurevych 2019, section 3), with the metric `absolute_error` in the targets' own unit.

    Args:
      loss: which of them.
      temperature: of `contrastive`; Henderson et al.'s scale of 20 is 0.05.
      scale: of `cosine`; 5 for similarities from 0 to 5.

    Raises:
      UserError: a value out of its range, a model that gives no embedding, or data without pairs.
    """
    if temperature <= 0:
        raise UserError(f"task.temperature={temperature}: must be above 0.")
    if scale <= 0:
        raise UserError(f"task.scale={scale}: must be above 0.")

    def compare(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        first, second = _both(apply, params, batch, rng, train)
        weights = batch["weights"]
        weight = jnp.sum(weights)
        if loss == "contrastive":
            each, found = in_batch(first, second, weights, temperature)
            total, more = jnp.sum(each * weights), {"accuracy": (jnp.sum(found * weights), weight)}
        else:
            if not jnp.issubdtype(targets_of(batch).dtype, jnp.floating):
                raise UserError(
                    "task.loss='cosine' learns numbers, and this data's targets are classes: set data.kind='number'."
                )
            # A padded row may hold anything, infinities included; weight 0 must silence it.
            error = jnp.where(weights > 0, jnp.sum(first * second, axis=-1) - targets_of(batch) / scale, 0.0)
            total = jnp.sum(error**2 * weights)
            more = {"absolute_error": (scale * jnp.sum(jnp.abs(error) * weights), weight)}
        return LossOut(total, weight, {"loss": (total, weight), **more}, {})

    def predict(apply: Apply, params: Params, extra: Extra, batch: Any) -> dict[str, Any]:
        """The cosine of each pair, times the scale, (B,) float32."""
        first, second = _both(apply, params, batch, None, False)
        return {"prediction": scale * jnp.sum(first * second, axis=-1)}

    return Task(loss=compare, predict_fns={"predict": predict}, splittable=loss == "cosine", unit="example")


def _both(apply: Apply, params: Params, batch: Any, rng: jax.Array | None, train: bool) -> tuple[jax.Array, jax.Array]:
    if "other" not in batch:
        raise UserError("task.name='sentence_embedding' needs data.pair=FIELD and data.pair_as='apart'.")
    found = []
    for number, inputs in enumerate((batch["inputs"], batch["other"])):
        rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, number)}
        out = apply(params, **inputs, train=train, rngs=rngs)
        if "embedding" not in out:
            raise UserError("task.name='sentence_embedding' needs 'embedding' in model.outputs.")
        found.append(out["embedding"])
    return found[0], found[1]

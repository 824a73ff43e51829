"""Predict tokens with a memory that flows from each batch to the next (Dai et al. 2019, section 3.2).

Row b of a batch must go on where row b of the batch before ended: see `data.segments`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from tfm_jax.errors import UserError
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.base import Apply, Carry, Extra, LossOut, Params, Task


def make(
    *,
    model: nn.Module,
    batch_size: int,
    vocab_chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Task:
    """`token_prediction`, with `extra["memory"]` given to the model and replaced by the one that it returns.

    A batch's rows have their places in the memory, so microbatches are refused. An update that is skipped leaves the
    memory as it was.

    Args:
      model: has `init_memory(rows)`, takes `memory` and returns the next one under that name (not a config key).
      batch_size: rows of a training batch (not a config key).
      vocab_chunk, label_smoothing, z_loss: see `tasks.token_prediction`.
    """
    if not hasattr(model, "init_memory"):
        raise UserError(f"task.name='recurrent' needs a model with a memory; {type(model).__module__} has none.")
    task = token_prediction.make(vocab_chunk=vocab_chunk, label_smoothing=label_smoothing, z_loss=z_loss)

    def empty(rows: int) -> Extra:
        memory = model.init_memory(rows)
        return {} if memory is None else {"memory": memory}

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: Any, train: bool) -> LossOut:
        if "fresh" not in batch["inputs"]:
            raise UserError("task.name='recurrent' needs rows that go on from batch to batch: data.name='segments'.")
        return task.loss(apply, params, {}, {**batch, "inputs": {**batch["inputs"], **extra}}, rng, train)

    def after(extra: Extra, aux: Mapping[str, Any]) -> Extra:
        return {name: aux[name] for name in extra}

    return dataclasses.replace(
        task,
        loss=loss,
        init_extra=lambda params: empty(batch_size),
        update_extra=lambda params, extra, aux: after(extra, aux),
        carry=Carry(forget=lambda extra: {}, begin=lambda extra, rows: empty(rows), after=after),
        splittable=False,
    )

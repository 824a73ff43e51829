"""A student learns what a teacher says besides what is right (Hinton et al. 2015), as a wrapper around any task with logits.

B batch, C classes or vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.sections import Inside
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, extended

KEY = "teacher"


def make(
    *,
    teacher: str,
    teacher_model: nn.Module,
    build: Callable[[Mapping[str, Any]], Task],
    task: Annotated[Mapping[str, Any], Inside("task")],
    temperature: float = 2.0,
    soft_weight: float = 0.5,
) -> Task:
    """(1 - w) times the task's own loss, plus w T^2 KL(teacher || student), both with logits over T (section 2.1).

    The teacher is a run or an imported model, of whatever family and size, that reads the same inputs. Its parameters lie in
    `extra`, are split over the mesh like any others and never change. Evaluation is the task's own.

    Args:
      teacher: its run directory.
      teacher_model: its model (not a config key).
      build: from a section to a task (not a config key).
      task: the section of the task that is wrapped, `{"name": "classification"}`.
      temperature: T.
      soft_weight: w, from 0, the task alone, to 1, the teacher alone.

    Raises:
      UserError: a value out of its range, or a teacher whose logits have another shape than the student's.
    """
    if temperature <= 0:
        raise UserError(f"task.temperature={temperature}: must be above 0.")
    if not 0 <= soft_weight <= 1:
        raise UserError(f"task.soft_weight={soft_weight}: must lie between 0 and 1.")
    inner = build(task)

    def blank(params: Params) -> Params:
        # Filled in from `teacher` when a run begins; see `Task.donors`.
        shapes = jax.eval_shape(lambda: teacher_model.init(jax.random.key(0), **teacher_model.example()))["params"]
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        if not train:
            return inner.loss(apply, params, extra["inner"], batch, rng, train)
        said: dict[str, Any] = {}

        def listened(params: Params, /, **inputs: Any) -> dict[str, Any]:
            out = apply(params, **inputs)
            said.update(out)
            return out

        hard = inner.loss(listened, params, extra["inner"], batch, rng, train)
        told = teacher_model.apply({"params": extra[KEY]}, **batch["inputs"], train=False)["logits"]
        if said["logits"].shape != told.shape:
            raise UserError(
                f"task.teacher={teacher!r}: its logits are {told.shape}, the student's {said['logits'].shape}."
            )
        weights = batch["weights"]
        found = divergence(jax.lax.stop_gradient(told), said["logits"], temperature)
        soft = jnp.sum(jnp.where(weights > 0, found * weights, 0.0))
        total = (1 - soft_weight) * hard.total + soft_weight * temperature**2 * soft
        metrics = {**hard.metrics, "hard_loss": hard.metrics["loss"], "soft_loss": (soft, hard.weight)}
        return LossOut(total, hard.weight, metrics | {"loss": (total, hard.weight)}, hard.aux)

    wider = extended(inner, KEY, init=blank)
    return dataclasses.replace(wider, loss=loss, donors={**wider.donors, KEY: teacher})


def divergence(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) of logits (..., C) over a temperature, (...) float32 nats."""
    p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

"""Several tasks on one trunk: each batch is of one of them (`data.mixture`), and each has a head of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax

from tfm_jax.errors import UserError, nearest
from tfm_jax.sections import InsideEach
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task


def make(
    *,
    build: Callable[[Mapping[str, Any]], Task],
    tasks: Annotated[Mapping[str, Mapping[str, Any]], InsideEach("task")],
    weights: Mapping[str, float] | None = None,
) -> Task:
    """Each batch's loss is that of the task of its part, times the part's weight.

    Where a model's heads have the parts' names, each task has the logits of its part's. Training metrics are `PART_loss` and so
    on, besides `loss`, the mean of whatever came; evaluation of a part has the names of its own task.

    Parts may be several classifications, regressions and taggings, each with a head of its own; one that marks spans
    (questions), for which a model has one head; texts made of texts (T5), which share the head over the vocabulary. Not running
    text, which counts no examples.

    Args:
      build: from a section to a task (not a config key).
      tasks: by part, the section of its task.
      weights: by part; 1 where none is given. Where a teacher is around the mixture, they are of the parts' own losses, and what is
        learned from the teacher counts alike for all.

    Raises:
      UserError: weights or batches of parts without a task, a task that has a teacher or a memory, or two that mark spans.
    """
    for name, weight in (weights or {}).items():
        if name not in tasks:
            raise UserError(f"task.weights.{name}: there is no such task.{nearest(name, tasks)}")
        if weight < 0:
            raise UserError(f"task.weights.{name}={weight}: must be at least 0.")
    if not tasks:
        raise UserError("task.tasks is empty: give each part of the data a task.")
    made = {name: build(section) for name, section in tasks.items()}
    for name, task in made.items():
        if task.init_extra({}) or task.donors or task.carry is not None:
            raise UserError(
                f"task.tasks.{name}.name={tasks[name]['name']!r} has a teacher or a memory, which a part of a mixture cannot."
                " A teacher may be that of all: task.name='distillation' around task.task.name='mixture'."
            )
    if len(spans := [name for name, task in made.items() if "spans" in task.predict_fns]) > 1:
        raise UserError(
            f"task.tasks.{spans[0]} and task.tasks.{spans[1]} both mark spans, and a model has one head for them. Make one part"
            " of their data."
        )
    factors = {name: float((weights or {}).get(name, 1.0)) for name in tasks}

    def part_of(batch: Any) -> str:
        if "part" not in batch:
            raise UserError("task.name='mixture' needs batches that say whose they are: data.name='mixture'.")
        (name,) = batch["part"]
        if name not in made:
            raise UserError(f"data.parts.{name} has no task.{nearest(name, made)} See task.tasks.")
        return str(name)

    def own(apply: Apply, name: str, batch: Any) -> Apply:
        return lambda params, /, **inputs: heard(apply(params, **inputs), name, batch)

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        name = part_of(batch)
        out = made[name].loss(own(apply, name, batch), params, {}, batch, rng, train)
        if not train:
            return out
        total = factors[name] * out.total
        metrics = {f"{name}_{key}": value for key, value in out.metrics.items()}
        return LossOut(total, out.weight, metrics | {"loss": (total, out.weight)}, out.aux)

    def predicted(key: str) -> Callable[..., Any]:
        def predict(apply: Apply, params: Params, extra: Extra, batch: Any) -> Any:
            name = part_of(batch)
            if key not in made[name].predict_fns:
                raise UserError(f"The task of {name!r} has no {key!r}.{nearest(key, made[name].predict_fns)}")
            return made[name].predict_fns[key](own(apply, name, batch), params, {}, batch)

        return predict

    units = {task.unit for task in made.values()}
    return Task(
        loss=loss,
        splittable=all(task.splittable for task in made.values()),
        predict_fns={key: predicted(key) for task in made.values() for key in task.predict_fns},
        unit=units.pop() if len(units) == 1 else "target",
    )


def heard(out: Mapping[str, Any], part: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says, and of its heads by name only the part's: `logits` of a tag for each position where the batch weighs
    positions, else of a class for each row.

    A part whose task reads other outputs has no head among them.
    """
    several = {key: x for key, x in out.items() if key in ("logits", "tag_logits") and isinstance(x, Mapping)}
    one = several.get("tag_logits" if batch["weights"].ndim == 2 else "logits", {}).get(part)
    others = {key: x for key, x in out.items() if key not in several}
    return others if one is None else {**others, "logits": one}

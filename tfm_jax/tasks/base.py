"""What an objective is: a frozen dataclass of pure functions, with no arrays inside."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax

from tfm_jax.errors import UserError
from tfm_jax.nn.capture import AUXILIARY, SAID, collected

Params = Any
Extra = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]


class Apply(Protocol):
    """A model as a function: `apply(params, **inputs, train=..., rngs=...) -> dict of named arrays`.

    A model with mutable collections (batch statistics) also returns them, under the name `mutables`. With `capture` there is
    also `captured`, what its blocks say of themselves: see `nn.stack.Stack`; of a model that adds to the training loss
    `auxiliary`, see `with_auxiliary`.
    """

    def __call__(
        self, params: Params, /, *, train: bool, rngs: Any = None, capture: bool = False, **inputs: Any
    ) -> dict[str, Any]: ...


def bind(model: nn.Module, mutables: Any) -> Apply:
    """The model as a function of its parameters; see `Apply`."""

    def apply(params: Any, /, *, train: bool, rngs: Any = None, capture: bool = False, **inputs: Any) -> dict[str, Any]:
        variables = {"params": params, **mutables}
        changing = [*((*mutables, AUXILIARY) if train else ()), *([SAID] if capture else [])]
        if not changing:
            result: dict[str, Any] = model.apply(variables, **inputs, train=train, rngs=rngs)
            return result
        out, changed = model.apply(variables, **inputs, train=train, rngs=rngs, mutable=changing)
        said = {"captured": changed.pop(SAID, {})} if capture else {}
        if numbers := changed.pop(AUXILIARY, {}):
            said["auxiliary"] = collected(numbers)
        return {**out, **said, **({"mutables": changed} if mutables and train else {})}

    return apply


class LossOut(NamedTuple):
    """What a loss says about a batch, all as sums, so that the step can divide once for every device and microbatch.

    Attributes:
      total: summed loss, () float32.
      weight: what to divide by, () float32; 0 is allowed.
      metrics: `{name: (sum, count)}`, each () float32.
      aux: anything `update_extra` needs; the key `mutables` replaces the model's mutable collections.
    """

    total: jax.Array
    weight: jax.Array
    metrics: Metrics
    aux: Mapping[str, Any]


class Carry(NamedTuple):
    """How `extra` flows from batch to batch of an evaluation pass, where it must: a recurrent memory.

    Attributes:
      forget: `extra -> extra` without what flows, which is all of it that evaluation takes from training.
      begin: `(extra, rows) -> extra` for the first batch of a pass whose batches have this many rows.
      after: `(extra, aux) -> extra` for the batch behind the one whose loss said `aux`.
    """

    forget: Callable[[Extra], Extra]
    begin: Callable[[Extra, int], Extra]
    after: Callable[[Extra, Mapping[str, Any]], Extra]


class LossFn(Protocol):
    """`loss(apply, params, extra, batch, rng, train) -> LossOut`."""

    def __call__(
        self, apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool
    ) -> LossOut: ...


def _nothing(params: Params) -> Extra:
    return {}


def _keep(params: Params, extra: Extra, aux: Mapping[str, Any]) -> Extra:
    return extra


def _as_made(params: Params, key: jax.Array) -> Params:
    return params


def _as_trained(params: Params, extra: Extra) -> Params:
    return params


def _as_updated(params: Params, extra: Extra) -> Params:
    return params


@dataclass(frozen=True)
class Task:
    """An objective. Wrappers (`ema`, distillation, adapters) take a task and return another; see `extended`.

    Attributes:
      loss: see `LossFn`.
      init_params: from the model's initial parameters and a key, what is trained: with adapters, or a part of them.
      frozen: regexes on the paths of what is not trained.
      own: regexes on the paths of parameters that are the task's and not the model's, which no wrapper freezes.
      init_extra: from the initial parameters, what the task carries besides them: teachers, averages, memory, queues.
      donors: `{path in extra: run directory}`, what is read from other runs when this one begins: a teacher.
      update_extra: called once after each update with the new parameters and the loss's `aux`, to which the step adds the
        batch's gradient as `gradient`.
      project: from updated parameters and the updated `extra`, parameters as the task allows them: some set to zero.
      eval_params: which parameters evaluation and generation use.
      splittable: whether any rows of a batch can be taken by themselves and their losses summed; contrastive losses and
        memories of the rows before do not allow it, and refuse accumulation.
      carry: for tasks whose evaluation remembers the batch before; every batch is evaluated by itself if None.
      predict_fns: named functions `(apply, params, extra, batch) -> dict` that evaluators may call.
      unit: what a weight of 1 stands for (`token`, `example`); metrics that only mean something for one are named by it.
    """

    loss: LossFn
    init_params: Callable[[Params, jax.Array], Params] = _as_made
    frozen: Sequence[str] = ()
    own: Sequence[str] = ()
    init_extra: Callable[[Params], Extra] = _nothing
    donors: Mapping[str, str] = field(default_factory=dict)
    update_extra: Callable[[Params, Extra, Mapping[str, Any]], Extra] = _keep
    project: Callable[[Params, Extra], Params] = _as_updated
    eval_params: Callable[[Params, Extra], Params] = _as_trained
    splittable: bool = True
    carry: Carry | None = None
    predict_fns: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    unit: str = "token"


def donor_setting(path: str, run: str) -> str:
    """What a config says of one of a task's `donors`, `task.teacher='runs/big'`, also of a task that others are around."""
    return f"task.{path.rpartition('/')[2]}={run!r}"


def unknown_inputs(model: nn.Module, inputs: Iterable[str]) -> list[str]:
    """The inputs that a model has no argument for."""
    taken = inspect.signature(type(model).__call__).parameters
    return [] if any(p.kind is p.VAR_KEYWORD for p in taken.values()) else sorted({*inputs} - {*taken})


def targets_of(batch: Mapping[str, Any]) -> Any:
    """What a batch's rows should be told as.

    Raises:
      UserError: there is nothing of the kind.
    """
    if "targets" not in batch:
        raise UserError(
            "This data has no labels to train or to score by: data.label=None is for `python -m experiments.predict`. Name the"
            " field."
        )
    return batch["targets"]


def with_auxiliary(task: Task) -> Task:
    """The task, with what its model adds to the loss of each example or token in training (a router's losses).

    What a model says beside `loss` becomes a metric.
    """

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        said: list[Mapping[str, jax.Array]] = []

        def listened(params: Params, /, **inputs: Any) -> dict[str, Any]:
            out = apply(params, **inputs)
            said.append(out.pop("auxiliary", {}))
            return out

        made = task.loss(listened, params, extra, batch, rng, train)
        # A task may run its model twice on a batch.
        found = {name: sum(each[name] for each in said) / len(said) for name in (said[0] if said else {})}
        total = made.total + found.pop("loss", 0.0) * made.weight
        metrics = {name: (value * made.weight, made.weight) for name, value in found.items()}
        return made._replace(total=total, metrics={**made.metrics, **metrics})

    return dataclasses.replace(task, loss=loss)


def extended(
    task: Task,
    name: str,
    *,
    init: Callable[[Params], Any],
    update: Callable[[Params, Any, Mapping[str, Any]], Any] = _keep,
) -> Task:
    """The task, whose `extra` is `{"inner": its own, name: what a wrapper carries besides}`.

    Args:
      init: from the initial parameters, what is carried.
      update: from new parameters, what was carried and `aux`, what is carried on.
    """
    inner = task.carry
    return dataclasses.replace(
        task,
        loss=lambda apply, params, extra, batch, rng, train: task.loss(
            apply, params, extra["inner"], batch, rng, train
        ),
        init_extra=lambda params: {"inner": task.init_extra(params), name: init(params)},
        donors={f"inner/{path}": run for path, run in task.donors.items()},
        update_extra=lambda params, extra, aux: {
            "inner": task.update_extra(params, extra["inner"], aux),
            name: update(params, extra[name], aux),
        },
        project=lambda params, extra: task.project(params, extra["inner"]),
        eval_params=lambda params, extra: task.eval_params(params, extra["inner"]),
        carry=inner
        and Carry(
            forget=lambda extra: {**extra, "inner": inner.forget(extra["inner"])},
            begin=lambda extra, rows: {**extra, "inner": inner.begin(extra["inner"], rows)},
            after=lambda extra, aux: {**extra, "inner": inner.after(extra["inner"], aux)},
        ),
        predict_fns={
            key: lambda apply, params, extra, batch, f=f: f(apply, params, extra["inner"], batch)
            for key, f in task.predict_fns.items()
        },
    )

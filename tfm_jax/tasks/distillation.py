"""A student learns what a teacher says besides what is right, as a wrapper around any task with logits.

Soft targets: Hinton et al. 2015. Hidden states and attention: Jiao et al. 2020 (TinyBERT).
B batch, T length, C classes or vocabulary, D width, H heads, L layers.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn.capture import AUXILIARY, SAID
from tfm_jax.paths import flatten
from tfm_jax.sections import Inside
from tfm_jax.tasks.base import Apply, Extra, LossOut, Params, Task, bind, extended, unknown_inputs
from tfm_jax.tasks.mixture import heard

KEY = "teacher"
# Where the parameters that only matching needs lie.
BRIDGE = "bridge"


def make(
    *,
    teacher: str | None = None,
    teacher_model: Mapping[str, Any] | None = None,
    taught_by: nn.Module | None,
    model: nn.Module,
    build: Callable[[Mapping[str, Any]], Task],
    task: Annotated[Mapping[str, Any], Inside("task")],
    temperature: float = 2.0,
    soft_weight: float = 0.5,
    hidden: Sequence[Any] = (),
    hidden_weight: float = 1.0,
    attention: Sequence[Any] = (),
    attention_weight: float = 1.0,
) -> Task:
    """(1 - w) times the task's own loss, plus w T^2 KL(teacher || student), both with logits over T (Hinton, section 2), plus
    the mean squared errors of hidden states and attention scores (Jiao, equations 7 to 9).

    The teacher is a run or an imported model, of whatever family and size, that reads the same inputs. Its parameters lie in
    `extra`, are split over the mesh like any others and never change. Evaluation is the task's own.

    Args:
      teacher: its run directory; None for a teacher that has spoken beforehand, in each batch's `teacher` (`data.predictions`).
      teacher_model: its section `model`; that of the run if None, and kept with this run, which needs the other's folder no more.
      taught_by: its model (not a config key).
      model: the student (not a config key).
      build: from a section to a task (not a config key).
      task: the section of the task that is wrapped, `{"name": "classification"}`; of a mixture each part's logits are matched
        with the same part's.
      temperature: T.
      soft_weight: w, from 0, the task alone, to 1, the teacher alone.
      hidden: pairs (layer of the student, layer of the teacher) whose states are matched; layer 0 is what the first block is
        given. Between two widths a learned matrix stands, one for layer 0 and one for all others.
      attention: pairs of layers, from 1, whose attention scores are matched; they must have as many heads.
      hidden_weight, attention_weight: of the sum over such pairs.

    Raises:
      UserError: a value out of its range, a layer that there is not, or a teacher with a memory, or whose logits or heads have
        another shape.
    """
    if temperature <= 0:
        raise UserError(f"task.temperature={temperature}: must be above 0.")
    if not 0 <= soft_weight <= 1:
        raise UserError(f"task.soft_weight={soft_weight}: must lie between 0 and 1.")
    for name, weight in (("hidden_weight", hidden_weight), ("attention_weight", attention_weight)):
        if weight < 0:
            raise UserError(f"task.{name}={weight}: must be at least 0.")
    states, heads = _pairs("hidden", hidden, 0), _pairs("attention", attention, 1)
    widths = [_width(m) for m in (model, taught_by)] if states and taught_by is not None else [0, 0]
    bridges = {"embeddings": any(s == 0 for s, _ in states), "states": any(s > 0 for s, _ in states)}
    inner, inner_name = build(task), task.get("name", "token_prediction")
    remembers = getattr(taught_by, "init_memory", None)
    if remembers is not None and remembers(1) is not None:
        raise UserError(
            f"task.teacher={teacher!r} has a memory of the segments before, and a teacher is asked about each batch alone: take one"
            " without."
        )
    if taught_by is None and (states or heads):
        raise UserError("task.hidden and task.attention need the teacher itself: task.teacher=RUN.")

    def blank(params: Params) -> Params:
        # Filled in from `teacher` when a run begins; see `Task.donors`.
        if taught_by is None:
            return {}
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _parameters(str(teacher), taught_by))

    def init_params(params: Params, key: jax.Array) -> Params:
        params = inner.init_params(params, key)
        if not states or widths[0] == widths[1]:
            return params
        draw = nn.initializers.lecun_normal()
        keys = jax.random.split(jax.random.fold_in(key, 7), 2)
        made = {
            name: {"kernel": draw(k, tuple(widths), jnp.float32)}
            for (name, wanted), k in zip(bridges.items(), keys, strict=True)
            if wanted
        }
        return {**params, BRIDGE: made}

    def plain(params: Params) -> Params:
        return {name: x for name, x in params.items() if name != BRIDGE}

    def logits_of(whose: str, out: Mapping[str, Any], batch: Any) -> jax.Array:
        if "part" in batch:
            (part,) = batch["part"]
            out = heard(out, part, batch)
        found = out.get("logits")
        if not isinstance(found, jax.Array):
            raise UserError(
                f"task.name=distillation matches logits, and {whose} gives none that are one array for"
                f" task.task.name={inner_name!r}."
            )
        return found

    def loss(apply: Apply, params: Params, extra: Extra, batch: Any, rng: jax.Array | None, train: bool) -> LossOut:
        if not train:
            return inner.loss(apply, params, extra["inner"], batch, rng, train)
        said: dict[str, Any] = {}
        listening = bool(states or heads)

        def listened(params: Params, /, **inputs: Any) -> dict[str, Any]:
            if said:
                raise UserError(
                    f"task.name=distillation matches what a model says of a batch at once, and task.task.name={inner_name!r} asks it"
                    " twice."
                )
            out = apply(params, **inputs, capture=listening)
            said.update(out)
            return out

        if taught_by is not None:
            _check_inputs(str(teacher), taught_by, batch["inputs"])
        hard = inner.loss(listened, plain(params), extra["inner"], batch, rng, train)
        if taught_by is not None:
            told = bind(taught_by, {})(extra[KEY], **batch["inputs"], train=False, capture=listening)
            told = jax.lax.stop_gradient(told)
            if _by_part(said) - _by_part(told):
                raise UserError(
                    f"task.teacher={teacher!r} has one head for all parts, and here each part has its own: take a teacher of the same"
                    " parts."
                )
        elif "teacher" in batch:
            told = {"logits": batch["teacher"]}
        else:
            raise UserError("task.teacher is not set, and the data has no data.predictions of a teacher.")
        asked_of = "data.predictions" if taught_by is None else f"task.teacher={teacher!r}"
        answer, asked = (logits_of(*each, batch) for each in (("the student", said), (asked_of, told)))
        if answer.shape != asked.shape:
            raise UserError(f"{asked_of}: its logits are {asked.shape}, the student's {answer.shape}.")
        weights = batch["weights"]
        found = divergence(asked, answer, temperature)
        soft = jnp.sum(jnp.where(weights > 0, found * weights, 0.0))
        total = (1 - soft_weight) * hard.total + soft_weight * temperature**2 * soft
        metrics = {**hard.metrics, "hard_loss": hard.metrics["loss"], "soft_loss": (soft, hard.weight)}
        if listening:
            # Each row counts as much as its targets do.
            rows = jnp.sum(weights.reshape(weights.shape[0], -1), axis=1)
            ours, theirs = captured(said["captured"]), captured(told["captured"])
            valid = batch["inputs"].get("valid")
            valid = jnp.ones(ours["states"][0].shape[:2], bool) if valid is None else valid
            for name, weight, errors in (
                ("hidden_loss", hidden_weight, _states(states, ours, theirs, valid, params.get(BRIDGE, {}))),
                ("attention_loss", attention_weight, _scores(heads, ours, theirs, valid)),
            ):
                if errors:
                    error = jnp.sum(jnp.where(rows > 0, sum(errors) * rows, 0.0))
                    total = total + weight * error
                    metrics[name] = (error, hard.weight)
        return LossOut(total, hard.weight, metrics | {"loss": (total, hard.weight)}, hard.aux)

    wider = extended(inner, KEY, init=blank)
    return dataclasses.replace(
        wider,
        loss=loss,
        init_params=init_params,
        own=(*wider.own, f"^{BRIDGE}/"),
        donors={**wider.donors, **({} if teacher is None else {KEY: teacher})},
        eval_params=lambda params, extra: wider.eval_params(plain(params), extra),
    )


def _parameters(teacher: str, model: nn.Module) -> Any:
    """The shapes of a teacher's parameters."""
    example = getattr(model, "example", None)
    if example is None:
        raise UserError(
            f"task.teacher={teacher!r}: its model {type(model).__name__} has no method `example()` that returns inputs, by which its"
            " parameters are known. Add one."
        )
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), **example()))
    if besides := sorted({*variables} - {"params", AUXILIARY, SAID}):
        raise UserError(
            f"task.teacher={teacher!r} has {', '.join(besides)} besides parameters, which a teacher cannot."
        )
    return variables["params"]


def _by_part(out: Mapping[str, Any]) -> set[str]:
    """The outputs of which a model has one for each part of a mixture."""
    return {key for key, x in out.items() if isinstance(x, Mapping) and key.endswith("logits")}


def _read(model: nn.Module) -> set[str]:
    """The inputs that a model cannot do without."""
    taken = inspect.signature(type(model).__call__).parameters.values()
    needed = {p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return needed - {"self", "train"}


def _check_inputs(teacher: str, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    if missing := _read(model) - {*inputs}:
        raise UserError(f"task.teacher={teacher!r} reads {', '.join(sorted(missing))}, which this data has not.")
    if surplus := unknown_inputs(model, inputs):
        raise UserError(f"task.teacher={teacher!r} takes no {', '.join(surplus)}, which this data gives.")


class Captured(dict[str, list[jax.Array]]):
    """`states`, of what the first block is given and of each block (B, T, D), and `scores` (B, H, T, T), by layer."""


def captured(said: Any) -> Captured:
    """What the blocks of a model's only stack have said, in their order."""
    found: dict[str, dict[int, jax.Array]] = {"states": {}, "scores": {}}
    for path, x in flatten(said).items():
        name = path.rpartition("/")[2]
        if name == "inputs":
            if 0 in found["states"]:
                raise UserError("task.hidden, task.attention: this model has several stacks of layers; one is needed.")
            found["states"][0] = x
        elif (number := re.search(r"block_(\d+)/", path)) is not None:
            found[name][int(number[1]) + 1] = x
        elif x.ndim == {"states": 3, "scores": 4}[name]:
            found[name][1] = x  # shared by all layers, of which there is one
        else:  # scanned, or shared
            for i in range(x.shape[0]):
                found[name][i + 1] = x[i]
    return Captured({name: [by_layer[i] for i in sorted(by_layer)] for name, by_layer in found.items()})


def _states(
    pairs: Sequence[tuple[int, int]], ours: Captured, theirs: Captured, valid: jax.Array, bridge: Any
) -> list[jax.Array]:
    """For each pair of layers, each row's mean squared difference of states (B,)."""
    out, count = [], jnp.maximum(jnp.sum(valid, axis=1), 1)
    for student, teacher in pairs:
        mine = _layer("hidden", "student", ours["states"], student, 0).astype(jnp.float32)
        name = "embeddings" if student == 0 else "states"
        if name in bridge:
            mine = mine @ bridge[name]["kernel"]
        error = jnp.mean((mine - _layer("hidden", "teacher", theirs["states"], teacher, 0)) ** 2, axis=-1)
        out.append(jnp.sum(jnp.where(valid, error, 0.0), axis=1) / count)
    return out


def _scores(pairs: Sequence[tuple[int, int]], ours: Captured, theirs: Captured, valid: jax.Array) -> list[jax.Array]:
    """For each pair of layers, each row's mean squared difference of attention scores (B,)."""
    out, both = [], valid[:, None, :, None] & valid[:, None, None, :]
    count = jnp.maximum(jnp.sum(both, axis=(1, 2, 3)), 1)
    for student, teacher in pairs:
        mine, other = (
            _layer("attention", "student", ours["scores"], student, 1),
            _layer("attention", "teacher", theirs["scores"], teacher, 1),
        )
        if mine.shape != other.shape:
            raise UserError(f"task.attention: the student has {mine.shape[1]} heads, the teacher {other.shape[1]}.")
        error = jnp.mean(jnp.where(both, (mine - other) ** 2, 0.0), axis=1)
        out.append(jnp.sum(error, axis=(1, 2)) / count)
    return out


def _layer(setting: str, whose: str, found: Sequence[jax.Array], layer: int, first: int) -> jax.Array:
    if layer - first >= len(found):
        raise UserError(f"task.{setting}: the {whose} has no layer {layer}; its last is {len(found) - 1 + first}.")
    return found[layer - first]


def _pairs(setting: str, pairs: Sequence[Any], first: int) -> list[tuple[int, int]]:
    out = []
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(i, int) and i >= first for i in pair)):
            raise UserError(f"task.{setting}: {pair!r} is not a pair (layer of the student, layer of the teacher).")
        out.append((int(pair[0]), int(pair[1])))
    return out


def _width(model: nn.Module) -> int:
    block = getattr(model, "block", None)
    if block is None:
        raise UserError(f"task.hidden: {type(model).__module__} does not say how wide its states are.")
    return int(block.width)


def divergence(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || student) of logits (..., C) over a temperature, (...) float32 nats; of a single number, which is no
    distribution, the squared difference over temperature^2."""
    if teacher.shape[-1] == 1:
        return ((teacher - student)[..., 0].astype(jnp.float32) / temperature) ** 2
    p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

"""From a resolved config to the parts of an experiment. The last place, with `run.py`, that sees a config."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from tfm_jax import config as configs
from tfm_jax.data.rows import Training as OfManyLengths
from tfm_jax.data.tokenizers import reads_others
from tfm_jax.errors import UserError, nearest
from tfm_jax.evals.base import Context, Evaluate
from tfm_jax.names import resolve
from tfm_jax.nn import remat
from tfm_jax.nn.attention import check as check_attention
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel import mesh
from tfm_jax.parallel.devices import has_host_memory
from tfm_jax.parallel.multihost import global_batch
from tfm_jax.parallel.sharding import ROW_AXES, Layout
from tfm_jax.sections import build_model, family, fill, make_named, section_fields
from tfm_jax.tasks.base import Task, with_auxiliary
from tfm_jax.tasks.ema import with_ema
from tfm_jax.train import mup, optim, quantize, schedules, settings
from tfm_jax.train.rundir import read_config, run_folder
from tfm_jax.train.stages import pipeline_of
from tfm_jax.train.state import TrainState, initialiser
from tfm_jax.train.step import StepFn, make_train_step


@dataclass(frozen=True)
class Experiment:
    """Everything a run is made of. `config` has the data set's sizes filled in; `jit` compiles, as `jax.jit` does."""

    config: configs.Config
    train: settings.Train
    checkpoint: settings.Checkpoint
    log: settings.Log
    layout: Layout
    data: Any
    model: nn.Module
    task: Task
    optimizer: optim.Optimizer
    init: Callable[[], TrainState]
    step: StepFn
    jit: Callable[..., Any] = jax.jit

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated."""
        shapes = jax.eval_shape(self.init)
        placed = self.layout.place(shapes)
        placed = placed._replace(opt=self.layout.at_rest(placed.opt, shapes.opt))
        abstract: TrainState = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
        )
        return abstract

    def fresh_state(self) -> TrainState:
        """The initial state, each array made where it lives."""
        state: TrainState = self.jitted_init()()
        return state

    def jitted_init(self) -> Any:
        """What makes the initial state, jitted on the layout."""
        return self.jit(self.init, out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state()))

    def jitted_step(self) -> Any:
        """The update, jitted on the layout; it takes over the old state's memory."""
        state = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        batch = self.layout.batch()
        return self.jit(self.step, in_shardings=(state, batch), out_shardings=(state, None), donate_argnums=0)

    def batch(self, step: int) -> Any:
        """The training batch of a step, on the devices."""
        return global_batch(self.data.train, step, self.layout.batch())

    def evaluators(self) -> dict[str, Evaluate]:
        """The config's evaluators by name; one with keys of section `data` of its own reads other data."""
        context = Context(self.task, self.model, self.layout, self.data, self.data.train.batch_size, self.jit)
        made = {}
        for name, section in self.config["evals"].items():
            arguments = dict(section)
            make = resolve(
                arguments.pop("name"), package="tfm_jax.evals", attribute="make", setting=f"evals.{name}.name"
            )
            arguments.pop("data")
            made[name] = make(dataclasses.replace(context, data=self.evaluation_data(name)), **arguments)
        return made

    def evaluation_data(self, name: str) -> Any:
        """What one of the evaluators reads."""
        changes = self.config["evals"][name]["data"]
        return self.data if changes is None else self._other_data(f"evals.{name}.data", changes)

    def _other_data(self, setting: str, changes: Mapping[str, Any]) -> Any:
        """The run's data with some keys changed, by its own tokenizer and with its classes."""
        section = {**self.config["data"], **changes}
        section = fill(setting, section, section_fields("data", section, setting))
        with tempfile.TemporaryDirectory() as folder:
            if self.data.tokenizer is not None:
                self.data.tokenizer.save(folder)
            data = _open_data(section, Path(folder) if self.data.tokenizer is not None else None)
        if data.sizes != self.data.sizes:
            raise UserError(f"{setting}: this data has {dict(data.sizes)}, the run's {dict(self.data.sizes)}.")
        return data

    @property
    def pipeline(self) -> Pipeline | None:
        """That of the model, where the mesh has stages."""
        found: Pipeline | None = getattr(self.model, "pipeline", None)
        return found

    @property
    def flops_per_token(self) -> float | None:
        """Model FLOPs of a training token, for models that say so and data of a fixed length."""
        flops, length = getattr(self.model, "train_flops_per_token", None), self.config["data"].get("seq_len")
        return None if flops is None or length is None else float(flops(length))

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(self.init).params))


def build(
    config: configs.Config,
    *,
    tokenizer_dir: Path | None = None,
    for_training: bool = True,
    devices: Sequence[jax.Device] | None = None,
    jit: Callable[..., Any] = jax.jit,
) -> Experiment:
    """Check everything that can be checked without data, then open the data, then describe the rest.

    Nothing large is allocated: parameters are made by `fresh_state`, or read by a checkpoint.

    Args:
      tokenizer_dir: a run's saved tokenizer, used instead of making one.
      devices: of the mesh; all that there are if None. They may be those of a topology that is elsewhere.
      jit: what compiles; other than `jax.jit` where several runs share their programs.
      for_training: whether the training batch must divide over the mesh; evaluation pads its own.

    Raises:
      UserError: whatever does not fit together, by the config's own names.
    """
    train, checkpoint = settings.Train(**config["train"]), settings.Checkpoint(**config["checkpoint"])
    layout = mesh.make(**config["mesh"]) if devices is None else mesh.make(**config["mesh"], devices=devices)
    check(config, layout)
    if for_training:
        check_batch(config, layout)
        quantize.check(train.quantize)
    pipeline = pipeline_of(config, layout)
    data = _open_data(config["data"], tokenizer_dir)
    if (split := layout.mesh.shape["context"]) > 1 and isinstance(data.train, OfManyLengths):
        raise UserError(
            f"mesh.context={split} splits sequences of one length, and data.name={config['data']['name']!r} has rows of many."
            " Use mesh.fsdp."
        )
    config = _filled_in(config, data)
    model = build_model(config["model"])
    model = model if pipeline is None else model.clone(pipeline=pipeline)
    layout = layout.with_rules(family(config["model"]["name"], "RULES", ()))
    task = build_task(config)
    _check_donors(config, task, data)
    inputs = data.train.batch_at(0, slice(0, 1))["inputs"]
    _check_inputs(config, model, inputs)
    key = jax.random.key(0)
    # On the mesh, so that what a model cannot do there is found now.
    with jax.set_mesh(layout.mesh):
        traced, variables = jax.make_jaxpr(lambda key: model.init(key, **inputs, train=False), return_shape=True)(key)
        shapes = jax.eval_shape(task.init_params, variables["params"], key)
    remat.check(config["model"].get("remat", "none"), traced)
    frozen = [*config["optim"]["freeze"], *task.frozen]
    trains = quantize.quantized(model, train.quantize, variables, inputs) if for_training and train.quantize else model
    scales = mup.scales(
        config, lambda m: jax.eval_shape(lambda k: task.init_params(m.init(k, **inputs, train=False)["params"], k), key)
    )
    optimizer = optim.make(shapes, steps=train.steps, scales=scales, **{**config["optim"], "freeze": frozen})
    step = make_train_step(task, trains, optimizer.tx, accum=train.accum, seed=train.seed)
    return Experiment(
        config=config,
        train=train,
        checkpoint=checkpoint,
        log=settings.Log(**config["log"]),
        layout=layout,
        data=data,
        model=model,
        task=task,
        optimizer=optimizer,
        init=initialiser(model, task, optimizer.tx, inputs, train.seed, scales),
        step=_from_host(step) if layout.optimizer_memory == "host" else step,
        jit=jit,
    )


def _from_host(step: StepFn) -> StepFn:
    """The step, which brings the optimizer's state to the devices; when, is for the compiler to decide."""
    return lambda state, batch: step(state._replace(opt=jax.device_put(state.opt, jax.memory.Space.Device)), batch)


def build_task(config: configs.Config) -> Task:
    """The objective, with what `train` wraps around it.

    One whose `make` asks for `model` and `batch_size` (recurrent memory has their shape) is given the config's, one that asks
    for `taught_by` the model of the run `teacher`, and one that asks for `build` what makes the task of a section inside it.
    """
    train = settings.Train(**config["train"])

    def build(section: Mapping[str, Any]) -> Task:
        made: Task = make_named(
            "task",
            section,
            model=lambda _: build_model(config["model"]),
            batch_size=lambda _: config["data"]["batch_size"],
            taught_by=lambda section: section["teacher"] and build_model(_teacher_model(section)),
            build=lambda _: build,
        )
        return made

    task = build(config["task"])
    if config["model"].get("experts"):
        task = with_auxiliary(task)
    if train.adapter is not None:
        task = make_named("adapter", train.adapter, task=lambda _: task, steps=lambda _: train.steps)
    return task if train.ema is None else with_ema(task, train.ema)


def check(config: configs.Config, layout: Layout) -> None:
    """Combinations of settings that cannot work, found before any data is read."""
    if config["log"]["wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError(f"log.wandb={config['log']['wandb']!r} needs Weights & Biases: pip install 'tfm_jax[wandb]'.")
    names = set(inspect.signature(schedules.make).parameters) - {"steps"}
    schedules.make(steps=config["train"]["steps"], **{name: config["optim"][name] for name in names})
    optim.rule(config["optim"]["name"], config["optim"]["options"] or {}, config["optim"].get("moments", "float32"))
    mup.check(config)
    length, limit = config["data"].get("seq_len"), config["model"].get("max_len")
    if length is not None and limit is not None and length > limit:
        raise UserError(f"data.seq_len={length} is longer than model.max_len={limit}.")
    watched = config["train"]["stop_metric"]
    if watched is not None:
        kind, _, rest = watched.partition("/")
        if kind != "eval" or rest.partition("/")[0] not in config["evals"]:
            known = [f"eval/{name}/loss" for name in config["evals"]]
            raise UserError(f"train.stop_metric={watched!r} is of no evaluator.{nearest(watched, known)}")
    objective, fitting = config["data"].get("objective"), family(config["model"]["name"], "OBJECTIVES", None)
    if objective is not None and fitting is not None and objective not in fitting:
        raise UserError(
            f"data.objective={objective!r} does not fit model.name={config['model']['name']!r}; what does:"
            f" {', '.join(fitting)}."
        )
    block = getattr(build_model(config["model"]), "block", None)
    if isinstance(block, BlockSpec):
        check_attention(block, layout.mesh.devices.flat[0].platform, split=layout.mesh.shape["context"])
        sizes = layout.mesh.shape
        if block.experts and sizes["stage"] > 1 and sizes["context"] > 1:
            raise UserError(
                f"mesh.stage={sizes['stage']} with mesh.context={sizes['context']}: a mixture of experts puts a row's tokens in order"
                " over `context`, which a pipeline's stages cannot. Use mesh.expert with one of them."
            )
        if config["train"].get("quantize") and sizes["stage"] > 1:
            raise UserError(
                f"mesh.stage={sizes['stage']}: products on stages cannot be in 8 bits (train.quantize). Leave one out."
            )
        if config["train"].get("quantize") and block.gradient_dtype not in (None, block.dtype):
            raise UserError(
                f"model.gradient_dtype={block.gradient_dtype!r}: gradients of products in 8 bits (train.quantize) are in"
                f" model.dtype={block.dtype!r}. Leave it out."
            )
    here = layout.mesh.devices.flat[0]
    rules = config["model"].get("remat", "none")
    if rules != "none":
        remat.policy(rules)
    if remat.offloads(rules) and not has_host_memory(here):
        raise UserError(
            f"model.remat: 'offload': a program for {here.platform} has no access to its host's memory here. Use 'save'."
        )
    if (ways := layout.mesh.shape["expert"]) > 1:
        if not isinstance(block, BlockSpec) or not block.experts:
            name = config["model"]["name"]
            raise UserError(f"mesh.expert={ways}: model.name={name!r} has no experts here. Use mesh.fsdp.")
        if block.experts % ways or block.expert_capacity is None:
            raise UserError(
                f"mesh.expert={ways} needs experts that it divides and that have slots; model.experts={block.experts},"
                f" model.expert_capacity={block.expert_capacity}. Without slots (None) every device holds every expert."
            )


def check_batch(config: configs.Config, layout: Layout) -> None:
    """The training batch must divide into microbatches, those over the mesh, and there into those of a pipeline."""
    train, batch = settings.Train(**config["train"]), config["data"].get("batch_size")
    if batch is None:
        return
    ways, sizes = layout.batch_ways, dict(layout.mesh.shape)
    if batch < 1:
        raise UserError(f"data.batch_size={batch}: must be at least 1.")
    if batch % train.accum:
        raise UserError(f"train.accum={train.accum} does not divide data.batch_size={batch}.")
    if (batch // train.accum) % ways:
        step = ways * train.accum
        near = sorted({max(step, batch // step * step), (batch // step + 1) * step})
        micro = f" / train.accum={train.accum} = {batch // train.accum} rows" if train.accum > 1 else ""
        raise UserError(
            f"data.batch_size={batch}{micro} does not divide over the mesh:"
            f" {' x '.join(f'{axis}={sizes[axis]}' for axis in ROW_AXES)} = {ways} ways. Nearest that do: {', '.join(map(str, near))}."
        )
    pipeline_of(config, layout)


def _check_donors(config: configs.Config, task: Task, data: Any) -> None:
    """A teacher must read the ids that this data gives, and know its classes in their order."""
    for run in task.donors.values():
        folder = run_folder(Path(run))
        if reads_others(folder, data.tokenizer):
            raise UserError(f"{run} reads other ids than this data gives: set data.tokenizer=run:{folder}.")
        # One whose folder is gone was looked at when the run began.
        known = _class_names(read_config(folder)["data"]) if (folder / "config.json").is_file() else {}
        for setting, names in _class_names(config["data"]).items():
            theirs = known.get(setting, names)
            if [name.casefold() for name in names] != [name.casefold() for name in theirs]:
                raise UserError(
                    f"{run} has {setting}={theirs}, and here it is {names}: set {setting} in the teacher's order."
                )


def _class_names(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of a `data` section's classes, by their settings; numbers are their own order."""
    found = {f"data.{key}": data.get(key) for key in ("names", "classes")}
    found |= {f"data.parts.{part}.names": section.get("names") for part, section in data.get("parts", {}).items()}
    return {key: list(names) for key, names in found.items() if names and all(isinstance(name, str) for name in names)}


def _check_inputs(config: configs.Config, model: nn.Module, inputs: dict[str, Any]) -> None:
    """The model must take what the data gives it; what it needs besides is the task's to give."""
    taken = inspect.signature(type(model).__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    if wrong := sorted(set(inputs) - set(taken)):
        raise UserError(
            f"data.name={config['data']['name']!r} gives {', '.join(sorted(inputs))}, but"
            f" model.name={config['model']['name']!r} takes no {', '.join(wrong)}."
        )


def _open_data(section: dict[str, Any], tokenizer_dir: Path | None) -> Any:
    saved = str(tokenizer_dir) if tokenizer_dir is not None and tokenizer_dir.is_dir() else None
    return make_named("data", section, tokenizer_dir=lambda _: saved)


def _teacher_model(section: Mapping[str, Any]) -> Any:
    """The `model` section of a task's teacher."""
    return section.get("teacher_model") or read_config(run_folder(Path(section["teacher"])))["model"]


def _filled_in(config: configs.Config, data: Any) -> configs.Config:
    """The config with everything that its data, donor and teacher decide (`configs.FILLED_IN`).

    Raises:
      UserError: a size of the model that is too small for the data.
    """
    model, task, sizes = dict(config["model"]), dict(config["task"]), {"vocab_size": data.vocab_size, **data.sizes}
    donor = config["checkpoint"]["init_from"]
    if donor is not None and model.get("vocab_size", 0) is None and data.vocab_size is not None:
        # Pretraining may have added ids for its masks, which stay where they are.
        there = read_config(run_folder(Path(donor)))["model"].get("vocab_size")
        sizes["vocab_size"] = max(data.vocab_size, there or 0)
    if task.get("teacher") is not None and "teacher_model" in task:
        task["teacher_model"] = _teacher_model(task)
    for name, size in sizes.items():
        if name not in model or size is None:
            continue
        if model[name] is None:
            model[name] = size
        if isinstance(size, Mapping):
            if model[name] != size:
                raise UserError(f"model.{name}={model[name]}: the data has {size}. Set these, or leave it out.")
        elif model[name] < size:
            raise UserError(
                f"model.{name}={model[name]} is too small: the data has {size}. Set at least {size}, or leave it out."
            )
    return {**config, "model": model, "task": task, "data": {**config["data"], **data.filled_in}}

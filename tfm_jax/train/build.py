"""From a resolved config to the parts of an experiment. The last place, with `run.py`, that sees a config."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from tfm_jax import config as configs
from tfm_jax.data.mixture import Training as Mixed
from tfm_jax.data.rows import Training as OfManyLengths
from tfm_jax.errors import UserError
from tfm_jax.evals.base import Context, Evaluate
from tfm_jax.names import resolve
from tfm_jax.nn import remat
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.parallel import mesh
from tfm_jax.parallel.devices import peak_flops
from tfm_jax.parallel.multihost import global_batch
from tfm_jax.parallel.sharding import Layout
from tfm_jax.sections import build_model, family, fill, make_named, section_fields
from tfm_jax.tasks.base import Task, bind, with_auxiliary
from tfm_jax.tasks.ema import with_ema
from tfm_jax.train import mup, optim, quantize, settings
from tfm_jax.train.check import check, check_batch, check_budget, check_donors, check_inputs, check_start, check_told
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
        context = self._context()
        made = {}
        for name, section in self.config["evals"].items():
            arguments = dict(section)
            make = resolve(
                arguments.pop("name"), package="tfm_jax.evals", attribute="make", setting=f"evals.{name}.name"
            )
            arguments.pop("data")
            made[name] = make(dataclasses.replace(context, data=self.evaluation_data(name)), **arguments)
        return made

    def _context(self) -> Context:
        return Context(self.task, self.model, self.layout, self.data, self.data.train.batch_size, self.jit)

    def evaluation_rows(self, name: str) -> int:
        """How many rows at a time one of the evaluators reads on this mesh."""
        return self._context().rows(self.config["evals"][name].get("batch_size"))

    def evaluation_data(self, name: str) -> Any:
        """What one of the evaluators reads."""
        changes = self.config["evals"][name]["data"]
        return self.data if changes is None else self._other_data(f"evals.{name}.data", changes)

    def _other_data(self, setting: str, changes: Mapping[str, Any]) -> Any:
        """The run's data with some keys changed, by its own tokenizer and with its classes."""
        section = {**_untold(self.config["data"]), **changes}
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

    def peak_flops(self) -> float | None:
        """What a device can do at best with the operands of the model's products."""
        return peak_flops(self.config["model"].get("matmul_dtype") or "float32")

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
      for_training: whether it is to be trained; evaluation pads its own batches, which need not divide over the mesh, and reads
        no predictions of a teacher, nor is one asked.

    Raises:
      UserError: whatever does not fit together, by the config's own names.
    """
    train, checkpoint = settings.Train(**config["train"]), settings.Checkpoint(**config["checkpoint"])
    layout = mesh.make(**config["mesh"]) if devices is None else mesh.make(**config["mesh"], devices=devices)
    check(config, layout)
    if for_training:
        check_batch(config, layout)
        check_told(config)
        check_budget(config)
        quantize.check(train.quantize)
    pipeline = pipeline_of(config, layout)
    # What a teacher has said is to learn from, and need not be there any more.
    data = _open_data(config["data"] if for_training else _untold(config["data"]), tokenizer_dir)
    rows = data.train.parts.values() if isinstance(data.train, Mixed) else [data.train]
    if (split := layout.mesh.shape["context"]) > 1 and any(isinstance(one, OfManyLengths) for one in rows):
        raise UserError(
            f"mesh.context={split} splits sequences of one length, and data.name={config['data']['name']!r} has rows of many."
            " Use mesh.fsdp."
        )
    config = _filled_in(config, data)
    check_start(config)
    model = build_model(config["model"])
    model = model if pipeline is None else model.clone(pipeline=pipeline)
    teacher = config["task"].get("teacher_model")
    for section in (config["model"], *([teacher] if teacher else [])):
        layout = layout.with_rules(family(section["name"], "RULES", ()))
    task = build_task(config)
    if for_training:
        check_donors(config, task, data)
    inputs = data.train.batch_at(0, slice(0, 1))["inputs"]
    check_inputs(config, model, inputs)
    key = jax.random.key(0)
    # On the mesh, so that what a model cannot do there is found now.
    with jax.set_mesh(layout.mesh):
        traced, variables = jax.make_jaxpr(lambda key: model.init(key, **inputs, train=False), return_shape=True)(key)
        shapes = jax.eval_shape(task.init_params, variables["params"], key)
    layout.check_splits(shapes)
    remat.check(config["model"].get("remat", "none"), traced)
    trains = quantize.quantized(model, train.quantize, variables, inputs) if for_training and train.quantize else model
    scales = mup.scales(
        config, lambda m: jax.eval_shape(lambda k: task.init_params(m.init(k, **inputs, train=False)["params"], k), key)
    )
    optimizer = optim.make(
        shapes, steps=train.steps, scales=scales, **{**config["optim"], "freeze": frozen(config, task)}
    )
    if for_training:
        optim.check_trained(shapes, config["optim"]["lr_multipliers"], frozen(config, task))
    step = make_train_step(task, trains, optimizer.tx, accum=train.accum, seed=train.seed)
    experiment = Experiment(
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
    if for_training and (isinstance(data.train, Mixed) or task.donors):
        _check_batches(experiment)
    return experiment


def _check_batches(experiment: Experiment) -> None:
    """Each part's task must read what its data and the model give, whose first batch may come long after training has begun, and
    a teacher must say what can be learnt from."""
    task, model, train = experiment.task, experiment.model, experiment.data.train
    batches = (
        [{**part.batch_at(0), "part": {name: None}} for name, part in train.parts.items()]
        if isinstance(train, Mixed)
        else [train.batch_at(0)]
    )

    def loss(state: TrainState, batch: Any, key: jax.Array) -> Any:
        return task.loss(bind(model, state.mutables), state.params, state.extra, batch, key, True).total

    with jax.set_mesh(experiment.layout.mesh):
        state = experiment.abstract_state()
        for batch in batches:
            jax.eval_shape(loss, state, batch, jax.random.key(0))


def frozen(config: configs.Config, task: Task) -> list[str]:
    """Patterns of the parameters that are not trained."""
    return [*config["optim"]["freeze"], *task.frozen]


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


def _untold(section: Mapping[str, Any]) -> dict[str, Any]:
    """A data section without what a teacher has said of the run's own examples, which is to learn from."""
    found: dict[str, Any] = {key: None if key == "predictions" else value for key, value in section.items()}
    if "parts" in found:
        found["parts"] = {name: _untold(part) for name, part in found["parts"].items()}
    return found


def _open_data(section: dict[str, Any], tokenizer_dir: Path | None) -> Any:
    saved = str(tokenizer_dir) if tokenizer_dir is not None and tokenizer_dir.is_dir() else None
    return make_named("data", section, tokenizer_dir=lambda _: saved)


def _teacher_model(section: Mapping[str, Any]) -> Any:
    """The `model` section of a task's teacher."""
    return section.get("teacher_model") or _config_of(section["teacher"], "task.teacher")["model"]


def _config_of(run: str, setting: str) -> configs.Config:
    """That of a run that a setting names."""
    try:
        return read_config(run_folder(Path(run)))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


def _filled_in(config: configs.Config, data: Any) -> configs.Config:
    """The config with everything that its data, donor and teacher decide (`configs.FILLED_IN`).

    Raises:
      UserError: a size of the model that is too small for the data.
    """
    model, task, sizes = dict(config["model"]), dict(config["task"]), {"vocab_size": data.vocab_size, **data.sizes}
    donor = config["checkpoint"]["init_from"]
    if donor is not None and model.get("vocab_size", 0) is None and data.vocab_size is not None:
        # Pretraining may have added ids for its masks, which stay where they are.
        there = _config_of(donor, "checkpoint.init_from")["model"].get("vocab_size")
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
        # A model without segments takes no notice of them.
        elif model[name] < size and (name, model[name]) != ("types", 0):
            raise UserError(
                f"model.{name}={model[name]} is too small: the data has {size}. Set at least {size}, or leave it out."
            )
    return {**config, "model": model, "task": task, "data": {**config["data"], **data.filled_in}}

"""What cannot work together, by the config's own names: found before anything is made of it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from tfm_jax import config as configs
from tfm_jax.data.examples import same_classes
from tfm_jax.data.tokenizers import reads_others
from tfm_jax.errors import UserError, nearest
from tfm_jax.evals.base import Evaluate, Evaluator
from tfm_jax.metrics import goal_of
from tfm_jax.nn import remat
from tfm_jax.nn.attention import check as check_attention
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.devices import has_host_memory
from tfm_jax.parallel.sharding import ROW_AXES, Layout
from tfm_jax.sections import build_model, family
from tfm_jax.tasks.base import Task, donor_setting, unknown_inputs
from tfm_jax.train import mup, optim, schedules, settings
from tfm_jax.train.rundir import read_config, run_folder
from tfm_jax.train.stages import pipeline_of


def check(config: configs.Config, layout: Layout) -> None:
    """Combinations of settings that cannot work, found before any data is read."""
    if config["log"]["wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError(f"log.wandb={config['log']['wandb']!r} needs Weights & Biases: pip install 'tfm_jax[wandb]'.")
    names = set(inspect.signature(schedules.make).parameters) - {"steps"}
    schedules.make(steps=config["train"]["steps"], **{name: config["optim"][name] for name in names})
    optim.rule(config["optim"]["name"], config["optim"]["options"] or {}, config["optim"].get("moments", "float32"))
    mup.check(config)
    _check_lengths(config)
    task = config["task"]
    inside = task.get("task")
    tasks, parts = (inside if isinstance(inside, Mapping) else task).get("tasks"), config["data"].get("parts")
    if tasks is not None and parts is not None and (idle := sorted({*tasks} - {*parts})):
        raise UserError(
            f"task.tasks.{idle[0]}: no part of the data is for it.{nearest(idle[0], parts)} See data.parts."
        )
    if tasks is not None and parts is not None and (alone := sorted({*parts} - {*tasks})):
        raise UserError(f"data.parts.{alone[0]} has no task.{nearest(alone[0], tasks)} See task.tasks.")
    outputs, one = config["model"].get("outputs") or (), inside if isinstance(inside, Mapping) else task
    foreign = ":" in task["name"] or ":" in one["name"]  # of another package, and may read them
    if tasks is None and parts is not None and not foreign and {"classes", "tags"} & {*outputs}:
        raise UserError(
            f"model.outputs={tuple(outputs)}: each part of the data has a head of its own, and task.name={one['name']!r} is one"
            " task. Set task.name='mixture', and each part's task in task.tasks."
        )
    _check_watched(config)
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
        if config["train"].get("quantize") and block.operand_dtype != block.compute_dtype:
            raise UserError(
                f"model.matmul_dtype={block.matmul_dtype!r}: what products in 8 bits (train.quantize) round is in"
                f" model.dtype={block.dtype!r}. Leave it out."
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


def _check_lengths(config: configs.Config) -> None:
    """No row of the data, of a part of a mixture or of what an evaluator reads may be longer than the model takes."""
    limit = config["model"].get("max_len")
    lengths = _lengths(config["data"])
    for name, section in config["evals"].items():
        lengths |= _lengths(section["data"] or {}, f"evals.{name}.data")
    for setting, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(f"{setting}={length} is longer than model.max_len={limit}.")


def _lengths(data: Mapping[str, Any], setting: str = "data") -> dict[str, int]:
    """How long the rows of a `data` section and of its parts may be, by setting."""
    sections = {setting: data, **_read_sections(data, setting)}
    found = {f"{where}.seq_len": section.get("seq_len") for where, section in sections.items()}
    return {where: length for where, length in found.items() if isinstance(length, int)}


def _check_watched(config: configs.Config) -> None:
    """What may end a run must be of an evaluator, and better in the direction that is said."""
    watched, goal = config["train"]["stop_metric"], config["train"]["stop_goal"]
    if watched is None:
        return
    kind, _, rest = watched.partition("/")
    name, _, key = rest.partition("/")
    if kind != "eval" or name not in config["evals"]:
        known = [f"eval/{name}/{key or 'loss'}" for name in config["evals"]]
        raise UserError(f"train.stop_metric={watched!r} is of no evaluator.{nearest(watched, known)}")
    better = goal_of(watched)
    if better not in (None, goal):
        raise UserError(f"train.stop_metric={watched!r} is better the {better} it is: set train.stop_goal={better!r}.")


def check_evaluators(config: configs.Config, evaluators: Mapping[str, Evaluate], state: Any) -> None:
    """Each evaluator must be able to evaluate a state of these shapes, and what may end a run must be among what its own gives:
    the first evaluation may come long after training has begun.

    One of another package need not say so (`evals.base.Evaluator`).
    """
    given = {name: one.gives(state) for name, one in evaluators.items() if isinstance(one, Evaluator)}
    watched = config["train"]["stop_metric"]
    if watched is None:
        return
    name, _, key = watched.partition("/")[2].partition("/")
    if name in given and key not in given[name]:
        known = [f"eval/{name}/{one}" for one in given[name]]
        raise UserError(f"train.stop_metric={watched!r} is none that evals.{name} gives.{nearest(watched, known)}")


def _read_sections(data: Mapping[str, Any], setting: str = "data") -> dict[str, Mapping[str, Any]]:
    """Section `data`, or of a mixture its parts, by setting."""
    parts = data.get("parts")
    return {setting: data} if parts is None else {f"{setting}.parts.{name}": part for name, part in parts.items()}


def check_told(config: configs.Config) -> None:
    """A student learns from a teacher, or from what one has said beforehand, and so all parts of a mixture.

    A part that has neither would end the run at its own first batch, which may be long after others.
    """
    task, data = config["task"], config["data"]
    sections = _read_sections(data)
    told = [where for where, section in sections.items() if section.get("predictions") is not None]
    if not told:
        return
    if "teacher" not in task:
        if ":" in task["name"]:  # of another package, and may read them
            return
        raise UserError(
            f"{told[0]}.predictions is what a teacher has said, which task.name={task['name']!r} does not read. Set"
            " task.name='distillation', or leave it out."
        )
    if task["teacher"] is not None:
        raise UserError(f"task.teacher and {told[0]}.predictions are both set: a student learns from one of them.")
    if silent := [where for where in sections if where not in told]:
        raise UserError(
            f"{silent[0]}.predictions is not set, and {told[0]}.predictions is: a student learns every"
            " part from a teacher. Set it for all parts, or task.teacher=RUN instead."
        )


def check_budget(config: configs.Config) -> None:
    """AdaLoRA's ranks are the asked ones only at the end of all steps."""
    adapter = config["train"]["adapter"]
    if adapter is not None and adapter["name"] == "adalora" and config["train"]["stop_metric"] is not None:
        raise UserError(
            "train.adapter.name='adalora' is down to its rank at the end of train.steps, and train.stop_metric may end the run"
            " before: leave one of them out."
        )


def check_start(config: configs.Config) -> None:
    """The id that a decoder begins with must be in the model's table: what is beyond it is NaN."""
    size = config["model"].get("vocab_size")
    for where, section in _read_sections(config["data"]).items():
        start = section.get("decoder_start")
        if start is not None and size is not None and not 0 <= start < size:
            raise UserError(
                f"{where}.decoder_start={start}: the model's ids are 0 to {size - 1} (model.vocab_size={size})."
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


def check_donors(config: configs.Config, task: Task, data: Any) -> None:
    """A teacher must read the ids that this data gives, as many and as far, tell as many segments apart, know its classes in their
    order, and have its numbers in the same unit."""
    for path, run in task.donors.items():
        folder, named = run_folder(Path(run)), donor_setting(path, run)
        if reads_others(folder, data.tokenizer):
            raise UserError(f"{named} reads other ids than this data gives: set data.tokenizer=run:{folder}.")
        if not (folder / "config.json").is_file():
            continue  # One whose folder is gone was looked at when the run began.
        there = read_config(folder)
        size, wanted = there["model"].get("vocab_size"), data.vocab_size
        if size is not None and wanted is not None and size < wanted:
            raise UserError(
                f"{named} has model.vocab_size={size}, and this data has {wanted} ids: a teacher needs them all."
            )
        limit = there["model"].get("max_len")
        for setting, length in _lengths(config["data"]).items():
            if limit is not None and length > limit:
                raise UserError(
                    f"{named} has model.max_len={limit}, and here {setting}={length}: take a teacher that reads as far, or shorter rows."
                )
        types, wanted = there["model"].get("types"), data.sizes.get("types", 0)
        # One without any takes no notice of them; a row that a table has not is NaN.
        if types and types < wanted:
            raise UserError(
                f"{named} has model.types={types}, and this data has {wanted}: a teacher needs at least {wanted}, or 0 for none."
            )
        theirs_by = _scales(there["task"])
        for part, scale in _scales(config["task"]).items():
            if theirs_by.get(part, scale) != scale:
                setting = f"task.tasks.{part}.scale" if part else "task.scale"
                raise UserError(
                    f"{named} has {setting}={theirs_by[part]}, and here it is {scale}: a student's numbers are in its teacher's unit."
                )
        known = _class_names(there["data"])
        for setting, names in _class_names(config["data"]).items():
            theirs = known.get(setting, names)
            if not same_classes(names, theirs):
                raise UserError(
                    f"{named} has {setting}={theirs}, and here it is {names}: set {setting} in the teacher's order."
                )


def _scales(task: Mapping[str, Any]) -> dict[str, float]:
    """What a `task` section's targets that are numbers are divided by, by part of a mixture, else as ""."""
    while isinstance(task.get("task"), Mapping):
        task = task["task"]
    sections = task.get("tasks") or {"": task}
    return {part: float(one.get("scale", 1.0)) for part, one in sections.items() if one.get("name") == "regression"}


def _class_names(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of a `data` section's classes, by their settings; numbers are their own order."""
    found = {f"data.{key}": data.get(key) for key in ("names", "classes")}
    found |= {f"data.parts.{part}.names": section.get("names") for part, section in data.get("parts", {}).items()}
    return {key: list(names) for key, names in found.items() if names and all(isinstance(name, str) for name in names)}


def check_inputs(config: configs.Config, model: nn.Module, inputs: dict[str, Any]) -> None:
    """The model must take what the data gives it; what it needs besides is the task's to give."""
    if wrong := unknown_inputs(model, inputs):
        raise UserError(
            f"data.name={config['data']['name']!r} gives {', '.join(sorted(inputs))}, but"
            f" model.name={config['model']['name']!r} takes no {', '.join(wrong)}."
        )

"""What a run with adapters has trained, by itself: a small file that goes on top of the model it began with."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as packed

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic, write_status
from tfm_jax.paths import compile_patterns, flatten
from tfm_jax.sections import family
from tfm_jax.tasks.adapters import KEY
from tfm_jax.tasks.ema import averaged
from tfm_jax.train import rundir
from tfm_jax.train.build import build_task
from tfm_jax.train.checkpoint import Checkpointer
from tfm_jax.train.restore import load_params, load_trained
from tfm_jax.train.surgery import LINE, Misfit, transfer

ARRAYS, RECORD = "adapter.safetensors", "adapter.json"


def save(run: Path, folder: Path, step: int | None = None) -> dict[str, Any]:
    """Write a run's adapters, and what `train.adapter.train` names, with its config and a hash of what they stand on.

    Of a run with an average (`train.ema`) they are the average's, and the config that is kept has none; nor has it a teacher.
    Triplets that AdaLoRA has dropped are written too, and counted, with an s of zero.

    Raises:
      UserError: the run has no adapters, or the folder is not new.
    """
    config = rundir.read_config(run)
    section = config["train"].get("adapter")
    if section is None:
        raise UserError(f"{run} has no adapters: it was trained without train.adapter.")
    if folder.exists():
        raise UserError(f"{folder} is there already: give a new folder.")
    trained, averages = load_trained(run, step), config["train"]["ema"] is not None
    config["train"]["ema"] = None
    task = build_task(config)
    # A teacher has done its work: the student is evaluated by the task inside, and what the wrapper has added is no base's.
    config["task"] = config["task"].get("task", config["task"])
    added = [re.compile(pattern) for pattern in task.own]
    leaves = {p: x for p, x in flatten(trained.params).items() if not any(regex.search(p) for regex in added)}
    used = flatten(averaged(task, trained.extra)) if averages else leaves
    patterns = compile_patterns(section["train"], setting="train.adapter.train")
    own = {p: x for p, x in used.items() if p.startswith(f"{KEY}/") or any(regex.search(p) for regex in patterns)}
    # Not the average of what never changed, which is the same but for rounding.
    base = {path: x for path, x in leaves.items() if path not in own}
    folder.mkdir(parents=True)
    # `save_file` would make a file that only its owner may read.
    write_atomic(folder / ARRAYS, packed({path: np.asarray(x) for path, x in own.items()}))
    if (run / "tokenizer").is_dir():
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
    shapes = {path: list(x.shape) for path, x in base.items()}
    record = {"config": config, "step": trained.step, "base": _digest(base), "shapes": shapes}
    write_atomic(folder / RECORD, configs.to_json(record))
    count = sum(x.size for x in own.values())
    return {
        "step": trained.step,
        "arrays": len(own),
        "parameters": count,
        "share": count / sum(x.size for x in leaves.values()),
    }


def put_on(folder: Path, base: Path, run: Path) -> dict[str, Any]:
    """Make a run of a base's parameters with saved adapters merged into them.

    Raises:
      UserError: the folder holds no adapters, the base is not the one that they were trained on, or the run is not new.
    """
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} holds no adapters: it has no {RECORD}.")
    if run.exists():
        raise UserError(f"{run} is there already: give a new run directory.")
    record = json.loads((folder / RECORD).read_text())
    config = record["config"]
    with safe_open(folder / ARRAYS, "numpy") as file:
        own = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    task, settings = build_task(config), config["checkpoint"]
    # The base is taken as the run had taken it: without heads that it did not want, and with its names and layers.
    blank = tree_of({path: jax.numpy.zeros(shape) for path, shape in record["shapes"].items()})
    donor = flatten(load_params(base)[0])
    try:
        taken, report = transfer(
            donor,
            blank,
            rename=settings["rename"],
            layers=settings["layers"],
            resize_positions=settings["resize_positions"],
            resize=family(config["model"]["name"], "RESIZE", LINE),
        )
    except Misfit as error:
        raise UserError(f"{base} is not what these adapters were trained on: {error.why}.") from None
    if report.missing:
        raise UserError(f"{base} has no {report.missing[0]}, which these adapters stand on.")
    leaves = flatten(taken)
    tree = tree_of({**leaves, **{path: jax.numpy.asarray(x) for path, x in own.items()}})
    kernels = {path.removeprefix(f"{KEY}/").rpartition("/")[0] for path in own if path.startswith(f"{KEY}/")}
    if _digest(leaves) != record["base"]:
        raise UserError(f"{base} is not what these adapters were trained on: its other parameters differ.")
    merged = task.eval_params(tree, jax.eval_shape(task.init_extra, tree))
    config["train"]["adapter"] = None
    checkpoints = Checkpointer(run / "checkpoints", asynchronous=False)
    meta = {"data": None, "adapters": str(folder.absolute()), "versions": rundir.versions()}
    checkpoints.save(
        record["step"], {"step": jax.numpy.asarray(record["step"], jax.numpy.int32), "params": merged}, meta
    )
    checkpoints.close()
    if (folder / "tokenizer").is_dir():
        shutil.copytree(folder / "tokenizer", run / "tokenizer")
    write_atomic(run / "config.json", configs.to_json(config))
    write_status(run, "finished", f"adapters of {folder} on {base}", step=record["step"])
    return {"step": record["step"], "adapted": len(kernels), "run": str(run)}


def tree_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of arrays by path."""
    tree: dict[str, Any] = {}
    for path, x in leaves.items():
        *above, last = path.split("/")
        place = tree
        for name in above:
            place = place.setdefault(name, {})
        place[last] = x
    return tree


def _digest(leaves: dict[str, Any]) -> str:
    """Of every parameter's path, shape and values."""
    digest = hashlib.sha256()
    for path in sorted(leaves):
        x = np.asarray(leaves[path])
        digest.update(f"{path} {x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()

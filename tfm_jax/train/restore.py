"""Read checkpoints of other runs: for evaluation, generation, and as donors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tfm_jax.errors import UserError, nearest
from tfm_jax.paths import flatten, map_with_path
from tfm_jax.train.build import Experiment
from tfm_jax.train.checkpoint import Checkpointer, CorruptCheckpoint
from tfm_jax.train.state import TrainState
from tfm_jax.train.surgery import Report, transfer


def open_checkpoint(path: Path, step: int | None = None) -> tuple[Checkpointer, int]:
    """The checkpoints of a run folder (the newest step, unless one is named), or one `RUN/checkpoints/STEP`.

    Raises:
      UserError: there is none, with the steps that there are.
    """
    if path.name.isdigit() and path.parent.name == "checkpoints":
        path, step = path.parent.parent, int(path.name)
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{path} has no checkpoints: give a run folder, or RUN/checkpoints/STEP.")
    checkpoints = Checkpointer(folder, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{path} has no finished checkpoint yet.")
    if step is not None and step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}.{nearest(step, steps)}")
    return checkpoints, steps[-1] if step is None else step


def restore_for_evaluation(experiment: Experiment, path: Path, step: int | None = None) -> tuple[TrainState, int]:
    """Parameters and what evaluation needs, on the experiment's mesh; the optimizer's state is not read.

    Raises:
      UserError: no such checkpoint, or it is damaged (`train` would fall back; here the answer would be for another
        step than asked).
    """
    checkpoints, found = open_checkpoint(path, step)
    abstract = experiment.abstract_state()._replace(opt={})
    try:
        restored = checkpoints.restore(found, abstract, partial=True)
    except CorruptCheckpoint as error:
        raise UserError(f"Checkpoint {found} of {path} is damaged: {error}.{nearest('', checkpoints.steps())}") from None
    finally:
        checkpoints.close()
    return restored.state, found


def load_donor(path: Path, params: Any, *, rename: Sequence[Any], resize_positions: bool) -> tuple[Any, Report]:
    """The parameters of another run (their average, if it kept one) in the place of `params`."""
    checkpoints, step = open_checkpoint(path)
    shapes = checkpoints.shapes(step)
    averaged = "ema" in (shapes.get("extra") or {})
    placed = {leaf_path: leaf.sharding for leaf_path, leaf in flatten(params).items()}
    # Where the names agree the donor is read straight onto its place; the rest is whole on every device until moved.
    whole = jax.sharding.NamedSharding(next(iter(placed.values())).mesh, jax.sharding.PartitionSpec())

    def place(leaf_path: str, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed.get(leaf_path, whole))

    wanted = map_with_path(place, shapes["extra"]["ema"] if averaged else shapes["params"])
    abstract = {"extra": {"ema": wanted}} if averaged else {"params": wanted}
    try:
        state = checkpoints.restore(step, abstract, partial=True).state
    except CorruptCheckpoint as error:
        raise UserError(f"checkpoint.init_from: checkpoint {step} of {path} is damaged: {error}.") from None
    finally:
        checkpoints.close()
    found = state["extra"]["ema"] if averaged else state["params"]
    return transfer(flatten(found), params, rename=rename, resize_positions=resize_positions)

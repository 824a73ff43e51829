"""Read checkpoints: a run's own to go on from, other runs' for evaluation, generation, and as donors."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tfm_jax.config import Config
from tfm_jax.data.tokenizers import reads_others
from tfm_jax.data.types import Tokenizer
from tfm_jax.errors import UserError, nearest
from tfm_jax.paths import flatten, map_with_path
from tfm_jax.sections import computes, family
from tfm_jax.tasks.base import Task, donor_setting
from tfm_jax.train.build import Experiment, build_task, frozen
from tfm_jax.train.checkpoint import Checkpointer, CorruptCheckpoint, Restored, first_state
from tfm_jax.train.rundir import differences, nearest_run, read_config, run_folder
from tfm_jax.train.state import TrainState
from tfm_jax.train.surgery import LINE, Report, Resize, transfer
from tfm_jax.units import counted

log = logging.getLogger(__name__)


def open_checkpoint(path: Path, step: int | None = None) -> tuple[Checkpointer, int]:
    """The checkpoints of a run folder (the newest step, unless one is named), or one `RUN/checkpoints/STEP`.

    Raises:
      UserError: there is none, with the steps that there are; or the path names one step, and `step` another.
    """
    if run_folder(path) != path:
        if step not in (None, int(path.name)):
            raise UserError(
                f"{path} is the checkpoint of step {path.name}, and asked for is step {step}: give {run_folder(path)}."
            )
        path, step = run_folder(path), int(path.name)
    folder = path / "checkpoints"
    if not path.exists():
        raise UserError(f"There is no run {path}.{nearest_run(path)}")
    if not folder.is_dir():
        raise UserError(f"{path} has no checkpoints: give a run folder, or RUN/checkpoints/STEP.")
    checkpoints = Checkpointer(folder, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{path} has no finished checkpoint yet.")
    if step is not None and step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}. There are: {', '.join(map(str, steps))}.")
    return checkpoints, steps[-1] if step is None else step


def restore_for_evaluation(
    experiment: Experiment,
    path: Path,
    step: int | None = None,
    *,
    same_data: bool = True,
    average: int = 1,
    decay: float = 1.0,
) -> tuple[TrainState, int]:
    """Parameters and what evaluation needs, on the experiment's mesh; the optimizer's state is not read.

    Args:
      average: over this many checkpoints, the asked one and those before it (Vaswani et al. 2017, section 6.1).
      decay: each of them weighs this much of the next, 1 for a plain mean.
      same_data: refuse data that is not the run's own.

    Raises:
      UserError: no such checkpoint, other data, or it is damaged (`train` would fall back; here the answer would be for another
        step than asked).
    """
    checkpoints, found = open_checkpoint(path, step)
    abstract = experiment.abstract_state()._replace(opt={})
    if experiment.task.carry is not None:
        abstract = abstract._replace(extra=experiment.task.carry.forget(abstract.extra))
    wanted = abstract._asdict()
    # Without the average that it was trained with, the run's own task is what that is around.
    inside = experiment.train.ema is None and read_config(run_folder(path))["train"]["ema"] is not None
    if inside:
        wanted["extra"] = {"inner": wanted["extra"]}
    restored = _read(checkpoints, path, found, wanted, average, decay)
    trained_on, here = restored.meta.get("data"), experiment.data.fingerprint
    if same_data and trained_on not in (None, here):
        raise UserError(
            f"The data here is not what {path} was trained on (fingerprint {trained_on} then, {here} now): the figures"
            " would not be comparable. Restore the data, or name other data on purpose with --config.data.source."
        )
    state = abstract._replace(**restored.state)
    state = state._replace(extra=state.extra["inner"]) if inside else state
    return state._replace(params=experiment.task.project(state.params, state.extra)), found


def latest(path: Path, steps: Sequence[int], last: int, count: int) -> list[int]:
    """The last `count` steps up to one.

    Raises:
      UserError: there are fewer.
    """
    found = [step for step in steps if step <= last][-count:] if count > 0 else []
    if len(found) < max(count, 1):
        raise UserError(
            f"--average={count}: {path} has {counted(len(found), 'checkpoint')} up to step {last}. A run keeps more of them with"
            " checkpoint.keep."
            if count > 0
            else f"--average={count}: must be at least 1."
        )
    return found


def _read(
    checkpoints: Checkpointer, path: Path, step: int, wanted: Mapping[str, Any], average: int, decay: float
) -> Restored:
    """Trees of a checkpoint, or their mean over it and those before it; the checkpoints are closed."""
    # Orbax keeps no node for an empty tree.
    kept = {name: tree for name, tree in wanted.items() if jax.tree.leaves(tree)}
    steps, weight, mean = checkpoints.steps(), 0.0, dict[str, Any]()
    try:
        for one in latest(path, steps, step, average):
            newer, weight = checkpoints.restore(one, kept, partial=True), weight * decay + 1
            mean = _mean(mean, newer.state, 1 / weight) if mean else newer.state
    except CorruptCheckpoint as error:
        raise _damaged(path, one, steps, error) from None
    finally:
        checkpoints.close()
    return newer._replace(state={**wanted, **mean})


def _damaged(path: Path, step: int, steps: Sequence[int], error: CorruptCheckpoint) -> UserError:
    return UserError(
        f"Checkpoint {step} of {path} is damaged: {error}.{nearest('', [other for other in steps if other != step])}"
    )


def _mean(mean: Any, newer: Any, share: float) -> Any:
    """A mean with the newer tree's share in it; numbers that are not fractions are the newer one's."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return a + (b - a) * share if jax.numpy.issubdtype(b.dtype, jax.numpy.floating) else b

    return jax.tree.map(leaf, mean, newer)


def load_params(
    path: Path, step: int | None = None, *, sharding: Any = None, average: int = 1, decay: float = 1.0
) -> tuple[Any, int]:
    """The parameters that the run's task evaluates with (an average, if it keeps one) as a plain tree, and their step.

    Args:
      average, decay: over which checkpoints, see `restore_for_evaluation`.
      sharding: a function from `(parameter's path, abstract array)` to a sharding; the first device holds all if None.

    Raises:
      UserError: no such checkpoint, or it is damaged.
    """
    found = load_trained(path, step, sharding=sharding, average=average, decay=decay)
    # What is trained is averaged, and not what is made from it: adapters, and not the kernels that they change.
    return found.task.eval_params(found.params, found.extra), found.step


class Trained(NamedTuple):
    """A run's task, and what it has trained and carries."""

    task: Task
    params: Any
    extra: Any
    step: int


def load_trained(
    path: Path, step: int | None = None, *, sharding: Any = None, average: int = 1, decay: float = 1.0
) -> Trained:
    """What `load_params` makes its parameters of; the arguments are its own."""
    checkpoints, found = open_checkpoint(path, step)
    task = build_task(read_config(run_folder(path)))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoints.shapes(found)["params"])
    wanted = {"params": params, "extra": jax.eval_shape(task.init_extra, params)}
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    names = set(flatten(params))

    def place(leaf_path: str, leaf: Any) -> Any:
        # What a task keeps for a parameter has the parameter's path as its end.
        parts = leaf_path.split("/")
        name = next((n for i in range(len(parts)) if (n := "/".join(parts[i:])) in names), leaf_path)
        where = here if sharding is None else sharding(name, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    abstract = {name: map_with_path(place, tree) for name, tree in wanted.items()}
    mean = _read(checkpoints, path, found, abstract, average, decay).state
    # A mean of what some of the checkpoints hold at zero is not zero there.
    return Trained(task, task.project(mean["params"], mean["extra"]), mean["extra"], found)


# Settings of the data that parameters have been trained for.
_SEEN = ("decoder_start", "classes", "names", "fit", "scaled_to", "resample", "mean", "std")


def _differences(run: Path, own: Config, tokenizer: Tokenizer | None) -> list[str]:
    """What a donor's parameters compute or read differently here; heads that only one has are in the transfer's report."""
    donor = read_config(run)
    there, here = computes(donor["model"]), computes(own["model"])
    both = [key for key in here if key in there and key not in ("outputs", "classes")]
    lines = [f"model.{key}: {there[key]!r} there, {here[key]!r} here" for key in both if there[key] != here[key]]
    if donor["data"]["name"] == own["data"]["name"]:
        for key in (key for key in _SEEN if key in own["data"]):
            values = donor["data"].get(key), own["data"][key]
            if values[0] is not None and values[0] != values[1]:
                lines.append(f"data.{key}: {values[0]!r} there, {values[1]!r} here")
    if reads_others(run, tokenizer):
        lines.append(f"data.tokenizer: another than the donor's, which is data.tokenizer=run:{run}")
    return lines


def _places(own: Mapping[str, jax.Array]) -> Callable[[str, Any], Any]:
    """Where a donor's arrays go: where those of the same path and shape are, and what has no place here on all devices."""
    known = next(iter(own.values())).sharding
    assert isinstance(known, jax.sharding.NamedSharding)
    whole = jax.sharding.NamedSharding(known.mesh, jax.sharding.PartitionSpec())

    def place(path: str, leaf: Any) -> Any:
        return own[path].sharding if path in own and own[path].shape == leaf.shape else whole

    return place


def load_donor(
    path: Path,
    params: Any,
    *,
    rename: Sequence[Any],
    resize_positions: bool,
    layers: Sequence[int] | None = None,
    resize: Sequence[Resize] = LINE,
) -> tuple[Any, Report]:
    """Another run's parameters in the place of `params`; see `surgery.transfer`."""
    try:
        donor, _ = load_params(path, sharding=_places(flatten(params)))
    except UserError as error:
        raise UserError(f"checkpoint.init_from: {error}") from None
    return transfer(
        flatten(donor), params, rename=rename, layers=layers, resize_positions=resize_positions, resize=resize
    )


def with_donors(state: TrainState, donors: Mapping[str, str]) -> TrainState:
    """A new state with what its task reads from other runs, each array where its place is.

    Raises:
      UserError: a run's parameters are not those of the model that they are for.
    """
    extra = state.extra
    for path, run in donors.items():
        own = {n.removeprefix(f"{path}/"): x for n, x in flatten(extra).items() if n.startswith(f"{path}/")}
        found = flatten(load_params(Path(run), sharding=_places(own))[0])
        odd = {
            "missing": own.keys() - found.keys(),
            "extra": found.keys() - own.keys(),
            "of another shape": {n for n in own.keys() & found.keys() if own[n].shape != found[n].shape},
        }
        if any(odd.values()):
            said = [f"{what}: {', '.join(sorted(names)[:8])}" for what, names in odd.items() if names]
            named = donor_setting(path, run)
            raise UserError(f"{named}: its parameters are not those of task.teacher_model; {'; '.join(said)}.")
        values = {f"{path}/{name}": x for name, x in found.items()}

        def taken(name: str, x: Any, values: Mapping[str, Any] = values) -> Any:
            return values.get(name, x)

        extra = map_with_path(taken, extra)
    return state._replace(extra=extra)


def starting_state(experiment: Experiment, checkpoints: Checkpointer, *, main: bool) -> Restored:
    """Where a run goes on or begins; see `checkpoint.first_state` for the order.

    Raises:
      UserError: the data is not what the checkpoint was trained on, or the checkpoint is beyond the run's last step.
    """
    settings, abstract = experiment.checkpoint, experiment.abstract_state()

    def resume() -> Restored:
        path = Path(str(settings.resume))
        source, step = open_checkpoint(path)
        changes = differences(run_folder(path), experiment.config)
        if main and (told := [line for line in changes if not line.startswith("checkpoint.")]):
            log.warning("resume %s: its config differs (its own -> here):\n  %s", path, "\n  ".join(told))
        try:
            return source.restore(step, abstract)
        except CorruptCheckpoint as error:
            raise _damaged(path, step, source.steps(), error) from None
        finally:
            source.close()

    def init_from(state: Any) -> Any:
        params, report = load_donor(
            Path(str(settings.init_from)),
            state.params,
            rename=settings.rename,
            layers=settings.layers,
            resize_positions=settings.resize_positions,
            resize=family(experiment.config["model"]["name"], "RESIZE", LINE),
        )
        held = frozen(experiment.config, experiment.task)
        if idle := [path for path in report.missing if any(re.search(pattern, path) for pattern in held)]:
            more = f" and {len(idle) - 4} more" if len(idle) > 4 else ""
            raise UserError(
                f"checkpoint.init_from={str(settings.init_from)!r} has no {', '.join(idle[:4])}{more}, which are frozen here and would"
                " stay as they were drawn. Let train.adapter.train name them too, or optim.freeze leave them out."
            )
        if main:
            log.warning("init_from %s: %s", settings.init_from, report)
            donor = run_folder(Path(str(settings.init_from)))
            if changed := _differences(donor, experiment.config, experiment.data.tokenizer):
                log.warning("init_from: the donor was made for something else:\n  %s", "\n  ".join(changed))
        # In one program, so that what is not made from the parameters (a memory) is born split too.
        shardings = jax.tree.map(lambda x: x.sharding, abstract.extra)
        extra = jax.jit(experiment.task.init_extra, out_shardings=shardings)(params)
        return state._replace(params=params, extra=extra)

    start, origin = first_state(
        checkpoints,
        abstract,
        resume=resume if settings.resume else None,
        initialise=experiment.fresh_state,
        init_from=init_from if settings.init_from else None,
    )
    if main and origin == "scratch" and frozen(experiment.config, experiment.task):
        log.warning("what is frozen stays as it was drawn: checkpoint.init_from names no run to begin with.")
    if origin in ("initialised", "scratch"):
        start = start._replace(state=with_donors(start.state, experiment.task.donors))
    for key, what, here in (
        ("data", "data has", experiment.data.fingerprint),
        ("told", "teacher's predictions have", experiment.data.told),
    ):
        if (saved := start.meta.get(key, here)) != here:
            raise UserError(
                f"The {what} changed since this run's checkpoint was written (fingerprint {saved} then,"
                f" {here} now), so going on would not be the same run. Restore the data, or start"
                " another run with checkpoint.init_from."
            )
    if start.step > experiment.train.steps:
        raise UserError(f"The checkpoint is of step {start.step}, beyond train.steps={experiment.train.steps}.")
    if main and origin != "scratch":
        log.info("%s at step %d.", origin, start.step)
    return start

"""A sweep's folder: a run directory for each trial, and what has become of each.

DIR/sweep.json          what is swept: config, overrides of all trials that may not change, the study if there is one, metric and direction
DIR/NAME/               a run directory as any other, and beside its files
DIR/NAME/trial.json     the trial: its name, number and overrides; there as soon as the trial is known
DIR/NAME/train.log      what the run has printed
DIR/NAME/pruned         a launcher has stopped it, with the reason
DIR/NAME/failed         it could not say itself why it failed
DIR/study.log           Optuna's journal, of a study without a database
DIR/owner               whose trials these are, in a database that other folders share
DIR/.locks/NAME         held by who runs the trial, and by the run itself: who has it first, runs it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tfm_jax import config as configs
from tfm_jax.data.locks import locked
from tfm_jax.errors import UserError
from tfm_jax.files import read_status, write_atomic, write_status
from tfm_jax.sweep.space import Trial
from tfm_jax.train import rundir
from tfm_jax.train.log import read_metrics

# What a run's `status.json` may say, `waiting` before there is one and of what is to be tried again, `pruned` where a
# launcher has stopped it.
FINISHED, FAILED, PRUNED, WAITING, RUNNING = "finished", "failed", "pruned", "waiting", "running"
ENDED = (FINISHED, FAILED, PRUNED)
# What reading a damaged file ends in.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError)


class State(NamedTuple):
    """What has become of a trial: one of the words above or of `status.json`, the reason, and its last step."""

    word: str
    reason: str = ""
    step: int = 0


def state(run: Path) -> State:
    """From a run's files, which may be damaged: then it has failed, and says so; or has finished, and says that too."""
    word, reason = said(run)
    try:
        step = _last_step(run)
    except DAMAGE as error:
        return State(FAILED, _damaged(run / "metrics.jsonl", error))
    if word == FINISHED:
        try:
            _read_result(run)
        except (OSError, ValueError, AttributeError) as error:
            reason = _damaged(run / "result.json", error)
    return State(word, reason, step)


def said(run: Path) -> tuple[str, str]:
    """The state's word and reason by themselves, without reading the metrics."""
    try:
        status = read_status(run)
        word, reason = str(status.get("state", WAITING)), str(status.get("reason", ""))
    except (OSError, ValueError) as error:
        word, reason = FAILED, _damaged(run / "status.json", error)
    for verdict in (PRUNED, FAILED):
        # What a launcher says of a run that it has stopped, or that could not say so itself.
        if word != FINISHED and (run / verdict).is_file():
            return verdict, (run / verdict).read_text(errors="replace")
    return word, reason


def _last_step(run: Path) -> int:
    return max((int(line["step"]) for line in read_metrics(run)), default=0)


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name} is damaged: {type(error).__name__}: {error}"


def forget_failure(folder: Path, name: str) -> None:
    """Let a failed trial wait for whoever takes it up, if nobody works on it; damaged metrics are put aside."""
    run = folder / name
    with held(folder, name) as lock:
        found = state(run)
        if lock is None or found.word != FAILED:
            return
        try:
            _last_step(run)
        except DAMAGE:
            (run / "metrics.jsonl").rename(run / "damaged_metrics.jsonl")
        # It may wait for long, and for a process that was not told why.
        write_status(run, WAITING, f"it has failed before: {found.reason}")
        (run / FAILED).unlink(missing_ok=True)


def tell_stopped(folder: Path) -> None:
    """Say of each run that had no time to say so itself that it has been stopped, if nobody works on it."""
    for run in (folder / trial.name for trial in read_folder(folder)[1]):
        if said(run)[0] == RUNNING:
            with held(folder, run.name) as lock:
                if lock is not None and said(run)[0] == RUNNING and not rundir.is_claimed(run):
                    write_status(run, "preempted", "it was stopped before it could save")


def result(run: Path) -> dict[str, float]:
    """The final metrics; none where it has not finished, or they cannot be read."""
    try:
        return _read_result(run)
    except (OSError, ValueError, AttributeError):
        return {}


def _read_result(run: Path) -> dict[str, float]:
    found = json.loads((run / "result.json").read_text())
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def values(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """What a run's `metrics.jsonl` has of a metric, by step."""
    return {int(line["step"]): float(line[metric]) for line in lines if metric in line}


@contextlib.contextmanager
def held(folder: Path, name: str) -> Iterator[IO[str] | None]:
    """The lock of a trial, or None where somebody has it. A process that inherits the file holds it on."""
    path = folder / ".locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def open_folder(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what is swept, or check that the folder's sweep is the same one.

    Raises:
      UserError: the folder belongs to another sweep, with what differs, or is a run.
    """
    path = folder / "sweep.json"
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} is a run. A sweep needs a folder of its own: --workdir=sweeps/NAME.")
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        own = _record(path)
        if "overrides" in own:
            # Folders that are older have those that may change too.
            own["overrides"] = configs.fixed_part(own["overrides"])
        check_same(str(folder), own, record)
        return
    write_atomic(path, json.dumps(record, default=repr, indent=2) + "\n")


def check_same(place: str, own: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuse a place that belongs to another sweep.

    Raises:
      UserError: what differs.
    """
    plain = json.loads(json.dumps(record, default=repr))
    if changed := [key for key in sorted(own.keys() | plain) if own.get(key) != plain.get(key)]:
        lines = "".join(f"\n  {key}: {own.get(key)!r} -> {plain.get(key)!r}" for key in changed)
        raise UserError(f"{place} belongs to another sweep:{lines}\nUse another --workdir.")


def owner(folder: Path) -> str:
    """The folder's own name among those that share a database, on whatever machine and wherever it is moved."""
    path = folder / "owner"
    with locked(folder / ".locks" / "owner"):
        if not path.is_file():
            write_atomic(path, uuid.uuid4().hex)
    return path.read_text()


def write_trial(folder: Path, trial: Trial, number: int) -> None:
    """Say in a trial's folder what it is.

    Raises:
      UserError: the folder is that of a trial with other overrides.
    """
    path = folder / trial.name / "trial.json"
    record = {"trial": trial.name, "number": number, "overrides": trial.overrides}
    new, once = (json.loads(json.dumps(record, default=default)) for default in (_plain, repr))
    # A damaged one is written anew.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        own = json.loads(path.read_text())
        # Folders that are older have numbers of NumPy's as `repr` spells them.
        if own["overrides"] not in (new["overrides"], once["overrides"]):
            raise UserError(
                f"{folder / trial.name} is of another sweep: it has {own['overrides']}. Use another --workdir."
            )
        if own == new:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(new) + "\n")


def _plain(value: Any) -> Any:
    """What JSON has for a number of NumPy's or JAX's, or a path."""
    if getattr(value, "shape", None) == ():
        return value.item()
    return str(value) if isinstance(value, Path) else repr(value)


def list_trials(folder: Path, listed: Sequence[Trial]) -> None:
    """Write all trials of a list, which may have more than the folder has so far.

    Raises:
      UserError: the folder has a trial that the list has not.
    """
    known = {trial.name for trial in listed}
    if others := [path.parent.name for path in sorted(folder.glob("*/trial.json")) if path.parent.name not in known]:
        raise UserError(
            f"{folder} belongs to another sweep: it has the trial {others[0]}, which is not among the {len(listed)}."
            " A sweep may become longer, as long as its trials keep their names. Use another --workdir."
        )
    for number, trial in enumerate(listed):
        write_trial(folder, trial, number)


def read_folder(folder: Path) -> tuple[dict[str, Any], list[Trial]]:
    """What is swept, and the trials so far in their order; of one whose record is damaged no overrides are known.

    Raises:
      UserError: the folder is no sweep.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a sweep: it has no sweep.json.")
    found = []
    for one in sorted(folder.glob("*/trial.json")):
        try:
            record = json.loads(one.read_text())
            found.append((int(record["number"]), Trial(one.parent.name, dict(record["overrides"]))))
        except (OSError, ValueError, KeyError, TypeError):
            found.append((len(found), Trial(one.parent.name, {})))
    return _record(path), [trial for _, trial in sorted(found, key=lambda pair: pair[0])]


def _record(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text()))
        return found
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{_damaged(path, error)}. Delete it, and type the command of {path.parent} again.") from None

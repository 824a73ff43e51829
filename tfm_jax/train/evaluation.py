"""Evaluate checkpoints of runs: equal work once, and one compiled step for all checkpoints of runs that are alike.

Results stand in `RUN/evaluations.jsonl`, a line for each evaluator and checkpoint with a hash of all that determines it, but for the
code: after a change of an evaluator's, `--again` does it anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.evals.base import Evaluate
from tfm_jax.files import read_status
from tfm_jax.parallel import multihost
from tfm_jax.train import rundir
from tfm_jax.train.build import Experiment, build
from tfm_jax.train.checkpoint import CHECKSUMS
from tfm_jax.train.log import EVALUATIONS, read_evaluations
from tfm_jax.train.restore import latest, restore_for_evaluation

log = logging.getLogger(__name__)
# Of one that is followed: what passes between two starts of a run.
GRACE_S = 60.0
# Keys of the data that say where it is and how it is made ready; what it comes to is in its fingerprint.
_WHERE = ("cache_dir", "manual_dir", "workers")


class _Made(NamedTuple):
    experiment: Experiment
    evaluators: dict[str, Evaluate]
    fingerprints: dict[str, str]


class Evaluations:
    """Evaluators of runs, made once for all runs that share what they evaluate with.

    Args:
      overrides: of each run's config.
      average, decay: see `restore_for_evaluation`.
      again: do what has been done before, too.
    """

    def __init__(
        self, overrides: Sequence[tuple[str, str]], *, average: int = 1, decay: float = 1.0, again: bool = False
    ) -> None:
        self._overrides, self._average, self._decay, self._again = list(overrides), average, decay, again
        self._same_data = not any(key.startswith("data.") for key, _ in overrides)
        self._made: dict[str, _Made] = {}

    def of(self, run: Path, step: int) -> dict[str, Any]:
        """What there is to say of a checkpoint: `step`, `average`, `decay`, `overrides`, and `eval/NAME/KEY` for each evaluator.

        Raises:
          UserError: see `restore_for_evaluation`; or an override that a run does not heed.
        """
        made = self._evaluators(run)
        experiment, evaluators = made.experiment, made.evaluators
        asked: dict[str, Any] = {"step": step, "average": self._average, "decay": self._decay}
        asked |= {"overrides": dict(self._overrides)}
        known = {} if self._again else recorded(run)
        works = {name: self._work(made, run, step, name) for name in evaluators}
        found = {name: known[work] for name, work in works.items() if work in known}
        if found:
            log.info("%s, step %d: %s is known from an earlier evaluation.", run, step, ", ".join(found))
        if len(found) < len(evaluators):
            with jax.set_mesh(experiment.layout.mesh):
                state, _ = restore_for_evaluation(
                    experiment,
                    run,
                    step,
                    same_data=self._same_data,
                    average=self._average,
                    decay=self._decay,
                )
                for name, evaluate in evaluators.items():
                    if name not in found:
                        found[name] = {f"eval/{name}/{key}": value for key, value in evaluate(state).items()}
                        _record(run, {"work": works[name], **asked, "results": found[name]})
        return {**asked, **{key: value for name in evaluators for key, value in found[name].items()}}

    def _evaluators(self, run: Path) -> _Made:
        for key, value in self._overrides:
            if {"data", "tokenizer"} <= set(key.split(".")) and (run / "tokenizer").is_dir():
                raise UserError(
                    f"--config.{key}={value}: {run} reads by its own tokenizer, whose ids its parameters are for. Leave it out."
                )
        # The mesh was the training machine's; here all devices share the batch unless an override says otherwise.
        config = configs.resolve({**rundir.read_config(run), "mesh": {}}, self._overrides)
        shared = {name: config[name] for name in ("model", "task", "data", "evals", "mesh")}
        shared |= {"train": {**config["train"], "seed": None}, "tokenizer": _digest(run / "tokenizer")}
        key = json.dumps(shared, sort_keys=True, default=str)
        if key not in self._made:
            experiment = build(config, tokenizer_dir=run / "tokenizer", for_training=False)
            prints = {name: experiment.evaluation_data(name).fingerprint for name in config["evals"]}
            self._made[key] = _Made(experiment, experiment.evaluators(), prints)
        return self._made[key]

    def _work(self, made: _Made, run: Path, step: int, name: str) -> str:
        """A hash of all that determines an evaluator's results but code; of the mesh, only the rows that it makes."""
        config, checkpoints = made.experiment.config, run / "checkpoints"
        steps = latest(run, rundir.checkpoint_steps(run), step, self._average)
        parts = {
            "checkpoints": [_digest(checkpoints / str(one) / CHECKSUMS) for one in steps],
            "decay": self._decay,
            "config": {section: config[section] for section in ("model", "task")},
            "train": {key: config["train"][key] for key in ("ema", "adapter")},
            "evaluator": config["evals"][name],
            "data": made.fingerprints[name],
            # A fingerprint need not have how the data is cut into batches, nor what an evaluator reads besides.
            "read": {key: value for key, value in config["data"].items() if key not in _WHERE},
            "rows": made.experiment.evaluation_rows(name),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recorded(run: Path) -> dict[str, dict[str, float]]:
    """Results by the hash of their work."""
    return {one["work"]: one["results"] for one in read_evaluations(run) if {"work", "results"} <= one.keys()}


def _record(run: Path, record: dict[str, Any]) -> None:
    if multihost.is_main():
        with open(run / EVALUATIONS, "a+b") as out:
            # Behind a line that a crash has cut off, this one would be lost too.
            if out.tell() and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n":
                out.write(b"\n")
            out.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())


def _digest(path: Path) -> str:
    """Of a file, or the files of a folder; of what is not there, of nothing."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def following(
    runs: Sequence[Path],
    wait: Callable[[], None],
    *,
    grace: float = GRACE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Path, int]]:
    """Each checkpoint of some runs as it appears, until all runs have ended; `wait()` is called where there is nothing to do.

    A run has ended where it says so, or where no process has trained in it for `grace` seconds: one that was killed cannot say so,
    and one that was preempted may be started again. One that has not begun is waited for.
    """
    seen, left, said = set[tuple[Path, int]](), dict[Path, float](), set[Path]()

    def ended(run: Path) -> bool:
        if rundir.is_claimed(run):
            left.pop(run, None)
            return False
        try:
            state = read_status(run).get("state")
        except ValueError:
            state = "damaged"
        # A failed trial that a sweep will try again is `waiting`.
        if state in (None, "waiting", "finished"):
            return state == "finished"
        over = clock() - left.setdefault(run, clock()) >= grace
        if over and run not in said:
            said.add(run)
            log.info("%s is %s, and no process has trained in it for %.0f s.", run, state, grace)
        return over

    while True:
        # Before looking: a checkpoint that comes between the two is found now.
        over = all([ended(run) for run in runs])
        new = [(run, step) for run in runs for step in rundir.checkpoint_steps(run) if (run, step) not in seen]
        for run, step in new:
            seen.add((run, step))
            yield run, step
        if over and not new:
            return
        if not new:
            wait()

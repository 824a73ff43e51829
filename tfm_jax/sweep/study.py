"""Trials that Optuna draws (extra: sweep). The study lies in a journal file in the sweep's folder, or in a database that many
machines share, each with a folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tfm_jax.data.locks import locked
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import write_atomic
from tfm_jax.sweep import terms, trials
from tfm_jax.sweep.space import Study, Trial, folder_name, spelled
from tfm_jax.sweep.trials import FINISHED, PRUNED, State
from tfm_jax.train.log import read_metrics

# User attributes of Optuna's trials: whose it is, of which failed one it is another try, and that it was drawn in vain.
FOLDER, AGAIN, SURPLUS = "folder", "second try of", "surplus"
# And of its study: what is studied.
STUDY = "study"


def record(wanted: Study) -> dict[str, Any]:
    """What `sweep.json` keeps of a study: all but the number of its trials, which may grow."""
    found = dataclasses.asdict(wanted)
    return {**found, "space": {key: repr(one) for key, one in wanted.space.items()}, "trials": None}


class _Away(UserError):
    """The database has gone away."""


class Drawn:
    """A study as a source of trials.

    What is drawn depends on the study's seed, the trial's number and the trials before it, so with one trial at a time not on
    how often launchers die. A trial is written to the storage whole, or not at all.

    Args:
      wanted: what to draw.
      folder: of the sweep; its name is the study's in its storage.
      storage: URL of a database; the journal file `FOLDER/study.log` if None.

    Attributes:
      lost: the database has gone away with trials still to come, and why. What runs goes on to its end.

    Raises:
      UserError: Optuna is not installed, the database cannot be reached, or its study of this name is another one; from
        `known` and `retry` too, that the database has gone away.
    """

    def __init__(self, wanted: Study, folder: Path, *, storage: str | None = None) -> None:
        self._optuna, self._wanted, self._folder, self._url = terms.optuna(), wanted, folder, storage
        self.lost: UserError | None = None
        # Launchers that share the folder draw one after the other; those elsewhere must not draw the same.
        self._own = trials.owner(folder) if storage else ""
        self._seed = wanted.seed * 1_000_003 + zlib.crc32(self._own.encode())
        self._limit, name = wanted.limit, folder.absolute().name
        with self._telling():
            self._study = self._create(name, terms.storage(self._optuna, folder, storage))
            if STUDY not in self._study.user_attrs:
                self._study.set_user_attr(STUDY, json.loads(json.dumps(record(wanted), default=repr)))
            trials.check_same(f"The study {name!r} of that storage", self._study.user_attrs[STUDY], record(wanted))

    def candidates(self) -> Sequence[Trial]:
        with self._patience():
            return [self._written(one) for one in self._mine(self._states.RUNNING)]
        return []

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Say which database has gone away."""
        try:
            yield
        except self._optuna.exceptions.StorageInternalError as error:
            assert self._url is not None
            said = terms.first_line(error.__cause__ or error, self._url)
            raise _Away(
                f"--storage={terms.shown(self._url)} has gone away: {said}. What ran has ended; the same command goes on."
            ) from None

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Ask a database that may come back another time: what it has not been told it is told then."""
        try:
            with self._telling():
                yield
        except _Away as lost:
            self.lost = lost

    def draw(self) -> Trial | None:
        with self._patience():
            found = self._draw()
            # It is asked before a command ends.
            self.lost = None
            return found
        return None

    def _draw(self) -> Trial | None:
        with locked(self._folder / ".locks" / "draw"):
            while len(self._counted()) < self._limit:
                one = self._added(self._all())
                if any(other.number == one.number for other in self._counted()):
                    return self._written(one)
                # Another machine has drawn at the same moment, and was first.
                self._optuna.trial.Trial(self._study, one._trial_id).set_user_attr(SURPLUS, True)
                self._study.tell(one.number, state=self._states.FAIL)
        return None

    def _counted(self) -> list[Any]:
        """The study's trials in their order: further tries are none of their own, nor what is more than asked for, or twice in a
        grid, because machines have drawn at once."""
        found, cells = list[Any](), set[Any]()
        for one in self._all():
            cell = repr(sorted(one.params.items())) if self._wanted.sampler == "grid" else one.number
            if not {AGAIN, SURPLUS} & set(one.user_attrs) and cell not in cells and len(found) < self._limit:
                found.append(one)
                cells.add(cell)
        return found

    def _added(self, before: Sequence[Any]) -> Any:
        """Draw in memory, from a copy of the study, and add the trial to the study in one piece."""
        copy = self._create("copy", self._optuna.storages.InMemoryStorage())
        copy.add_trials(before)
        copy.sampler = terms.sampler(self._optuna, self._wanted, self._seed + len(before))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asked = copy.ask({key: terms.distribution(self._optuna, one) for key, one in self._wanted.space.items()})
        drawn = copy.get_trials(deepcopy=False)[asked.number]
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=self._states.RUNNING,
                params=drawn.params,
                distributions=drawn.distributions,
                user_attrs={FOLDER: self._own},
                system_attrs=drawn.system_attrs,
            )
        )
        added = self._all()[len(before) :]
        return [one for one in added if one.user_attrs.get(FOLDER) == self._own][-1]

    def should_stop(self, trial: Trial) -> bool:
        with self._patience():
            return self._is_behind(trial)
        return False

    def _is_behind(self, trial: Trial) -> bool:
        run = self._folder / trial.name
        try:
            lines = read_metrics(run)
            found = trials.values(lines, self._wanted.metric)
        except (OSError, ValueError, TypeError):
            # A damaged file is found when the trial ends.
            return False
        self._check_metric(run, lines, found)
        one = self._frozen(trial)
        if one.state.is_finished():
            return False
        values = [found[step] for step in sorted(found)]
        stopped = _stopped_at(run, len(values))
        # Rungs are evaluations, of which all trials have the same. Each is judged by itself, however late it is looked at,
        # and judged again unless its value is stored, which comes last: a launcher may die before any of these lines.
        for count in range(1, len(values[:stopped]) + 1):
            if count in one.intermediate_values:
                continue
            behind, marks = self._verdict(one, values[:count])
            if behind and stopped is None:
                stopped = count
                write_atomic(run / PRUNED, f"its metric is behind the others' at evaluation {count}")
            for key, mark in marks.items():
                self._study._storage.set_trial_system_attr(one._trial_id, key, mark)
            self._optuna.trial.Trial(self._study, one._trial_id).report(values[count - 1], count)
            if count == stopped:
                break
        return stopped is not None

    def _verdict(self, one: Any, values: Sequence[float]) -> tuple[bool, dict[str, Any]]:
        """Whether a trial with these values so far is behind, and what its pruner notes of it, found on a copy of the study."""
        behind = False
        if self._wanted.pruner == "none":
            return behind, {}
        copy = self._create(self._study.study_name, self._optuna.storages.InMemoryStorage())
        everyone = self._all()
        # This one reports anew, and a try that has failed would compete with its own trial's next.
        last = {_number(other): other.number for other in everyone}
        kept = set(last.values()) - {one.number}
        copy.add_trials([other if other.number in kept else self._bare(other) for other in everyone])
        asked = self._optuna.trial.Trial(copy, copy.get_trials(deepcopy=False)[one.number]._trial_id)
        for count, value in enumerate(values, 1):
            asked.report(value, count)
            behind = asked.should_prune()
        return behind, copy.get_trials(deepcopy=False)[one.number].system_attrs

    def _bare(self, one: Any) -> Any:
        """The same without anything reported."""
        return self._optuna.trial.create_trial(
            state=self._states.RUNNING, params=one.params, distributions=one.distributions
        )

    def _check_metric(self, run: Path, lines: Sequence[dict[str, Any]], found: dict[int, float]) -> None:
        """Before a misspelled metric costs more than one evaluation, or one trial where it has nothing near."""
        metric, logged = self._wanted.metric, {key for line in lines for key in line} - {"step"}
        near = {key for key in logged if key.rpartition("/")[0] == metric.rpartition("/")[0]}
        if found or not (near or trials.said(run)[0] == FINISHED or self._is_of_no_kind(logged)):
            return
        if not any(one.intermediate_values for one in self._all()):
            raise UserError(f"sweep: no trial logs metric={metric!r}.{nearest(metric, near or logged)}")

    def _is_of_no_kind(self, logged: set[str]) -> bool:
        """Whether a run has evaluated, and logged nothing whose first part is the metric's."""
        kinds = {key.partition("/")[0] for key in logged}
        return "eval" in kinds and self._wanted.metric.partition("/")[0] not in kinds

    def ended(self, trial: Trial, state: State) -> None:
        with self._patience():
            self._tell(trial, state)

    def _tell(self, trial: Trial, state: State) -> None:
        # One that went on to its end before it could be stopped is behind all the same.
        behind = state.word in (FINISHED, PRUNED) and self._is_behind(trial)
        one = self._frozen(trial)
        outcome: dict[str, Any] = {"state": self._states.FAIL}
        if behind and one.intermediate_values:
            outcome = {"state": self._states.PRUNED}
        elif state.word == FINISHED:
            last = self._last(trial)
            if math.isfinite(last):
                outcome = {"state": self._states.COMPLETE, "values": [last]}
        if not one.state.is_finished():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._study.tell(one.number, **outcome)

    def known(self) -> list[Trial]:
        """All trials that have been drawn, here or elsewhere."""
        with self._telling():
            return [self._trial(one) for one in self._counted()]

    def best(self) -> tuple[Trial, float] | None:
        """The finished trial with the best last value; its pruner may have found only then that it was behind."""
        with self._patience():
            found = [(self._trial(one), one.value) for one in self._all() if one.state == self._states.COMPLETE]
            pruned = [self._trial(one) for one in self._mine(self._states.PRUNED)]
            late = [one for one in pruned if trials.state(self._folder / one.name).word == FINISHED]
            found += [(one, value) for one in late if math.isfinite(value := self._last(one))]
            sign = 1 if self._wanted.direction == "minimize" else -1
            return min(found, key=lambda pair: sign * pair[1], default=None)
        return None

    def _last(self, trial: Trial) -> float:
        """The last value that a trial of this folder has logged, NaN if none."""
        found = trials.values(read_metrics(self._folder / trial.name), self._wanted.metric)
        return found[max(found)] if found else math.nan

    @property
    def _states(self) -> Any:
        return self._optuna.trial.TrialState

    def _all(self) -> list[Any]:
        found: list[Any] = self._study.get_trials(deepcopy=False)
        return found

    def _tries(self) -> dict[int, Any]:
        """The last try of each trial, by the trial's number."""
        return {_number(one): one for one in self._all()}

    def _mine(self, state: Any) -> list[Any]:
        """The last tries of this folder's trials, those in a state."""
        counted = self._counted()
        # Read later, since others draw meanwhile: it has all of them.
        tries = self._tries()
        last = [tries[one.number] for one in counted if one.user_attrs.get(FOLDER) == self._own]
        return [one for one in last if one.state == state]

    def retry(self) -> None:
        """Let what has failed here be tried again, by whatever process takes it up: Optuna's trials do not come back from
        failing, so another one stands for the try. One that finished without its metric would do so again."""
        with self._telling(), locked(self._folder / ".locks" / "draw"):
            for one in self._mine(self._states.FAIL):
                run = self._folder / self._trial(one).name
                if trials.state(run).word in (FINISHED, PRUNED):
                    continue
                self._study.add_trial(
                    self._optuna.trial.create_trial(
                        state=self._states.RUNNING,
                        params=one.params,
                        distributions=one.distributions,
                        user_attrs={AGAIN: one.number, **one.user_attrs},
                    )
                )
                trials.forget_failure(self._folder, run.name)

    def _create(self, name: str, storage: Any) -> Any:
        return self._optuna.create_study(
            study_name=name,
            storage=storage,
            direction=self._wanted.direction,
            load_if_exists=True,
            pruner=terms.pruner(self._optuna, self._wanted),
        )

    def _trial(self, one: Any) -> Trial:
        chosen = {key: terms.chosen(self._wanted.space[key], one.params[key]) for key in self._wanted.space}
        return Trial(folder_name(f"{_number(one):04d},{spelled(chosen)}"), {**self._wanted.fixed, **chosen})

    def _written(self, one: Any) -> Trial:
        trial = self._trial(one)
        trials.write_trial(self._folder, trial, _number(one))
        return trial

    def _frozen(self, trial: Trial) -> Any:
        return self._tries()[int(trial.name.partition(",")[0])]


def _number(one: Any) -> int:
    """The trial's of which it is a try."""
    found: int = one.user_attrs.get(AGAIN, one.number)
    return found


def _stopped_at(run: Path, so_far: int) -> int | None:
    """The evaluation at which a trial was found to be behind, None if at none."""
    if not (run / PRUNED).is_file():
        return None
    number = (run / PRUNED).read_text(errors="replace").rpartition(" ")[2]
    return int(number) if number.isdecimal() else so_far

"""Trials that Optuna draws (extra: sweep). The study lies in a journal file in the sweep's folder, or in a database that many
machines share, each with a folder of its own."""

from __future__ import annotations

import dataclasses
import math
import socket
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfm_jax.data.locks import locked
from tfm_jax.errors import UserError, nearest
from tfm_jax.sweep import trials
from tfm_jax.sweep.space import Choice, Distribution, Study, Trial, text_of
from tfm_jax.sweep.trials import FAILED, FINISHED, PRUNED, State
from tfm_jax.train.log import read_metrics

# User attributes of Optuna's trials: whose it is, and of which failed one it is the second try.
FOLDER, AGAIN = "folder", "second try of"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("A study needs Optuna: pip install 'tfm_jax[sweep]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def record(wanted: Study) -> dict[str, Any]:
    """What `sweep.json` keeps of a study: all but the number of its trials, which may grow."""
    found = dataclasses.asdict(wanted)
    return {**found, "space": {key: repr(one) for key, one in wanted.space.items()}, "trials": None}


class Drawn:
    """A study as a source of trials.

    What is drawn depends on the study's seed, the trial's number and the trials before it, so with one trial at a time not on
    how often launchers die. A trial is written to the storage whole, or not at all.

    Args:
      wanted: what to draw.
      folder: of the sweep; its name is the study's in its storage.
      storage: URL of a database; the journal file `FOLDER/study.log` if None.
      retry: let what has failed be tried again.

    Raises:
      UserError: Optuna is not installed, or the database cannot be reached.
    """

    def __init__(self, wanted: Study, folder: Path, *, storage: str | None = None, retry: bool = False) -> None:
        self._optuna, self._wanted, self._folder, self._retry = _optuna(), wanted, folder, retry
        # Launchers that share the folder draw one after the other; those elsewhere must not draw the same.
        place = f"{socket.gethostname()}:{folder.absolute()}"
        self._seed = wanted.seed * 1_000_003 + (zlib.crc32(place.encode()) if storage else 0)
        self._own = place if storage else ""
        self._study = self._create(folder.absolute().name, _storage(self._optuna, folder, storage))
        self._limit = wanted.trials
        if wanted.sampler == "grid":
            sizes = [len(one.options) for one in wanted.space.values() if isinstance(one, Choice)]
            self._limit = min(self._limit, math.prod(sizes))
        if retry:
            for one in self._untried():
                trials.forget_failure(folder, self._trial(one).name)

    def candidates(self) -> Sequence[Trial]:
        found = self._mine(self._states.RUNNING)
        if self._retry:
            found += [one for one in self._untried() if not self._failed(one)]
        return [self._written(one) for one in found]

    def draw(self) -> Trial | None:
        with locked(self._folder / ".locks" / "draw"):
            before = self._all()
            # Those that failed and were tried again count once.
            if sum(AGAIN not in one.user_attrs for one in before) >= self._limit:
                return None
            return self._written(self._added(before))

    def _added(self, before: Sequence[Any]) -> Any:
        """Draw in memory, from a copy of the study, and add the trial to the study in one piece."""
        copy = self._create("copy", self._optuna.storages.InMemoryStorage())
        copy.add_trials(before)
        copy.sampler = _sampler(self._optuna, self._wanted, self._seed + len(before))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asked = copy.ask({key: _distribution(self._optuna, one) for key, one in self._wanted.space.items()})
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
        mine = [one for one in self._mine(self._states.RUNNING) if one.number >= len(before)]
        return mine[-1]

    def should_stop(self, trial: Trial) -> bool:
        try:
            lines = read_metrics(self._folder / trial.name)
            found = trials.values(lines, self._wanted.metric)
        except (OSError, ValueError, TypeError):
            # A damaged file is found when the trial ends.
            return False
        self._check_metric(lines, found)
        one = self._frozen(trial)
        if one.state.is_finished():
            return False
        asked = self._optuna.trial.Trial(self._study, one._trial_id)
        # Rungs are evaluations, of which all trials have the same. Each is judged by itself, however late it is looked at.
        for count, step in enumerate(sorted(found), 1):
            if count not in one.intermediate_values:
                asked.report(found[step], count)
                if asked.should_prune():
                    return True
        return False

    def _check_metric(self, lines: Sequence[dict[str, Any]], found: dict[int, float]) -> None:
        """Before a misspelled metric costs more than one evaluation."""
        metric = self._wanted.metric
        place = metric.rpartition("/")[0]
        known = sorted({key for line in lines for key in line if key.rpartition("/")[0] == place})
        if known and not found and not any(one.intermediate_values for one in self._all()):
            raise UserError(f"sweep: no trial logs metric={metric!r}.{nearest(metric, known)}")

    def ended(self, trial: Trial, state: State) -> None:
        # One that went on to its end before it could be stopped is behind all the same.
        behind = (self._folder / trial.name / PRUNED).is_file() or (state.word == FINISHED and self.should_stop(trial))
        one = self._frozen(trial)
        values = one.intermediate_values
        last = values[max(values)] if values else math.nan
        outcome: dict[str, Any] = {"state": self._states.FAIL}
        if behind and values:
            outcome = {"state": self._states.PRUNED}
        elif state.word == FINISHED:
            found = trials.values(read_metrics(self._folder / trial.name), self._wanted.metric)
            last = found[max(found)] if found else math.nan
            if math.isfinite(last):
                outcome = {"state": self._states.COMPLETE, "values": [last]}
        if one.state == self._states.FAIL:
            # Optuna's trials do not come back from failing. One that has now finished is through, with a metric or without.
            if state.word != FAILED and any(other.number == one.number for other in self._untried()):
                self._study.add_trial(
                    self._optuna.trial.create_trial(
                        **outcome,
                        params=one.params,
                        distributions=one.distributions,
                        user_attrs={**one.user_attrs, AGAIN: one.number},
                    )
                )
        elif not one.state.is_finished():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._study.tell(one.number, **outcome)

    def known(self) -> list[Trial]:
        """All trials that have been drawn, here or elsewhere."""
        return [self._trial(one) for one in self._all() if AGAIN not in one.user_attrs]

    def best(self) -> tuple[Trial, float] | None:
        """The finished trial with the best last value."""
        if not self._study.get_trials(deepcopy=False, states=(self._states.COMPLETE,)):
            return None
        return self._trial(self._study.best_trial), float(self._study.best_value)

    @property
    def _states(self) -> Any:
        return self._optuna.trial.TrialState

    def _all(self) -> list[Any]:
        found: list[Any] = self._study.get_trials(deepcopy=False)
        return found

    def _mine(self, state: Any) -> list[Any]:
        found = self._study.get_trials(deepcopy=False, states=(state,))
        return [one for one in found if one.user_attrs.get(FOLDER) == self._own and AGAIN not in one.user_attrs]

    def _untried(self) -> list[Any]:
        """Those that have failed, and not been tried a second time to an end."""
        tried = {one.user_attrs[AGAIN] for one in self._all() if AGAIN in one.user_attrs}
        return [one for one in self._mine(self._states.FAIL) if one.number not in tried]

    def _failed(self, one: Any) -> bool:
        return trials.said(self._folder / self._trial(one).name)[0] == FAILED

    def _create(self, name: str, storage: Any) -> Any:
        return self._optuna.create_study(
            study_name=name,
            storage=storage,
            direction=self._wanted.direction,
            load_if_exists=True,
            pruner=_pruner(self._optuna, self._wanted),
        )

    def _trial(self, one: Any) -> Trial:
        number = one.user_attrs.get(AGAIN, one.number)
        chosen = {key: _chosen(self._wanted.space[key], one.params[key]) for key in self._wanted.space}
        said = ",".join(f"{key.rpartition('.')[2]}={text_of(value)}" for key, value in chosen.items())
        return Trial(f"{number:04d},{said}", {**self._wanted.fixed, **chosen})

    def _written(self, one: Any) -> Trial:
        trial = self._trial(one)
        trials.write_trial(self._folder, trial, one.number)
        return trial

    def _frozen(self, trial: Trial) -> Any:
        number = int(trial.name.partition(",")[0])
        return next(one for one in self._all() if one.number == number)


def _plain(one: Choice) -> bool:
    """Whether a storage can keep the options themselves."""
    return all(isinstance(option, str | int | float | bool | None) for option in one.options)


def _distribution(optuna: Any, one: Distribution) -> Any:
    if isinstance(one, Choice):
        return optuna.distributions.CategoricalDistribution(one.options if _plain(one) else range(len(one.options)))
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def _chosen(one: Distribution, value: Any) -> Any:
    return one.options[int(value)] if isinstance(one, Choice) and not _plain(one) else value


def _storage(optuna: Any, folder: Path, url: str | None) -> Any:
    if url is None:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
        return optuna.storages.JournalStorage(backend)
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:
        # Each database's driver has errors of its own.
        raise UserError(
            f"--storage={url} cannot be opened: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None


def _sampler(optuna: Any, wanted: Study, seed: int) -> Any:
    if wanted.sampler == "grid":
        space = {
            key: list(one.options if _plain(one) else range(len(one.options)))
            for key, one in wanted.space.items()
            if isinstance(one, Choice)
        }
        # One order for all draws.
        return optuna.samplers.GridSampler(space, seed=wanted.seed)
    if wanted.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed)
    if wanted.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(optuna: Any, wanted: Study) -> Any:
    if wanted.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=wanted.first_rung, reduction_factor=wanted.reduction)
    if wanted.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=wanted.first_rung, reduction_factor=wanted.reduction)
    if wanted.pruner == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=wanted.first_rung)
    return optuna.pruners.NopPruner()

"""What a study is in Optuna's terms: its distributions, sampler, pruner and storage (extra: sweep)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tfm_jax.errors import UserError
from tfm_jax.sweep.space import Choice, Distribution, Study


def optuna() -> Any:
    """The package.

    Raises:
      UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("A study needs Optuna: pip install 'tfm_jax[sweep]'.") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return optuna


def _plain(one: Choice) -> bool:
    """Whether a storage can keep the options themselves."""
    return all(isinstance(option, str | int | float | bool | None) for option in one.options)


def distribution(optuna: Any, one: Distribution) -> Any:
    if isinstance(one, Choice):
        return optuna.distributions.CategoricalDistribution(one.options if _plain(one) else range(len(one.options)))
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(one.high), log=one.log)
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.log)


def chosen(one: Distribution, value: Any) -> Any:
    return one.options[int(value)] if isinstance(one, Choice) and not _plain(one) else value


def storage(optuna: Any, folder: Path, url: str | None) -> Any:
    if url is None:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
        return optuna.storages.JournalStorage(backend)
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:
        # Each database's driver has errors of its own.
        said = "".join(str(error).splitlines()[:1])
        raise UserError(f"--storage={url} cannot be opened: {type(error).__name__}: {said}") from None


def sampler(optuna: Any, wanted: Study, seed: int) -> Any:
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


def pruner(optuna: Any, wanted: Study) -> Any:
    if wanted.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=wanted.first_rung, reduction_factor=wanted.reduction)
    if wanted.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=wanted.first_rung, reduction_factor=wanted.reduction)
    if wanted.pruner == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=wanted.first_rung)
    return optuna.pruners.NopPruner()

"""What a study is in Optuna's terms: its distributions, sampler, pruner and storage (extra: sweep)."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

from tfm_jax.errors import UserError
from tfm_jax.sweep.space import Choice, Distribution, Study

# Until a database that could not be opened is tried once more.
AGAIN_S = 1.0


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
    """A study's journal in its folder, or its database.

    Raises:
      UserError: the journal is damaged, or the database cannot be opened.
    """
    if url is None:
        # Absolute: the lock is a link to this text, which from the lock's folder must lead to the file, or Optuna never finds that the
        # lock's owner has died.
        path = (folder / "study.log").absolute()
        lock = optuna.storages.journal.JournalFileSymlinkLock(str(path))
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
        lock.acquire()
        try:
            _mend(path)
        finally:
            lock.release()
        return optuna.storages.JournalStorage(backend)
    try:
        return _database(optuna, url)
    except UserError:
        # Of two that make a database's tables at once, one fails, and finds them made.
        time.sleep(AGAIN_S)
    return _database(optuna, url)


def _database(optuna: Any, url: str) -> Any:
    try:
        return optuna.storages.RDBStorage(url)
    except ImportError:
        raise UserError(
            f"--storage={shown(url)} needs the driver of its database: pip install psycopg2-binary for PostgreSQL, pymysql for MySQL."
        ) from None
    except Exception as error:
        # Each database's driver has errors of its own.
        raise UserError(f"--storage={shown(url)} cannot be opened: {first_line(error, url)}") from None


def _mend(journal: Path) -> None:
    """Cut off a last line that has no end, since a crash or a full disk has cut it: the next one would be lost with it.

    Raises:
      UserError: another line is damaged.
    """
    lines = journal.read_bytes().split(b"\n")
    if lines[-1]:
        with journal.open("r+b") as file:
            file.truncate(journal.stat().st_size - len(lines[-1]))
    for number, line in enumerate(lines[:-1], 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{journal}, line {number}, is damaged: {error}. Put a copy of the file back, or use another --workdir."
            ) from None


def shown(url: str) -> str:
    """A database's address without its password."""
    return re.sub(r"(://[^:/]*:)[^@]*@", r"\1***@", url)


def first_line(error: BaseException, url: str) -> str:
    """What a database's driver says, on one line; some say the address."""
    said = "".join(str(error).splitlines()[:1]).replace(url, shown(url))
    return f"{type(error).__name__}: {said}"


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

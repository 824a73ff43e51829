"""How much of the difference between runs each setting explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tfm_jax.errors import UserError
from tfm_jax.sweep.results import Run

# With fewer a forest has nothing to split.
LEAST = 4


def is_log(values: Sequence[Any]) -> bool:
    """Whether positive numbers are so far apart that their logarithms say more."""
    numbers: list[Any] = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) == len(values) > 0 and min(numbers) > 0 and max(numbers) / min(numbers) >= 8


def is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def importances(runs: Sequence[Run], keys: Sequence[str], metric: str) -> dict[str, float]:
    """The share of a metric's variance that each key explains alone, by functional ANOVA over a random forest (Hutter et al.
    2014), as Optuna has it; what only keys together explain is nobody's, so they add up to 1 at most. Numbers far apart count by
    their logarithms. Only runs that have finished count: others have their metric from an earlier step. Empty where fewer than
    `LEAST` have it, or it never changes.

    Raises:
      UserError: Optuna or scikit-learn is not installed.
    """
    found = [(run, value) for run in runs if run.config and run.finished and (value := run.value(metric)) is not None]
    found = [(run, value) for run, value in found if math.isfinite(value)]
    varying = [key for key in keys if len({repr(run.config.get(key)) for run, _ in found}) > 1]
    if len(found) < LEAST or len({value for _, value in found}) < 2 or not varying:
        return {}
    try:
        import optuna
        import sklearn  # noqa: F401 - Optuna imports it when it is too late to say what to install
    except ImportError as error:
        raise UserError(f"The importance of settings needs {error.name}: pip install 'tfm_jax[report]'.") from None
    # Optuna's forest takes numbers as they are, whatever their distribution says, so logarithms are taken here.
    columns: dict[str, list[Any]] = {}
    distributions: dict[str, Any] = {}
    for key in varying:
        values: list[Any] = [run.config.get(key) for run, _ in found]
        if is_numeric(values):
            columns[key] = [math.log(v) for v in values] if is_log(values) else [float(v) for v in values]
            distributions[key] = optuna.distributions.FloatDistribution(min(columns[key]), max(columns[key]))
        else:
            columns[key] = [repr(v) for v in values]
            distributions[key] = optuna.distributions.CategoricalDistribution(sorted(set(columns[key])))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for i, (_, value) in enumerate(found):
        params = {key: columns[key][i] for key in varying}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    shares = optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(study)
    return {key: float(share) for key, share in shares.items()}

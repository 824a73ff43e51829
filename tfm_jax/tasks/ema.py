"""An exponential moving average of the parameters, as a wrapper around any task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.tasks.base import Extra, Params, Task, extended


def with_ema(task: Task, decay: float) -> Task:
    """The task, with `extra["ema"]` following the parameters; evaluation and generation use the average.

    ema <- decay * ema + (1 - decay) * params after each update (Polyak and Juditsky 1992, exponential form).
    """
    if not 0 < decay < 1:
        raise UserError(f"train.ema={decay}: a decay in (0, 1), for instance 0.999; None for no average.")

    # A copy, so that donating the state does not donate one buffer twice.
    def copied(params: Params) -> Params:
        return jax.tree.map(jnp.copy, params)

    def followed(params: Params, average: Params, aux: Mapping[str, Any]) -> Params:
        return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)

    return dataclasses.replace(
        extended(task, "ema", init=copied, update=followed),
        eval_params=lambda params, extra: task.eval_params(averaged(task, extra), extra["inner"]),
    )


def averaged(task: Task, extra: Extra) -> Params:
    """The average in the place of the parameters of the task that is wrapped."""
    # An average of parameters of which some are held at zero is not zero there.
    return task.project(extra["ema"], extra["inner"])

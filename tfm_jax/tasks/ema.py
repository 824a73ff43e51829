"""An exponential moving average of the parameters, as a wrapper around any task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.tasks.base import Carry, Extra, Params, Task


def with_ema(task: Task, decay: float) -> Task:
    """The task, with `extra["ema"]` following the parameters; evaluation and generation use the average.

    ema <- decay * ema + (1 - decay) * params after each update (Polyak and Juditsky 1992, exponential form).
    """
    if not 0 < decay < 1:
        raise UserError(f"train.ema={decay}: a decay in (0, 1), for instance 0.999; None for no average.")

    def init_extra(params: Params) -> Extra:
        # A copy, so that donating the state does not donate one buffer twice.
        return {"inner": task.init_extra(params), "ema": jax.tree.map(jnp.copy, params)}

    def update_extra(params: Params, extra: Extra, aux: Mapping[str, Any]) -> Extra:
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, extra["ema"], params)
        return {"inner": task.update_extra(params, extra["inner"], aux), "ema": ema}

    def loss(apply: Any, params: Any, extra: Any, batch: Any, rng: Any, train: bool) -> Any:
        return task.loss(apply, params, extra["inner"], batch, rng, train)

    inner = task.carry
    carry = inner and Carry(
        forget=lambda extra: {**extra, "inner": inner.forget(extra["inner"])},
        begin=lambda extra, rows: {**extra, "inner": inner.begin(extra["inner"], rows)},
        after=lambda extra, aux: {**extra, "inner": inner.after(extra["inner"], aux)},
    )
    return dataclasses.replace(
        task,
        carry=carry,
        loss=loss,
        init_extra=init_extra,
        donors={f"inner/{path}": run for path, run in task.donors.items()},
        update_extra=update_extra,
        eval_params=lambda params, extra: task.eval_params(extra["ema"], extra["inner"]),
        predict_fns={
            name: lambda apply, params, extra, batch, f=f: f(apply, params, extra["inner"], batch)
            for name, f in task.predict_fns.items()
        },
    )

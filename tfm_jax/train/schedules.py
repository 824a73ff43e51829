"""Learning rate as a function of the step, by name. Every schedule starts with a linear warm-up."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax

from tfm_jax.errors import UserError

Name = Literal["constant", "cosine", "linear", "rsqrt", "wsd"]


def make(
    *, schedule: Name, lr: float, steps: int, warmup_steps: int, end_factor: float, decay_fraction: float
) -> optax.Schedule:
    """The schedule; after `steps` it stays at its last value.

    `constant` holds lr; `cosine` (Loshchilov and Hutter 2017) and `linear` fall to `lr * end_factor` at `steps`;
    `rsqrt` is lr * sqrt(warmup / step) (Vaswani et al. 2017, equation 3, with lr its peak); `wsd` holds lr and falls
    linearly over the last `decay_fraction` of the steps (Hu et al. 2024, MiniCPM, section 4).
    """
    if lr <= 0:
        raise UserError(f"optim.lr={lr}: must be above 0.")
    if steps < 1:
        raise UserError(f"train.steps={steps}: must be at least 1.")
    if not 0 <= warmup_steps < steps and not (schedule in ("constant", "rsqrt") and warmup_steps == steps):
        raise UserError(
            f"optim.warmup_steps={warmup_steps}: must be at least 0 and below train.steps={steps}."
            f" Usual: optim.warmup_steps={steps // 10}."
        )
    if not 0 <= end_factor <= 1:
        raise UserError(f"optim.end_factor={end_factor}: a fraction of the peak in [0, 1].")
    if not 0 < decay_fraction <= 1:
        raise UserError(f"optim.decay_fraction={decay_fraction}: a fraction of the steps in (0, 1].")
    after = steps - warmup_steps
    if schedule == "constant":
        main = optax.constant_schedule(lr)
    elif schedule == "cosine":
        main = optax.cosine_decay_schedule(lr, after, alpha=end_factor)
    elif schedule == "linear":
        main = optax.linear_schedule(lr, lr * end_factor, after)
    elif schedule == "rsqrt":
        knee = max(warmup_steps, 1)
        # join_schedules also evaluates it before the warm-up is over, at negative steps.
        main = lambda step: lr * (knee / (jnp.maximum(step, 0) + knee)) ** 0.5  # noqa: E731
    else:
        fall = max(1, round(decay_fraction * steps))
        if fall > after:
            raise UserError(
                f"optim.decay_fraction={decay_fraction} of train.steps={steps} is {fall} steps, but after"
                f" optim.warmup_steps={warmup_steps} only {after} are left."
            )
        main = optax.join_schedules(
            [optax.constant_schedule(lr), optax.linear_schedule(lr, lr * end_factor, fall)], [after - fall]
        )
    if not warmup_steps:
        return main
    # The first update is not a no-op: step 0 gets lr / warmup_steps.
    ramp = lambda step: lr * (step + 1) / warmup_steps  # noqa: E731
    return optax.join_schedules([ramp, main], [warmup_steps])

"""Learning rates against their formulas, written out step by step."""

import math
import re

import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.train import schedules

STEPS, LR = 50, 0.02
BASE = dict(schedule="cosine", lr=LR, steps=STEPS, warmup_steps=10, end_factor=0.1, decay_fraction=0.2)


def expected(schedule, step, warmup, end, fraction):
    if step < warmup:
        return LR * (step + 1) / warmup
    done = min(step - warmup, STEPS - warmup) / (STEPS - warmup)
    if schedule == "constant":
        return LR
    if schedule == "cosine":
        return LR * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule == "linear":
        return LR * (1 - (1 - end) * done)
    if schedule == "rsqrt":
        # Vaswani et al.: proportional to step^-1/2 after the warm-up, with the peak at its end.
        return LR * math.sqrt(max(warmup, 1) / (step - warmup + max(warmup, 1)))
    fall = round(fraction * STEPS)
    return LR * (1 - (1 - end) * min(max(step - (STEPS - fall), 0) / fall, 1))


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "rsqrt", "wsd"])
def test_formulas(schedule, warmup):
    rate = schedules.make(**BASE | dict(schedule=schedule, warmup_steps=warmup))
    steps = range(STEPS + 10)
    want = [expected(schedule, step, warmup, 0.1, 0.2) for step in steps]
    np.testing.assert_allclose([float(rate(step)) for step in steps], want, rtol=1e-5)


def test_end_factor_and_decay_fraction():
    rate = schedules.make(**BASE | dict(schedule="wsd", end_factor=0.0, decay_fraction=0.5))
    assert float(rate(24)) == pytest.approx(LR)
    assert float(rate(25)) == pytest.approx(LR) and float(rate(26)) == pytest.approx(LR * 24 / 25)
    assert float(rate(50)) == pytest.approx(0)
    assert float(schedules.make(**BASE | dict(end_factor=1.0))(40)) == pytest.approx(LR)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=0.0), "optim.lr=0.0: must be above 0."),
        (dict(steps=0), "train.steps=0: must be at least 1."),
        (
            dict(warmup_steps=-1),
            "optim.warmup_steps=-1: must be at least 0 and below train.steps=50. Usual: optim.warmup_steps=5.",
        ),
        (
            dict(warmup_steps=50),
            "optim.warmup_steps=50: must be at least 0 and below train.steps=50. Usual: optim.warmup_steps=5.",
        ),
        (dict(end_factor=1.5), "optim.end_factor=1.5: a fraction of the peak in [0, 1]."),
        (dict(decay_fraction=0.0), "optim.decay_fraction=0.0: a fraction of the steps in (0, 1]."),
        (
            dict(schedule="wsd", decay_fraction=0.9),
            "optim.decay_fraction=0.9 of train.steps=50 is 45 steps, but after optim.warmup_steps=10 only 40 are left.",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        schedules.make(**BASE | changes)


def test_a_constant_rate_may_warm_up_to_the_end():
    assert float(schedules.make(**BASE | dict(schedule="constant", warmup_steps=STEPS))(STEPS - 1)) == pytest.approx(LR)

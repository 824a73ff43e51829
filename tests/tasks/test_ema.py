"""The average as a wrapper: it nests, and the inner task sees only its own."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.tasks.base import LossOut, Task
from tfm_jax.tasks.ema import with_ema


def counting():
    """A task whose `extra` counts updates and whose loss and predictions read it."""

    def loss(apply, params, extra, batch, rng, train):
        return LossOut(params["x"] * extra["n"], jnp.float32(1), {}, {})

    return Task(
        loss=loss,
        init_extra=lambda params: {"n": jnp.float32(1)},
        update_extra=lambda params, extra, aux: {"n": extra["n"] + aux["add"]},
        splittable=False,
        predict_fns={
            "n": lambda apply, params, extra, batch: extra["n"],
            "x": lambda apply, params, extra, b: params["x"],
        },
    )


def test_the_recurrence_and_the_inner_task():
    task = with_ema(counting(), 0.9)
    extra = task.init_extra({"x": jnp.float32(2)})
    assert task.init_extra({"x": jnp.float32(2)})["ema"]["x"] == 2
    want = 2.0
    for x in (3.0, -1.0, 5.0):
        extra = task.update_extra({"x": jnp.float32(x)}, extra, {"add": 10})
        want = 0.9 * want + 0.1 * x
    assert float(task.eval_params({"x": jnp.float32(5)}, extra)["x"]) == pytest.approx(want, rel=1e-6)
    assert float(extra["inner"]["n"]) == 31
    assert float(task.loss(None, {"x": jnp.float32(2)}, extra, None, None, True).total) == 62
    assert float(task.predict_fns["n"](None, {}, extra, None)) == 31
    assert task.predict_fns["x"](None, {"x": 7}, extra, None) == 7
    assert task.splittable is False


def test_the_first_average_is_a_copy():
    params = {"x": jnp.arange(3.0)}
    ema = with_ema(counting(), 0.9).init_extra(params)["ema"]["x"]
    assert ema.unsafe_buffer_pointer() != params["x"].unsafe_buffer_pointer()
    np.testing.assert_array_equal(ema, params["x"])


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0])
def test_errors(decay):
    message = f"train.ema={decay}: a decay in (0, 1), for instance 0.999; None for no average."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        with_ema(counting(), decay)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.tasks import regression

LOGITS = np.array([[0.2], [0.9], [np.inf]], np.float32)
BATCH = {
    "inputs": {},
    "targets": np.array([2.0, 4.0, 1.0], np.float32),
    "weights": np.array([1.0, 0.5, 0.0], np.float32),
}


def apply(logits):
    return lambda params, /, *, train, rngs=None: {"logits": jnp.asarray(logits)}


def test_squared_error_over_the_scale():
    task = regression.make(scale=5.0)
    out = jax.jit(lambda: task.loss(apply(LOGITS), {}, {}, BATCH, None, True))()
    assert float(out.total) == pytest.approx((0.2 - 0.4) ** 2 + 0.5 * (0.9 - 0.8) ** 2, rel=1e-5)
    assert float(out.weight) == 1.5
    total, weight = out.metrics["absolute_error"]
    assert float(total) / float(weight) == pytest.approx((5 * 0.2 + 0.5 * 5 * 0.1) / 1.5, rel=1e-5)
    made = task.predict_fns["predict"](apply(LOGITS[:2]), {}, {}, BATCH)["prediction"]
    np.testing.assert_allclose(made, [1.0, 4.5], rtol=1e-6)


def test_bad_input():
    with says("task.scale=0: must be above 0."):
        regression.make(scale=0)
    with says("This model's logits are (3, 2), a number for each example wants (B, 1): data.kind='number' has it."):
        regression.make().loss(apply(np.zeros((3, 2), np.float32)), {}, {}, BATCH, None, True)

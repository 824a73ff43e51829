"""Classification against numpy: sums, weights, smoothing only in training, and how often the target is near the top."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.evals import loss as loss_evaluator
from tfm_jax.evals.base import Context
from tfm_jax.tasks import classification

B, C = 6, 8
DRAW = np.random.default_rng(1)
LOGITS = DRAW.normal(0, 2, (B, C))
TARGETS = DRAW.integers(0, C, B)
LOGITS[[0, 3], TARGETS[[0, 3]]] += 5
WEIGHTS = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
BATCH = {
    "inputs": {"x": jnp.zeros(B)},
    "targets": jnp.asarray(TARGETS, jnp.int32),
    "weights": jnp.asarray(WEIGHTS, jnp.float32),
}


def model(logits):
    return lambda params, /, x, *, train, rngs=None: {"logits": jnp.asarray(logits, jnp.float32)}


def run(task, logits=LOGITS, train=True):
    return jax.jit(lambda: task.loss(model(logits), {}, {}, BATCH, None, train))()


def want(smoothing):
    total = 0.0
    for row, target, weight in zip(LOGITS, TARGETS, WEIGHTS, strict=True):
        p = np.full(C, smoothing / C)
        p[target] += 1 - smoothing
        total -= weight * np.sum(p * (row - np.log(np.sum(np.exp(row)))))
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_a_weighted_sum(smoothing):
    task = classification.make(label_smoothing=smoothing)
    out = run(task)
    assert float(out.total) == pytest.approx(want(smoothing), rel=1e-5) and float(out.weight) == 5.5
    assert float(run(task, train=False).total) == pytest.approx(want(0.0), rel=1e-5)


def test_accuracies():
    metrics = run(classification.make()).metrics
    place = np.array([np.sum(row > row[target]) for row, target in zip(LOGITS, TARGETS, strict=True)])
    for name, k in (("accuracy", 1), ("top5", 5)):
        total, count = metrics[name]
        assert float(total) == pytest.approx(np.sum(WEIGHTS * (place < k))) and float(count) == 5.5
    assert 0 < float(metrics["accuracy"][0]) < float(metrics["top5"][0]) < 5.5
    few = jax.jit(
        lambda: classification.make().loss(
            model(LOGITS[:, :5]), {}, {}, BATCH | {"targets": BATCH["targets"] % 5}, None, True
        )
    )()
    assert set(few.metrics) == {"loss", "accuracy"}


def test_a_padded_row_may_hold_anything():
    broken = LOGITS.copy()
    broken[2] = np.nan
    out = run(classification.make(), broken)
    assert float(out.total) == pytest.approx(want(0.0), rel=1e-5)
    assert np.isfinite(float(out.metrics["accuracy"][0]))


def test_predict_fns():
    made = classification.make().predict_fns["predict"](model(LOGITS), {}, {}, BATCH)
    np.testing.assert_allclose(made["prediction"], LOGITS, rtol=1e-6)


def test_evaluation_speaks_of_examples(make_digits):
    """The evaluator, over digits, against a loop over the images of the split."""
    built = make_digits()
    with jax.set_mesh(built.layout.mesh):
        state = built.fresh_state()
        context = Context(built.task, built.model, built.layout, built.data, 16)
        found = loss_evaluator.make(context, batch_size=48)(state)
    assert set(found) == {"loss", "accuracy", "top5", "examples"}
    pictures = built.data.evals("validation", 1)
    size = pictures.num_batches
    images = np.concatenate([pictures.batch_at(i)["inputs"]["images"] for i in range(size)])
    targets = np.concatenate([pictures.batch_at(i)["targets"] for i in range(size)])
    params = jax.device_get(state.params)
    apply = jax.jit(lambda images: built.model.apply({"params": params}, images)["logits"])
    logits = np.asarray(apply(images), np.float64)
    losses = np.log(np.sum(np.exp(logits), -1)) - logits[np.arange(size), targets]
    assert found["examples"] == size == built.data.facts["validation"]["examples"]
    assert found["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(np.mean(np.argmax(logits, -1) == targets)), abs=1e-6)


@pytest.fixture
def make_digits():
    pytest.importorskip("sklearn")
    from tfm_jax import config as configs
    from tfm_jax.train.build import build

    def make(**model):
        sizes = dict(image_size=8, patch=4, channels=1, layers=1, width=16, heads=2)
        config = {
            "model": {"name": "vit", **sizes, **model},
            "task": {"name": "classification"},
            "data": {"name": "images", "source": "digits", "batch_size": 16},
            "optim": {"warmup_steps": 0},
            "train": {"steps": 4},
        }
        return build(configs.resolve(config))

    return make


def test_the_classes_are_filled_in_from_the_data(make_digits):
    assert make_digits().config["model"]["classes"] == 10 == make_digits().model.classes
    assert make_digits(classes=12).model.classes == 12
    message = "model.classes=9 is too small: the data has 10. Set at least 10, or leave it out."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make_digits(classes=9)


def test_errors():
    with pytest.raises(UserError, match=r"^task.label_smoothing=1.0: a weight in \[0, 1\).$"):
        classification.make(label_smoothing=1.0)


def test_targets_of_another_kind_are_refused():
    batch = {**BATCH, "targets": np.zeros((len(LOGITS), 3), np.int32)}
    with pytest.raises(UserError, match=r"^task\.name=classification wants one class a row; this data's targets are "):
        classification.make().loss(model(LOGITS), {}, {}, batch, None, True)


def test_numbers_are_no_classes():
    with pytest.raises(UserError, match="wants classes, and this data's targets are numbers: try regression"):
        batch = {**BATCH, "targets": jnp.asarray(TARGETS, jnp.float32)}
        classification.make().loss(model(LOGITS), {}, {}, batch, None, True)
    with pytest.raises(UserError, match="This model gives no class: it returns states"):
        classification.make().loss(lambda *_, **__: {"states": 0}, {}, {}, BATCH, None, True)

"""One update: exact under accumulation, deterministic, and harmless when something is not finite."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm_jax.errors import UserError
from tfm_jax.models.gpt import Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.base import LossOut, Task, bind
from tfm_jax.tasks.ema import with_ema
from tfm_jax.train.state import initialiser
from tfm_jax.train.step import make_train_step

B, T, V = 8, 6, 11
TX = optax.sgd(0.1)


def batch(seed=0):
    """Rows of very different weight, some of none."""
    draw = np.random.default_rng(seed)
    weights = (np.arange(T)[None] < np.array([6, 1, 0, 3, 6, 2, 0, 5])[:, None]).astype(np.float32)
    weights[3] *= 0.25
    return {
        "inputs": {"tokens": draw.integers(0, V, (B, T)).astype(np.int32)},
        "targets": draw.integers(0, V, (B, T)).astype(np.int32),
        "weights": weights,
    }


def gpt(**more):
    return Model(BlockSpec(width=16, heads=2, **more), vocab_size=V, max_len=T, layers=1)


def start(model, task, tx=TX):
    return jax.jit(initialiser(model, task, tx, batch()["inputs"], seed=3))()


def assert_equal(a, b, **tolerance):
    assert flatten(a).keys() == flatten(b).keys()
    for path, want in flatten(b).items():
        if tolerance:
            np.testing.assert_allclose(flatten(a)[path], want, err_msg=path, **tolerance)
        else:
            np.testing.assert_array_equal(flatten(a)[path], want, err_msg=path)


@pytest.fixture(scope="module")
def plain():
    """Model, task, initial state, and the step without accumulation, compiled."""
    model, task = gpt(), token_prediction.make()
    return model, task, start(model, task), jax.jit(make_train_step(task, model, TX))


def test_the_update_is_the_gradient_of_the_mean_loss(plain):
    model, _, state, step = plain
    data = batch()

    def mean(params):
        logits = model.apply({"params": params}, data["inputs"]["tokens"])["logits"]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), data["targets"][..., None], -1)[..., 0]
        return jnp.sum(nll * data["weights"]) / np.sum(data["weights"])

    value, grads = jax.jit(jax.value_and_grad(mean))(state.params)
    new, metrics = step(state, data)
    assert_equal(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads), rtol=1e-5, atol=1e-7)
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(float(value), rel=1e-6)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["weight"][0]) == float(np.sum(data["weights"]))
    assert (int(new.step), float(metrics["skipped"][0])) == (1, 0.0)


@pytest.mark.parametrize("accum", [2, 8])
def test_accumulation_is_the_big_batch(plain, accum):
    model, task, state, step = plain
    whole, whole_metrics = step(state, batch())
    parts, parts_metrics = jax.jit(make_train_step(task, model, TX, accum=accum))(state, batch())
    assert_equal(parts.params, whole.params, rtol=1e-6, atol=1e-6)
    assert not np.allclose(
        parts.params["stack"]["final_norm"]["scale"], state.params["stack"]["final_norm"]["scale"], atol=1e-5
    )
    assert_equal(parts_metrics, whole_metrics, rtol=1e-5, atol=1e-6)


def test_a_batch_of_weight_0_changes_nothing(plain):
    _, _, state, step = plain
    new, metrics = step(state, batch() | {"weights": np.zeros((B, T), np.float32)})
    assert_equal(new.params, state.params)
    assert float(metrics["skipped"][0]) == 0 and float(metrics["loss"][1]) == 0


def test_a_step_that_is_not_finite_changes_only_the_count():
    model = gpt()
    inner = token_prediction.make()

    def loss(apply, params, extra, data, rng, train):
        out = inner.loss(apply, params, extra, data, rng, train)
        # Not finite in the loss alone, in the gradient alone, or in neither.
        x = params["stack"]["final_norm"]["scale"][0]
        root = jnp.sqrt(jnp.where(data["bad"][0] == 2, x - jax.lax.stop_gradient(x), 1.0))
        gradient_only = root - jax.lax.stop_gradient(root)
        loss_only = jnp.where(data["bad"][0] == 1, jnp.inf, 0.0)
        return out._replace(total=out.total + gradient_only + jax.lax.stop_gradient(loss_only))

    task = with_ema(dataclasses.replace(inner, loss=loss), 0.5)
    tx = optax.adam(0.1)
    step = jax.jit(make_train_step(task, model, tx))

    def mark(kind):
        return batch() | {"bad": np.full(B, kind, np.int32)}

    clean, _ = step(start(model, task, tx), mark(0))
    for kind in (1, 2):
        skipped, metrics = step(clean, mark(kind))
        assert int(skipped.step) == int(clean.step) + 1
        assert_equal(skipped._replace(step=clean.step), clean)
        assert {name: float(total) for name, (total, _) in metrics.items()} == {
            "loss": 0.0, "accuracy": 0.0, "grad_norm": 0.0, "skipped": 1.0, "weight": float(np.sum(batch()["weights"])),
        }  # fmt: skip
        assert float(metrics["loss"][1]) == float(metrics["grad_norm"][1]) == 0.0
        recovered, metrics = step(skipped, mark(0))
        want, _ = step(clean, mark(0))
        assert_equal(recovered._replace(step=want.step), want)
        assert float(metrics["skipped"][0]) == 0.0


def test_dropout_is_a_function_of_seed_and_step():
    model, task = gpt(dropout=0.5), token_prediction.make()
    state = start(model, task)
    first, other = (jax.jit(make_train_step(task, model, TX, seed=seed)) for seed in (1, 2))
    path = "stack/final_norm/scale"

    def moved(step, at):
        return np.asarray(flatten(step(state._replace(step=jnp.int32(at)), batch())[0].params)[path])

    np.testing.assert_array_equal(moved(first, 5), moved(first, 5))
    assert not np.allclose(moved(first, 5), moved(first, 6), atol=1e-6)
    assert not np.allclose(moved(first, 5), moved(other, 5), atol=1e-6)


def test_microbatches_draw_different_dropout():
    model, task = gpt(), token_prediction.make()
    state = start(model, task)

    def loss(apply, params, extra, data, rng, train):
        out = task.loss(apply, params, extra, data, rng, train)
        return out._replace(metrics=out.metrics | {"draw": (jax.random.uniform(rng), jnp.float32(1)), "square": (
            jax.random.uniform(rng) ** 2, jnp.float32(1))})  # fmt: skip

    step = make_train_step(dataclasses.replace(task, loss=loss), model, TX, accum=2)
    _, metrics = jax.jit(step)(state, batch())
    mean, square = float(metrics["draw"][0]) / 2, float(metrics["square"][0]) / 2
    assert square - mean**2 > 1e-4


def test_a_task_that_couples_rows_refuses_accumulation():
    task = dataclasses.replace(token_prediction.make(), splittable=False)
    message = "train.accum=2: this task's loss couples the rows of a batch; microbatches would change it. Use 1."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make_train_step(task, gpt(), TX, accum=2)
    make_train_step(task, gpt(), TX, accum=1)


def test_rows_that_do_not_divide(plain):
    model, task, state, _ = plain
    with pytest.raises(UserError) as found:
        jax.eval_shape(make_train_step(task, model, TX, accum=3), state, batch())
    assert str(found.value) == "train.accum=3 does not divide data.batch_size=8."


class Normed(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, train=False):
        x = nn.Embed(V, 4)(tokens)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return {"logits": nn.Dense(V)(x)}


@pytest.mark.parametrize("accum", [1, 2])
def test_batch_statistics_go_through_the_step(accum):
    model, task = Normed(), token_prediction.make()
    state, data = start(model, task), batch()
    new, _ = jax.jit(make_train_step(task, model, TX, accum=accum))(state, data)
    mean = np.zeros(4)
    for i in range(accum):  # microbatches are strided, one after another
        x = np.asarray(state.params["Embed_0"]["embedding"])[data["inputs"]["tokens"][i::accum]]
        mean = 0.9 * mean + 0.1 * x.mean((0, 1))
    np.testing.assert_allclose(new.mutables["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-4, atol=1e-6)
    # Evaluation reads them and does not change them.
    out = task.loss(bind(model, new.mutables), new.params, {}, data, None, False)
    assert np.isfinite(out.total) and "mutables" not in out.aux


def test_an_average_follows_the_parameters():
    model, inner = gpt(), token_prediction.make()
    task = with_ema(inner, 0.8)
    state = start(model, task)
    step = jax.jit(make_train_step(task, model, TX))
    want = {path: np.asarray(x, np.float64) for path, x in flatten(state.params).items()}
    for seed in range(4):
        state, _ = step(state, batch(seed))
        for path, x in flatten(state.params).items():
            want[path] = 0.8 * want[path] + 0.2 * np.asarray(x, np.float64)
    assert_equal(task.eval_params(state.params, state.extra), {p: w for p, w in want.items()}, rtol=1e-5, atol=1e-7)


def test_metrics_and_update_extra_see_the_loss_output():
    """`extra` is updated once an update, with the new parameters and the loss's aux."""

    def loss(apply, params, extra, data, rng, train):
        out = apply(params, **data["inputs"], train=train)["logits"]
        return LossOut(
            jnp.sum(out**2), jnp.float32(2), {"mine": (jnp.float32(3), jnp.float32(4))}, {"seen": jnp.float32(5)}
        )

    task = Task(
        loss=loss,
        init_extra=lambda params: {"sum": jnp.float32(0), "first": jnp.zeros(())},
        update_extra=lambda params, extra, aux: {
            "sum": extra["sum"] + aux["seen"],
            "first": params["token_embedding"]["embedding"][0, 0],
        },
    )
    model = gpt()
    state = start(model, task)
    step = jax.jit(make_train_step(task, model, TX))
    for _ in range(2):
        state, metrics = step(state, batch())
    assert float(state.extra["sum"]) == 10
    assert float(state.extra["first"]) == float(state.params["token_embedding"]["embedding"][0, 0])
    assert [float(x) for x in metrics["mine"]] == [3, 4]

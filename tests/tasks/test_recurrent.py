"""The memory in the loop: it flows through training, through checkpoints, and from batch to batch of an evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.evals import loss
from tfm_jax.evals.base import Context
from tfm_jax.parallel.sharding import BATCH_AXES
from tfm_jax.paths import flatten
from tfm_jax.tasks import recurrent
from tfm_jax.tasks.base import LossOut
from tfm_jax.train.build import build
from tfm_jax.train.log import read_metrics
from tfm_jax.train.restore import restore_for_evaluation
from tfm_jax.train.run import train

ROWS, T, M = 8, 8, 12


@pytest.fixture(scope="module")
def config(corpus):
    """`config({"train.ema": 0.9})`: a tiny run on 8 devices with dotted keys changed."""
    raw = {
        "model": {"name": "transformer_xl", "layers": 2, "width": 16, "heads": 2, "mem_len": M, "init_std": 0.3},
        "task": {"name": "recurrent"},
        "data": {"name": "segments", "source": f"text:{corpus}/*.txt", "tokenizer": "bytes", "seq_len": T, "batch_size": ROWS},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "train": {"steps": 4},
        "checkpoint": {"every": 2},
        "evals": {"validation": {"split": "validation"}},
        "log": {"every": 1, "tensorboard": False},
        "mesh": {"fsdp": 2, "tensor": 2},
    }  # fmt: skip
    return lambda changes=(): configs.resolve(raw, [(key, str(value)) for key, value in dict(changes).items()])


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert train(config(), run).status == "finished"
    return run


@functools.cache
def applied(model):
    return jax.jit(lambda params, **inputs: model.apply({"params": params}, **inputs))


def by_hand(model, params, dataset, memory):
    """Summed loss and weight of each batch, and the memory behind them; one device, one batch after another."""
    sums = []
    for step in range(dataset.num_batches or 4):
        batch = dataset.batch_at(step)
        out = applied(model)(params, **batch["inputs"], memory=memory)
        memory = out["memory"]
        nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(out["logits"])), batch["targets"][..., None], -1)[
            ..., 0
        ]
        sums.append((np.sum(nll * batch["weights"]), np.sum(batch["weights"])))
    return np.array(sums, np.float64), memory


def test_the_memory_is_what_the_model_returned(config):
    """Three steps with next to no learning rate, so that the parameters stay those of the slow loop."""
    built = build(config({"optim.lr": 1e-12}))
    with jax.set_mesh(built.layout.mesh):
        state, step = built.fresh_state(), built.jitted_step()
        params = jax.device_get(state.params)
        totals, memory = [], None
        for i in range(3):
            state, metrics = step(state, built.batch(i))
            totals.append([float(x) for x in metrics["loss"]])
        split = {path: x.sharding.spec[0] for path, x in flatten(state.extra).items()}
    assert split == {"memory/states": BATCH_AXES, "memory/valid": BATCH_AXES}

    class Three:
        num_batches, batch_at = 3, built.data.train.batch_at

    want, memory = by_hand(built.model, params, Three, None)
    np.testing.assert_allclose(totals, want, rtol=1e-5)
    got = jax.device_get(state.extra["memory"])
    np.testing.assert_allclose(got.states, memory.states, atol=1e-4)
    assert got.valid.shape == (ROWS, M) and got.valid.all()


def test_going_on_is_the_same_as_never_stopping(config, finished, tmp_path, monkeypatch):
    from tfm_jax.train import run as module

    def crash(self, step):
        if step == 3:
            self.checkpoints.wait()
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_told_to_stop", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path / "run")
    assert train(config(), tmp_path / "run").status == "finished"
    lines = [
        [(r["step"], r.get("train/loss"), r.get("eval/validation/loss")) for r in read_metrics(run)]
        for run in (finished, tmp_path / "run")
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(("ema", "rows"), [(None, 8), (0.5, 16)])
def test_evaluation_remembers_its_own_batches_only(config, ema, rows):
    built = build(config({"train.ema": ema}))
    with jax.set_mesh(built.layout.mesh):
        state, step = built.fresh_state(), built.jitted_step()
        for i in range(2):
            state, _ = step(state, built.batch(i))
        context = Context(built.task, built.model, built.layout, built.data, ROWS)
        found = loss.make(context, batch_size=rows)(state)
        again = loss.make(context, batch_size=rows)(state)
        few = loss.make(context, batch_size=rows, max_batches=2)(state)
    assert found == again and context._steps["loss"]._cache_size() <= 4
    params = jax.device_get(state.params if ema is None else state.extra["ema"])
    dataset = built.data.evals("validation", rows)
    assert dataset.num_batches > 3
    sums, _ = by_hand(built.model, params, dataset, None)
    assert found["tokens"] == sums[:, 1].sum() == built.data.facts["validation"]["tokens"] - 1
    assert found["loss"] == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-5)
    # Spread over the pass, they would begin with another batch's memory.
    assert few["loss"] == pytest.approx(sums[:2, 0].sum() / sums[:2, 1].sum(), rel=1e-5)
    alone = [by_hand(built.model, params, _One(dataset, i), None)[0][0] for i in range(dataset.num_batches)]
    assert abs(found["loss"] - np.sum(alone, axis=0)[0] / sums[:, 1].sum()) > 1e-3


class _One:
    """A single batch of a data set."""

    num_batches = 1

    def __init__(self, dataset, step):
        self.batch_at = lambda _: dataset.batch_at(step)


def test_a_run_is_evaluated_with_other_rows_and_another_memory(config, finished):
    """As the paper does: a longer memory than in training."""
    built = build(config({"model.mem_len": 3 * M, "data.batch_size": 16}))
    with jax.set_mesh(built.layout.mesh):
        state, step = restore_for_evaluation(built, finished)
        found = built.evaluators()["validation"](state)
    assert step == 4
    sums, _ = by_hand(built.model, jax.device_get(state.params), built.data.evals("validation", 16), None)
    assert found["loss"] == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), rel=1e-5)


def test_another_run_starts_from_this_one_with_an_empty_memory(config, finished, tmp_path):
    train(config({"checkpoint.init_from": str(finished), "train.steps": 1, "train.ema": 0.5}), tmp_path / "run")
    built = build(config())
    with jax.set_mesh(built.layout.mesh):
        state, _ = restore_for_evaluation(built, finished)

    class First:
        num_batches, batch_at = 1, built.data.train.batch_at

    sums, _ = by_hand(built.model, jax.device_get(state.params), First, None)
    (line,) = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    assert line["train/loss"] == pytest.approx(sums[0, 0] / sums[0, 1], rel=1e-5)


def test_without_a_memory_nothing_is_carried(config):
    task = build(config({"model.mem_len": 0})).task
    assert task.init_extra({}) == task.carry.begin({}, 4) == task.carry.after({}, {}) == {}


class Counts:
    """A model in as far as the task looks at it."""

    def init_memory(self, rows):
        return jnp.zeros((rows,))


def test_the_task_hands_the_memory_on():
    task = recurrent.make(model=Counts(), batch_size=2)

    def apply(params, /, tokens, fresh, memory, *, train, rngs=None):
        logits = jnp.broadcast_to(memory[:, None, None] * jnp.arange(3.0)[None, None], (2, 1, 3))
        return {"logits": logits, "memory": memory + 1}

    batch = {
        "inputs": {"tokens": jnp.zeros((2, 1), jnp.int32), "fresh": jnp.zeros(2, bool)},
        "targets": jnp.zeros((2, 1), jnp.int32),
        "weights": jnp.ones((2, 1)),
    }
    extra = task.init_extra({})
    for memory in range(3):
        out: LossOut = task.loss(apply, {}, extra, batch, None, True)
        assert float(out.total) == pytest.approx(2 * np.log(np.sum(np.exp(memory * np.arange(3.0)))), rel=1e-6)
        extra = task.update_extra({}, extra, out.aux)
        assert extra["memory"].tolist() == [memory + 1] * 2
    assert task.carry.forget(extra) == {} and task.carry.begin(extra, 5)["memory"].tolist() == [0.0] * 5
    with says("task.name='recurrent' needs rows that go on from batch to batch: data.name='segments'."):
        task.loss(apply, {}, extra, batch | {"inputs": {"tokens": jnp.zeros((2, 1), jnp.int32)}}, None, True)


def test_refusals(config):
    with says("task.name='recurrent' needs a model with a memory; builtins has none."):
        recurrent.make(model=object(), batch_size=2)
    with says("train.accum=2: this task's loss couples the rows of a batch; microbatches would change it. Use 1."):
        build(config({"train.accum": 2, "data.batch_size": 16}))
    with pytest.raises(Exception, match=r"task\.model"):
        config({"task.model": 3})

"""Scores on predictions worked out by hand, and of runs: what the evaluator sees is the whole split, each row once."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.evals import scores
from tfm_jax.evals.base import Context
from tfm_jax.parallel import mesh
from tfm_jax.tasks.base import Task
from tfm_jax.train.build import build

pytest.importorskip("sklearn")


def test_scores_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    wanted = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    chosen = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    logits = np.stack([1.0 - chosen, chosen * 2.0], axis=1)
    want = {"accuracy": 0.7, "f1": 6 / 9, "matthews": (3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6),
            "macro_f1": (6 / 9 + 8 / 11) / 2}  # fmt: skip
    for metric, value in want.items():
        assert scores.scored(metric, wanted, logits) == pytest.approx(value, abs=1e-12), metric
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 30.0])
    assert scores.scored("pearson", x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert scores.scored("spearman", x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))


class Passes:
    """19 rows in batches of 8; the input says what the answer is."""

    batch_size, num_batches = 8, 3
    draw = np.random.default_rng(0)
    targets, given = draw.integers(0, 2, 19), draw.integers(0, 2, 19)

    def batch_at(self, step, rows=slice(None)):
        place = step * 8 + np.arange(8)[rows]
        index = np.minimum(place, 18)
        weights = (place < 19).astype(np.float32)
        return {"inputs": {"x": self.given[index]}, "targets": self.targets[index], "weights": weights}


@pytest.mark.parametrize("devices", [1, 8])
def test_every_row_counts_once(make_config, devices):
    built = build(make_config())
    task = Task(loss=None, predict_fns={"predict": lambda apply, params, extra, batch: {
        "prediction": jax.nn.one_hot(batch["inputs"]["x"], 2)}})  # fmt: skip
    data = type("Data", (), {"evals": staticmethod(lambda split, rows: Passes())})
    layout = mesh.make(data=devices, devices=jax.devices()[:devices])
    context = Context(task, built.model, layout, data, 8)
    state = type("State", (), {"params": {}, "extra": {}, "mutables": {}})
    with jax.set_mesh(layout.mesh):
        found = scores.make(context, metrics=("accuracy", "matthews"))(state)
    assert found["examples"] == 19 and found["accuracy"] == pytest.approx(np.mean(Passes.targets == Passes.given))
    assert found["matthews"] == pytest.approx(np.corrcoef(Passes.targets, Passes.given)[0, 1])


def test_bad_input(make_config):
    built = build(make_config())
    context = Context(built.task, built.model, built.layout, built.data, 8)
    with says("evals: scores needs a task that predicts a class or a number for each example."):
        scores.make(context, metrics=("matthews",))
    task = Task(loss=None, predict_fns={"predict": None})
    numbers = type("Numbers", (Passes,), {"targets": np.linspace(0, 1, 19)})()
    data = type("Data", (), {"evals": staticmethod(lambda split, rows: numbers)})
    with says("evals: matthews is a score of classes, and this data has numbers: pearson, spearman."):
        scores.make(Context(task, built.model, built.layout, data, 8), metrics=("spearman", "matthews"))
    classes = type("Data", (), {"evals": staticmethod(lambda split, rows: Passes())})
    with says("evals: spearman is a score of numbers, and this data has classes: accuracy, f1, macro_f1, matthews."):
        scores.make(Context(task, built.model, built.layout, classes, 8), metrics=("accuracy", "spearman"))
    for model, split in (
        (SimpleNamespace(classes=3), "validation"),
        (SimpleNamespace(classes={"a": 2, "b": 3}), "b/test"),
    ):
        with says("evals: f1 is of class 1 among two; this task has 3. Take macro_f1."):
            scores.make(Context(task, model, built.layout, classes, 8), metrics=("f1",), split=split)
    scores.make(Context(task, model, built.layout, classes, 8), metrics=("f1",), split="a/test")
    with says("evals: pearson is a score of numbers, and this task predicts classes."):
        scores.scored("pearson", np.zeros(3), np.zeros((3, 2)))
    with says("evals: accuracy is a score of classes, and this task predicts numbers."):
        task = Task(loss=None, predict_fns={"predict": lambda apply, params, extra, batch: {
            "prediction": batch["weights"]}})  # fmt: skip
        scores.make(Context(task, built.model, built.layout, classes, 8), metrics=("accuracy",)).gives(
            built.abstract_state()
        )
    with says("evals: metrics is empty: give for instance ('matthews',)."):
        scores.make(context, metrics=())
    with says("evals: matthews is a score of classes, and this task predicts numbers."):
        scores.scored("matthews", np.zeros(3), np.zeros(3))
    with says("evals: f1 is of class 1 among two; this task has 3. Take macro_f1."):
        scores.scored("f1", np.zeros(3, int), np.zeros((3, 3)))

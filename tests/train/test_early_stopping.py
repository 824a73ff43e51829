"""A run that ends when a metric has stopped becoming better: when, what it leaves, and that it stays ended."""

import json
import math

import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.train import run as loop
from tfm_jax.train.build import Experiment
from tfm_jax.train.settings import Train

METRIC = "eval/validation/loss"
CHANGES = {"train.steps": 12, "train.eval_every": 2, "train.stop_metric": f"'{METRIC}'", "train.stop_patience": 2,
           "checkpoint.every": 2, "checkpoint.keep": 9}  # fmt: skip


@pytest.mark.parametrize(
    ("history", "goal", "ends"),
    [
        ([3.0, 2.0, 2.5], "lower", False),
        ([3.0, 2.0, 2.5, 2.0], "lower", True),
        ([3.0, 2.0, 2.5, 1.9], "lower", False),
        ([1.0, 0.9, 0.8], "higher", True),
        ([1.0, 2.0, 1.5], "higher", False),
        ([], "lower", False),
        ([math.nan, 0.1, 0.2, 0.3], "higher", False),
        ([0.3, math.nan, 0.1], "higher", True),
        ([math.nan, 3.0, 2.0, 1.0], "lower", False),
    ],
)
def test_when(history, goal, ends):
    settings = Train(steps=9, eval_every=1, stop_metric="x", stop_patience=2, stop_goal=goal)
    assert settings.stale(history) is ends


def values(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[METRIC]) for line in lines if METRIC in line]


def test_a_run_ends_early_and_stays_ended(make_config, tmp_path, monkeypatch):
    """At a learning rate of almost nothing the loss goes up and down by rounding; here it is made to stand still."""
    changes = {**CHANGES, "optim.lr": 1e-12, "log.every": 1000}
    done = loop.train(make_config(changes), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    seen = values(tmp_path / "run")
    assert done.status == status["state"] == "finished" and done.result["step"] == seen[-1][0] == status["step"]
    assert [step for step, _ in seen] == list(range(2, seen[-1][0] + 1, 2)) and 6 <= seen[-1][0] < 12
    # Of the steps since the last report there is one too.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reported = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert reported == [(done.result["step"], done.result["train/loss"])]
    best = min(value for _, value in seen)
    assert [value for _, value in seen].index(best) == len(seen) - 3
    # The same command trains no further.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_Loop", None)
        again = loop.train(make_config(changes), tmp_path / "run")
    assert again.result == done.result


def test_a_crash_before_the_end_is_written(make_config, tmp_path):
    changes = {**CHANGES, "optim.lr": 1e-12}
    done = loop.train(make_config(changes), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    again = loop.train(make_config(changes), tmp_path / "run")
    assert again.result["step"] == done.result["step"] and again.result[METRIC] == done.result[METRIC]


def test_an_evaluation_that_fails_at_the_end_loses_nothing(make_config, tmp_path, monkeypatch):
    """Not the last steps, not what has been evaluated, and not what has not."""
    changes = {"train.steps": 4, "train.eval_every": 0, "checkpoint.every": 0, "evals.other.name": "loss",
               "evals.other.split": "train"}  # fmt: skip
    config, run, seen = make_config(changes), tmp_path / "run", []

    def evaluators(self):
        def watched(name, evaluate):
            def evaluated(state):
                seen.append(name)
                if len(seen) == 2:
                    raise UserError("no such thing")
                return evaluate(state)

            return evaluated

        return {name: watched(name, evaluate) for name, evaluate in made(self).items()}

    made = Experiment.evaluators
    monkeypatch.setattr(Experiment, "evaluators", evaluators)
    with says("no such thing"):
        loop.train(config, run)
    assert (run / "checkpoints" / "4").is_dir()
    done = loop.train(config, run)
    assert done.status == "finished" and {METRIC, "eval/other/loss"} <= set(done.result)
    assert sorted(seen[:2]) == ["other", "validation"] and seen[2:] == seen[1:2]


def test_bad_input(make_config, tmp_path):
    with says("train.stop_metric='eval/validation/loss' is looked at when evaluating: set train.eval_every."):
        Train(steps=9, stop_metric=METRIC)
    with says("train.stop_metric='eval/valid/loss' is of no evaluator. Did you mean 'eval/validation/loss'?"):
        loop.train(make_config({**CHANGES, "train.stop_metric": "'eval/valid/loss'"}), tmp_path / "run")
    with says("train.stop_metric='eval/validation/accuracy' is better the higher it is: set train.stop_goal='higher'."):
        loop.train(make_config({**CHANGES, "train.stop_metric": "'eval/validation/accuracy'"}), tmp_path / "run")
    with says("train.stop_metric='eval/validation/loss' is better the lower it is: set train.stop_goal='lower'."):
        loop.train(make_config({**CHANGES, "train.stop_goal": "higher"}), tmp_path / "run")
    with says(
        "train.stop_metric='eval/validation/los' is none that evals.validation gives. Did you mean 'eval/validation/loss'?"
    ):
        loop.train(make_config({**CHANGES, "train.stop_metric": "'eval/validation/los'"}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    # One of another package need not say beforehand what it gives.
    other = {**CHANGES, "evals.other.name": f"{__name__}:silent", "train.stop_metric": "'eval/other/los'"}
    with says("train.stop_metric='eval/other/los' is none that is evaluated. Did you mean 'eval/other/loss'?"):
        loop.train(make_config(other), tmp_path / "run")


def silent(context):
    return lambda state: {"loss": 1.0}

"""Trials in threads: each is its solo run, their programs are compiled once, and those that stop cost nothing."""

import contextlib
import io
import json
import time

import jax
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.sweep import runner, trials, vectorised
from tfm_jax.sweep.space import named
from tfm_jax.sweep.streams import ByThread
from tfm_jax.sweep.together import Together
from tfm_jax.sweep.vectorised import starter
from tfm_jax.train.log import read_metrics
from tfm_jax.train.run import train

BASE = {"optim.lr": 1e-2, "optim.weight_decay": 0.1, "optim.options": "{'b2': 0.95}", "optim.warmup_steps": 2,
        "model.dropout": 0.1, "model.init_std": 0.02, "train.seed": 0, "data.seed": 0,
        "model.width": 16}  # fmt: skip
OTHERS = {"optim.lr": 3e-3, "optim.weight_decay": 0.3, "optim.options": "{'b2': 0.99, 'b1': 0.8}", "optim.warmup_steps": 4,
          "model.dropout": 0.3, "model.init_std": 0.05, "train.seed": 7, "data.seed": 3}  # fmt: skip
ZEROS = {"optim.weight_decay": 0.0, "optim.warmup_steps": 0, "model.dropout": 0.0}
# The first two differ in everything that may, one leaves out parts of the program, one diverges.
LISTED = named([BASE, {**BASE, **OTHERS}, {**BASE, **ZEROS}, {**BASE, "optim.lr": 1e30, "train.seed": 5}])


@pytest.fixture
def population(make_config, monkeypatch):
    """`population(trials)`: what starts them, on the first device."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])

    def resolved(trial):
        return make_config(
            {**trial.overrides, "train.eval_every": 4, "train.max_bad_steps": 2, "optim.clip_norm": None}
        )

    streams = ByThread(io.StringIO())
    return resolved, lambda listed: starter(resolved, listed, streams), streams


def _numbers(run):
    """What a run has logged but for times."""
    lines = [{k: v for k, v in line.items() if k[:4] not in ("perf", "ckpt")} for line in read_metrics(run)]
    return [line for line in lines if len(line) > 1]


@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.journey)])
def test_each_is_its_solo_run(population, tmp_path, monkeypatch, together):
    if together:
        monkeypatch.setattr(vectorised, "in_turn", lambda turns: Together)
    resolved, made, streams = population
    said, (*good, bad) = [], LISTED
    source, start = runner.Listed(LISTED, tmp_path), made(LISTED)
    first = start(good[0], tmp_path / good[0].name, 0, 0)
    first.stop()
    while first.poll() is None:
        time.sleep(0.01)
    assert first.poll() == 75 and trials.state(tmp_path / good[0].name).word == "preempted"
    with contextlib.redirect_stderr(streams):
        runner.run(source, tmp_path, start, parallel=3, say=said.append, wait=0.01)
    assert "had a loss or gradient that was not finite" in trials.state(tmp_path / bad.name).reason and len(said) == 4
    for trial in good:
        alone = tmp_path / "alone" / trial.name
        train(resolved(trial), alone, devices=jax.devices()[:1])
        ours, wanted = (_numbers(tmp_path / trial.name), _numbers(alone))
        assert [line.keys() for line in ours] == [line.keys() for line in wanted] and len(wanted) > 8
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-5)
        assert "step 8/8" in (tmp_path / trial.name / "train.log").read_text()
        assert json.loads((tmp_path / trial.name / "status.json").read_text())["state"] == "finished"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [None, SystemExit("gone"), ValueError("wrong")])
def test_a_thread_has_an_end_however_it_ends(tmp_path, monkeypatch, error):
    """Also where its log cannot be opened (None: there is no folder)."""

    def train(*arguments, **options):
        raise error

    monkeypatch.setattr(vectorised, "train", train)
    run = tmp_path if error else tmp_path / "nowhere"
    thread = vectorised.Thread({"checkpoint": {}}, run, None, None, ByThread(io.StringIO()))
    for _ in range(500):
        if thread.poll() is not None:
            break
        time.sleep(0.01)
    assert thread.poll() == 1


def test_other_shapes_are_refused(population):
    wider = named([BASE, {**BASE, "model.width": 32}])
    with pytest.raises(UserError, match=r"^--vectorise: model\.width=32 gives the state of width=16 other shapes\."):
        population[1](wider)

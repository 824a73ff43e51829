"""The mean of a run's last checkpoints, of what its task evaluates with."""

import json

import jax
import numpy as np
import pytest

from experiments import convert, evaluate, generate, predict
from tests.errors import says
from tfm_jax.paths import flatten
from tfm_jax.train.build import build
from tfm_jax.train.restore import load_params, restore_for_evaluation
from tfm_jax.train.run import train


@pytest.fixture(scope="module", params=[None, 0.5], ids=["plain", "ema"])
def run(make_config, tmp_path_factory, request):
    path = tmp_path_factory.mktemp("average") / "run"
    train(make_config({"train.ema": request.param, "checkpoint.every": 2, "checkpoint.keep": 4}), path)
    return path


def test_parameters_are_the_mean(run):
    each = [flatten(load_params(run, step)[0]) for step in (4, 6, 8)]
    mean, step = load_params(run, average=3)
    assert step == 8
    for path, x in flatten(mean).items():
        np.testing.assert_allclose(x, np.mean([one[path] for one in each], axis=0), atol=1e-7, err_msg=path)
    earlier = flatten(load_params(run, 6, average=2)[0])
    want = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, each[0], each[1])
    assert all(np.allclose(earlier[path], want[path], atol=1e-7) for path in want)


def test_evaluate_takes_it(run, capsys):
    results = []
    for flags in ([], ["--average=1"], ["--average=3"]):
        assert evaluate.main([f"--run={run}", "--json", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["eval/validation/loss"])
    assert results[0] == results[1] != results[2]
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["average"]) for line in lines] == [(8, 1), (8, 3)]


def test_the_last_ones_weigh_more(run, make_config):
    """With a decay, by hand: an exponential moving average over checkpoints."""
    experiment = build(make_config(), tokenizer_dir=run / "tokenizer", for_training=False)
    with jax.set_mesh(experiment.layout.mesh):
        each = [restore_for_evaluation(experiment, run, step)[0].params for step in (4, 6, 8)]
        found = restore_for_evaluation(experiment, run, average=3, decay=0.5)[0].params
    want = jax.tree.map(lambda a, b, c: (np.asarray(a) + 2 * np.asarray(b) + 4 * np.asarray(c)) / 7, *each)
    for path, x in flatten(want).items():
        np.testing.assert_allclose(flatten(found)[path], x, atol=1e-6, err_msg=path)


def test_without_the_average_of_training(run, capsys):
    """`train.ema=None` evaluates what was trained, and not what followed it."""
    record = json.loads((run / "config.json").read_text())
    results = []
    for flags in ([], ["--config.train.ema=None"]):
        assert evaluate.main([f"--run={run}", "--json", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["eval/validation/loss"])
    assert (results[0] == results[1]) == (record["train"]["ema"] is None)


def test_too_many(run):
    with says(f"--average=9: {run} has 4 checkpoints up to step 8. A run keeps more of them with checkpoint.keep."):
        load_params(run, average=9)
    with says("--average=0: must be at least 1."):
        load_params(run, average=0)


def test_generate_and_convert_take_it(run, tmp_path):
    """Of equal weights and, by hand, of weights that halve."""
    each = [flatten(load_params(run, step)[0]) for step in (4, 6, 8)]
    for decay, weights in ((1.0, (1, 1, 1)), (0.5, (1, 2, 4))):
        found = flatten(generate.Loaded(run, average=3, decay=decay).params)
        for path, x in found.items():
            want = np.average([one[path] for one in each], axis=0, weights=weights)
            np.testing.assert_allclose(x, want, atol=1e-6, err_msg=path)
    assert convert.main([f"--from={run}", f"--to=hf:{tmp_path}/out", "--average=3", "--decay=0.5"]) == 0
    assert convert.main([f"--from=hf:{tmp_path}/out", f"--to={tmp_path}/back"]) == 0
    back = flatten(load_params(tmp_path / "back")[0])
    assert back.keys() == found.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(back[path], x, err_msg=path)


@pytest.mark.parametrize("command", [evaluate, generate, predict])
def test_a_decay_without_checkpoints(command, tmp_path):
    out = [f"--to={tmp_path}/out.npy"] if command is predict else []
    with says("--decay=0.5 weighs the checkpoints of --average=N: give both."):
        command.main([f"--run={tmp_path}", "--decay=0.5", *out])

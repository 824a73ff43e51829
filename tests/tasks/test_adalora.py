"""Adaptive low-rank adapters: importance and budget against slow numpy, and what is left at the end of a run."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import evaluate
from tests.errors import says
from tests.tasks.test_lora import saved
from tfm_jax.paths import flatten
from tfm_jax.tasks import adalora
from tfm_jax.tasks.base import LossOut, Task
from tfm_jax.train import adapters, rundir
from tfm_jax.train.build import build
from tfm_jax.train.restore import load_params, restore_for_evaluation
from tfm_jax.train.run import train

SETTINGS = {"name": "adalora", "rank": 2, "initial_rank": 4, "start": 0.2, "settled": 0.3, "every": 2,
            "pattern": "attention/(query|value)/kernel$"}  # fmt: skip


def test_without_the_average_and_the_mean_of_checkpoints(make_config, tmp_path, caplog):
    """What a run evaluates with is within the budget however it is asked; of its two last checkpoints the first is not yet."""
    changes = {"train.adapter": str({**SETTINGS, "settled": 0.0}), "train.steps": 10, "train.ema": 0.5,
               "checkpoint.every": 5}  # fmt: skip
    train(make_config(changes), tmp_path / "run")
    assert "what is frozen stays as it was drawn: checkpoint.init_from names no run to begin with." in caplog.messages
    losses = []
    for flags in ([], ["--config.train.ema=None"], ["--average=2"], ["--average=2", "--config.train.ema=None"]):
        assert evaluate.main([f"--run={tmp_path / 'run'}", f"--table={tmp_path}/t.csv", *flags]) == 0
        lines = list(csv.DictReader((tmp_path / "t.csv").open()))
        losses.append(lines[0]["eval/validation/loss"])
    assert len(set(losses)) == 4
    config = rundir.read_config(tmp_path / "run")
    config["train"]["ema"] = None
    plain = build(config, tokenizer_dir=tmp_path / "run" / "tokenizer", for_training=False)
    with jax.set_mesh(plain.layout.mesh):
        each = [restore_for_evaluation(plain, tmp_path / "run", 10, average=count)[0].params for count in (1, 2)]
    for params in each:
        s = [
            np.asarray(x) for path, x in flatten(params).items() if path.startswith("adapter/") and path.endswith("/s")
        ]
        assert 0 < sum(int(np.sum(x != 0)) for x in s) <= 2 * sum(x.size // x.shape[-1] for x in s)


@pytest.mark.parametrize("layer_loop", ["scan", pytest.param("loop", marks=pytest.mark.journey)])
def test_a_run_ends_with_as_many_triplets_as_the_budget_allows(make_config, tmp_path, layer_loop):
    changes = {"train.adapter": str(SETTINGS), "train.steps": 10, "model.layers": 2, "model.layer_loop": layer_loop}
    train(make_config(changes), tmp_path)
    now, plain = saved(tmp_path), flatten(load_params(tmp_path)[0])
    s = {path: np.asarray(x) for path, x in now.items() if path.startswith("adapter/") and path.endswith("/s")}
    kept = sum(int(np.sum(x != 0)) for x in s.values())
    assert sum(x.size for x in s.values()) == 16 and kept == 8
    for path, x in s.items():
        kernel = path.removeprefix("adapter/").removesuffix("/s")
        p, q = (np.asarray(now[f"adapter/{kernel}/{name}"]) for name in "pq")
        want = now[kernel] + 8.0 * (p * x[..., None, :]) @ q
        np.testing.assert_allclose(plain[kernel], want, atol=1e-6)


def test_importance_and_budget_against_numpy():
    """One kernel of a scanned stack and one plain one, with gradients that are given."""
    draw = np.random.default_rng(0)
    params = {"stack": {"kernel": jnp.zeros((2, 5, 4))}, "head": {"kernel": jnp.zeros((3, 6))}}
    nothing = LossOut(jnp.zeros(()), jnp.ones(()), {}, {})
    task = adalora.wrap(
        Task(loss=lambda *_: nothing),
        steps=20,
        rank=1,
        initial_rank=3,
        pattern="kernel$",
        start=0.1,
        settled=0.2,
        every=3,
    )
    params = task.init_params(params, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), params)
    extra, paths = task.init_extra(params), ["head/kernel", "stack/kernel"]
    mean = {path: dict.fromkeys("psq", 0.0) for path in paths}
    doubt = {path: dict.fromkeys("psq", 0.0) for path in paths}
    kept = {"head/kernel": np.ones(3, bool), "stack/kernel": np.ones((2, 3), bool)}
    update, project = jax.jit(task.update_extra), jax.jit(task.project)
    for step in range(1, 21):
        gradient = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), params)
        before = params
        extra = update(params, extra, {"gradient": gradient})
        params = project(params, extra)
        scores = {}
        for path in paths:
            for name in "psq":
                w = np.asarray(flatten(before)[f"adapter/{path}/{name}"])
                found = np.abs(w * np.asarray(flatten(gradient)[f"adapter/{path}/{name}"]))
                mean[path][name] = 0.85 * mean[path][name] + 0.15 * found
                doubt[path][name] = 0.85 * doubt[path][name] + 0.15 * np.abs(found - mean[path][name])
            each = {n: mean[path][n] * doubt[path][n] for n in "psq"}
            scores[path] = each["s"] + each["p"].mean(-2) + each["q"].mean(-1)
        choosing = step == 16 or (2 <= step < 16 and step % 3 == 0)
        if choosing:
            count = round(3 * (1 + 2 * (1 - (step - 2) / 14) ** 3))
            worst = sorted(np.concatenate([x.ravel() for x in scores.values()]))[::-1][count - 1]
            kept = {path: x >= worst for path, x in scores.items()}
            assert sum(x.sum() for x in kept.values()) == count
        for path in paths:
            np.testing.assert_array_equal(flatten(extra["adalora"]["kept"])[f"{path}/s"], kept[path], err_msg=f"{step}")
            s = np.asarray(flatten(before)[f"adapter/{path}/s"])
            want = np.where(~kept[path] & (choosing or step >= 16), 0.0, s)
            np.testing.assert_array_equal(flatten(params)[f"adapter/{path}/s"], want, err_msg=f"{step}")
        # What was zeroed may come back until the last stage.
        params = jax.tree.map(lambda x: jnp.where(x == 0, 0.5, x), params)


def test_what_was_chosen_for_a_longer_run_is_chosen_once_more():
    """Else a state that is resumed behind the last choice would stay at its rank."""
    nothing = LossOut(jnp.zeros(()), jnp.ones(()), {}, {})
    task = adalora.wrap(Task(loss=lambda *_: nothing), steps=10, rank=1, initial_rank=3, pattern="kernel$")
    params = task.init_params({"a": {"kernel": jnp.ones((5, 4))}, "b": {"kernel": jnp.ones((6, 4))}}, jax.random.key(0))
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), params)
    extra, kept = task.init_extra(params), []
    extra["adalora"]["step"] = jnp.asarray(8, jnp.int32)
    for _ in range(3):
        extra = task.update_extra(params, extra, {"gradient": params})
        params = task.project(params, extra)
        kept.append([np.flatnonzero(x) for x in (params["adapter"][name]["kernel"]["s"] for name in "ab")])
    assert [sum(map(len, step)) for step in kept] == [2, 2, 2]
    assert all(np.array_equal(a, b) for step in kept for a, b in zip(step, kept[0], strict=True))


def test_the_penalty_is_the_mean_over_kernels():
    loss = LossOut(jnp.float32(3.0), jnp.float32(4.0), {}, {})
    task = adalora.wrap(Task(loss=lambda *_: loss), steps=10, rank=2, pattern="kernel$", orthogonality=0.5)
    # One kernel, and two in one array.
    kernels = {"a": {"kernel": jnp.ones((5, 4))}, "b": {"kernel": jnp.ones((2, 6, 5))}}
    made = task.init_params(kernels, jax.random.key(1))
    # As they are made they are orthogonal.
    shifted = jax.tree.map(lambda x: x + 0.1, made["adapter"])
    params, wanted = {**made, "adapter": shifted}, []
    for name in "ab":
        p, q = (np.asarray(shifted[name]["kernel"][letter], np.float64) for letter in "pq")
        for one in [*p.reshape(-1, *p.shape[-2:]), *np.swapaxes(q, -1, -2).reshape(-1, q.shape[-1], q.shape[-2])]:
            wanted.append(np.sum((one.T @ one - np.eye(3)) ** 2))
    assert len(wanted) == 6 and min(wanted) > 0.01
    out = task.loss(None, params, task.init_extra(params), {}, None, True)
    assert float(out.total) == pytest.approx(3.0 + 0.5 * 4.0 * np.mean(wanted), rel=1e-6)
    assert float(out.metrics["orthogonality"][0]) == pytest.approx(np.mean(wanted), rel=1e-6)
    rank, kernels = out.metrics["rank"]
    assert float(rank) / float(kernels) == 3.0
    assert task.loss(None, params, task.init_extra(params), {}, None, False) is loss


def test_bad_input(make_config):
    def with_(**changes):
        return build(make_config({"train.adapter": str({**SETTINGS, **changes})}))

    with says("config: unknown key 'train.adapter.initial' (=3). Did you mean 'initial_rank'?"):
        with_(initial=3)
    with says(
        "train.adapter.name='adalora' is down to its rank at the end of train.steps, and train.stop_metric may end the run before: leave"
        " one of them out."
    ):
        build(make_config({"train.adapter": str(SETTINGS), "train.stop_metric": "eval/validation/loss", "train.eval_every": 4,
                           "train.stop_goal": "lower"}))  # fmt: skip
    for few in (0, 1):
        with says(f"train.adapter.initial_rank={few}: must be at least train.adapter.rank=2."):
            with_(initial_rank=few)
    with says("train.adapter: start=0.8 and settled=0.3 are shares of the steps, below 1 together."):
        with_(start=0.8)
    with says("train.adapter.name='adalor' does not exist. Did you mean 'adalora'?"):
        with_(name="adalor")


def test_an_average_keeps_to_the_budget(make_config, tmp_path):
    """What is evaluated, exported and saved alone has the rank that was asked for, whatever the parameters were before."""
    train(make_config({"train.adapter": str(SETTINGS), "train.steps": 10, "train.ema": 0.9}), tmp_path)
    plain = flatten(load_params(tmp_path)[0])
    kernels = {path: np.asarray(x) for path, x in saved(tmp_path).items() if not path.startswith("adapter/")}
    adapters.save(tmp_path, tmp_path / "saved")
    alone = load_file(tmp_path / "saved" / adapters.ARRAYS)
    for p in (path for path in plain if path.endswith(("query/kernel", "value/kernel"))):
        left, s, right = (alone[f"adapter/{p}/{name}"] for name in "psq")
        np.testing.assert_allclose(plain[p], kernels[p] + 8.0 * (left * s) @ right, atol=1e-6, err_msg=p)
    assert sum(np.count_nonzero(x) for path, x in alone.items() if path.endswith("/s")) == 4
    ranks = [np.linalg.matrix_rank(np.asarray(plain[p]) - kernels[p], tol=1e-6) for p in plain if "attention/q" in p]
    ranks += [np.linalg.matrix_rank(np.asarray(plain[p]) - kernels[p], tol=1e-6) for p in plain if "attention/v" in p]
    assert 0 < sum(ranks) <= 4

"""Low-rank adapters: the sum is that of the paper, only they are trained, and everything else sees plain parameters."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import adapters as adapters_command
from experiments import evaluate
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.lora import wrap
from tfm_jax.train import adapters, rundir
from tfm_jax.train.build import build
from tfm_jax.train.restore import load_params, open_checkpoint, restore_for_evaluation
from tfm_jax.train.run import train

LORA = {"rank": 2, "alpha": 6.0, "pattern": r"attention/(query|value)/kernel$", "train": [r"final_norm/"]}
CHANGES = {"train.adapter": json.dumps(LORA).replace('"', "'"), "train.steps": 4, "model.layers": 2}


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory):
    """A run of all parameters, another of more width, one of adapters on its end, and one of these that keeps an average."""
    base = tmp_path_factory.mktemp("lora")
    train(make_config({"train.steps": 3, "model.layers": 2}), base / "donor")
    train(make_config({"train.steps": 3, "model.layers": 2, "model.width": 32}), base / "wide")
    for name, ema in (("run", None), ("averaged", 0.5)):
        start = {"checkpoint.init_from": f"'{base / 'donor'}'", "train.ema": ema}
        train(make_config({**CHANGES, **start}), base / name)
    return base


def saved(run):
    checkpoints, step = open_checkpoint(run)
    shapes = checkpoints.shapes(step)["params"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return flatten(checkpoints.restore(step, {"params": abstract}, partial=True).state["params"])


def test_only_adapters_and_what_is_named_are_trained(trained):
    donor, now = flatten(load_params(trained / "donor")[0]), saved(trained / "run")
    adapted = {path for path in donor if path.endswith(("query/kernel", "value/kernel"))}
    assert {p for p in now if p.startswith("adapter/")} == {f"adapter/{p}/{x}" for p in adapted for x in "ab"}
    changed = {path for path, x in donor.items() if not np.array_equal(x, now[path])}
    assert changed == {path for path in donor if "final_norm/" in path} and len(adapted) == 4
    assert all(np.any(now[f"adapter/{path}/b"] != 0) for path in adapted)


def test_others_see_the_sum(trained):
    now, plain = saved(trained / "run"), flatten(load_params(trained / "run")[0])
    assert not any("adapter" in path for path in plain)
    for path, x in plain.items():
        want = now[path]
        if f"adapter/{path}/a" in now:
            want = want + 3.0 * np.asarray(now[f"adapter/{path}/a"]) @ np.asarray(now[f"adapter/{path}/b"])
        np.testing.assert_allclose(x, want, atol=1e-6, err_msg=path)
    result = json.loads((trained / "run" / "result.json").read_text())
    assert np.isfinite(result["eval/validation/loss"])


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_it_begins_as_the_model_and_has_its_gradients(make_config, layer_loop):
    """A's gradient is zero at first, B's is that of the kernel's through A: scale A^T dW."""
    built = build(make_config({"model.layer_loop": f"'{layer_loop}'"}))
    batch, task = built.data.train.batch_at(0), token_prediction.make()
    lora = wrap(task, rank=2, alpha=6.0, pattern="mlp/up/kernel$")
    params = jax.jit(built.init)().params
    wide = jax.jit(lora.init_params)(params, jax.random.key(3))

    def total(task, params):
        def apply(params, /, *, train, rngs=None, **inputs):
            return built.model.apply({"params": params}, **inputs, train=train)

        return task.loss(apply, params, {}, batch, None, True).total

    plain, full = jax.jit(jax.value_and_grad(lambda p: total(task, p)))(params)
    same, thin = jax.jit(jax.value_and_grad(lambda p: total(lora, p)))(wide)
    np.testing.assert_allclose(same, plain, rtol=1e-6)
    wide, full, thin = flatten(wide), flatten(full), flatten(thin)
    (path,) = {p for p in full if p.endswith("mlp/up/kernel")}
    assert all(np.all(thin[p] == 0) for p in thin if not p.endswith("/b"))
    want = 3.0 * np.swapaxes(wide[f"adapter/{path}/a"], -1, -2) @ np.asarray(full[path])
    np.testing.assert_allclose(thin[f"adapter/{path}/b"], want, atol=1e-4 * np.max(np.abs(want)))


def test_bad_input(make_config):
    def with_(**changes):
        return make_config({"train.adapter": str({**LORA, "train": [], **changes})})

    with says("config: unknown key 'train.adapter.rnk' (=3). Did you mean 'rank'?"):
        build(with_(rnk=3))
    with says("train.adapter.rank=0: must be at least 1."):
        build(with_(rank=0))
    with pytest.raises(UserError) as error:
        build(with_(pattern="atention/query"))
    assert str(error.value).endswith("'atention/query' matches no parameter. Did you mean 'attention/query'?")
    with pytest.raises(UserError, match=r"^train\.adapter\.pattern='q/w' matches no parameter\. There are: ") as error:
        build(with_(pattern="q/w"))
    assert "/kernel" in str(error.value) and "embedding" not in str(error.value), "what has no adapters is no choice"
    with pytest.raises(UserError, match=r"^train\.adapter\.train: 'head' matches no parameter\. There are: "):
        build(with_(train=["head"]))
    # The names of two groups, each good alone.
    for names, last, why in (
        (["(?i)final_norm/"], "(?i)final_norm/", "global flags not at the start of the expression"),
        (["(?P<a>norm)/", "(?P<a>mlp)/"], "(?P<a>mlp)/", "redefinition of group name 'a' as group 2; was group 1"),
    ):
        with says(
            f"train.adapter.train: {last!r} cannot stand inside a regular expression: {why}. Flags are for a part of one there,"
            " (?i:head)."
        ):
            build(with_(train=names))
    build(with_(train=["(?i:FINAL_norm)/"]))
    with pytest.raises(UserError) as error:
        build(with_(pattern="token_embedding"))
    assert (
        str(error.value)
        == "train.adapter.pattern='token_embedding' matches token_embedding/embedding, which is no kernel."
    )
    with pytest.raises(
        UserError,
        match=r"='down/kernel' matches only parameters that are trained as they are \(train\.adapter\.train\)\.",
    ):
        build(with_(pattern="down/kernel", train=["mlp/"]))
    with pytest.raises(UserError) as error:
        build(with_(rank=17))
    assert (
        str(error.value)
        == "train.adapter: stack/block_0/attention/query/kernel is only 16 x 16, too small for a rank of 17."
    )


@pytest.mark.parametrize("name", ["run", "averaged"])
def test_adapters_alone_and_back_on_their_base(trained, tmp_path, capsys, name):
    """The run with its adapters put on again evaluates like the one that trained them."""
    assert adapters_command.main([f"--run={trained / name}", f"--to={tmp_path / 'saved'}", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["arrays"] == 4 * 2 + len([p for p in saved(trained / name) if "final_norm/" in p])
    size = (tmp_path / "saved" / "adapter.safetensors").stat().st_size
    modes = {(tmp_path / "saved" / file).stat().st_mode for file in ("adapter.safetensors", "adapter.json")}
    assert len(modes) == 1, "who may read the one may read the other"
    assert size < 4 * record["parameters"] + 4096 and 0 < record["share"] < 0.2
    back = [f"--from={tmp_path / 'saved'}", f"--base={trained / 'donor'}", f"--to={tmp_path / 'back'}"]
    assert adapters_command.main(back) == 0
    want, found = flatten(load_params(trained / name)[0]), flatten(load_params(tmp_path / "back")[0])
    assert want.keys() == found.keys()
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, atol=1e-6, err_msg=path)
    assert evaluate.main([f"--run={tmp_path / 'back'}", "--json"]) == 0
    result = json.loads((trained / name / "result.json").read_text())
    loss = json.loads(capsys.readouterr().out.splitlines()[-1])["eval/validation/loss"]
    assert loss == pytest.approx(result["eval/validation/loss"], rel=1e-6)
    assert rundir.read_config(tmp_path / "back")["train"]["ema"] is None

    back[1] = f"--base={trained / 'run'}"
    back[2] = f"--to={tmp_path / 'other'}"
    with says(f"{trained / 'run'} is not what these adapters were trained on: its other parameters differ."):
        adapters_command.main(back)
    with pytest.raises(
        UserError, match=r"wide is not what these adapters were trained on: .*: donor \(.*\), model \([0-9, ]*\)\.$"
    ):
        adapters_command.main([back[0], f"--base={trained / 'wide'}", back[2]])
    with says(f"{trained / 'donor'} has no adapters: it was trained without train.adapter."):
        adapters_command.main([f"--run={trained / 'donor'}", f"--to={tmp_path / 'none'}"])
    with says("Give --run RUN to save its adapters, or --from FOLDER and --base RUN to put them on."):
        adapters_command.main([f"--to={tmp_path / 'none'}"])


def test_what_a_task_adds_is_trained_without_being_named():
    """The matrix between a student's states and a wider teacher's. Neither it nor what is named has an adapter, whatever the
    pattern."""
    kernel = {"attention": {"query": {"kernel": jnp.ones((4, 4))}}, "mlp": {"up": {"kernel": jnp.ones((4, 4))}}}
    task = dataclasses.replace(
        token_prediction.make(), init_params=lambda params, key: {**params, "bridge": {"kernel": jnp.ones((2, 3))}},
        own=("^bridge/",),
    )  # fmt: skip
    wrapped = wrap(task, rank=2, pattern="kernel$", train=["/up/"])
    paths = flatten(wrapped.init_params(kernel, jax.random.key(0)))
    frozen = {path for path in paths if any(re.search(pattern, path) for pattern in wrapped.frozen)}
    assert frozen == {"attention/query/kernel"} and "bridge/kernel" in paths
    assert {path.rpartition("/")[0] for path in paths if path.startswith("adapter/")} == {
        "adapter/attention/query/kernel"
    }


def test_a_student_needs_no_teacher_when_its_adapters_are_put_on(trained, make_config, tmp_path):
    """Nor the matrix between their states, which no base has."""
    narrow = {"model.width": 8, "train.steps": 3}
    train(make_config(narrow), tmp_path / "base")
    taught = {"task.name": "distillation", "task.teacher": f"'{trained / 'donor'}'", "task.hidden": "((1, 1),)",
              "task.task": "{'name': 'token_prediction'}"}  # fmt: skip
    start = {"model.layers": 1, "checkpoint.init_from": f"'{tmp_path / 'base'}'"}
    train(make_config({**CHANGES, **narrow, **start, **taught}), tmp_path / "run")
    adapters.save(tmp_path / "run", tmp_path / "saved")
    adapters.put_on(tmp_path / "saved", tmp_path / "base", tmp_path / "back")
    assert rundir.read_config(tmp_path / "back")["task"]["name"] == "token_prediction"
    want, found = (flatten(load_params(tmp_path / name)[0]) for name in ("run", "back"))
    assert want.keys() == found.keys()
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, atol=1e-6, err_msg=path)


@pytest.mark.journey
def test_a_base_with_another_head(make_config, tmp_path):
    """Of which the run took what it wanted; put on again they are what was trained."""
    base = {"model.name": "bert", "model.types": 0, "data.objective": "mask", "model.outputs": "('tokens',)"}
    train(make_config({**base, "train.steps": 3}), tmp_path / "base")
    rows = [{"text": f"the whale {i % 3}", "label": "abc"[i % 3]} for i in range(24)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = configs.resolve(
        {
            "model": {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 16, "types": 0,
                      "outputs": ("classes",)},
            "task": {"name": "classification"},
            "data": {"name": "examples", "source": f"jsonl:{tmp_path}/*.jsonl", "tokenizer": f"run:{tmp_path}/base",
                     "seq_len": 16, "batch_size": 8},
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "train": {"steps": 4, "adapter": {"rank": 2, "train": ["pooler/", "class_head/"]}},
            "checkpoint": {"init_from": str(tmp_path / "base"), "every": 2},
            "evals": {"validation": {"split": "validation"}},
            "log": {"every": 1, "tensorboard": False},
        }
    )  # fmt: skip
    idle = {**run, "train": {**run["train"], "adapter": {**run["train"]["adapter"], "train": ["class_head/"]}}}
    with pytest.raises(
        UserError,
        match=r"has no pooler/dense/bias, pooler/dense/kernel, which are frozen here and would stay as they were drawn\.",
    ):
        train(idle, tmp_path / "idle")
    train(run, tmp_path / "run")
    adapters.save(tmp_path / "run", tmp_path / "saved")
    adapters.put_on(tmp_path / "saved", tmp_path / "base", tmp_path / "back")
    want, found = (flatten(load_params(tmp_path / name)[0]) for name in ("run", "back"))
    assert want.keys() == found.keys() and any("class_head" in path for path in want)
    for path, x in want.items():
        np.testing.assert_allclose(found[path], x, atol=1e-6, err_msg=path)
    # Evaluated from the mean of two checkpoints as it is exported from it.
    config = rundir.read_config(tmp_path / "run")
    assert config["data"]["names"] == ["a", "b", "c"] and config["model"]["vocab_size"] == 258
    experiment = build(config, tokenizer_dir=tmp_path / "run" / "tokenizer", for_training=False)
    state, _ = restore_for_evaluation(experiment, tmp_path / "run", average=2)
    evaluated = flatten(experiment.task.eval_params(state.params, state.extra))
    for path, x in flatten(load_params(tmp_path / "run", average=2)[0]).items():
        np.testing.assert_allclose(evaluated[path], x, atol=1e-6, err_msg=path)

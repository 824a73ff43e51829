"""Mixtures: shares, turns by arithmetic, batches that are the parts' own; two tasks learnt on one trunk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import predict
from tests.errors import says
from tests.test_configs import FOLDER
from tfm_jax import config as configs
from tfm_jax.data import examples, mixture
from tfm_jax.errors import UserError
from tfm_jax.evals.squad import normal
from tfm_jax.sections import build_model
from tfm_jax.tasks.base import LossOut, Task, bind
from tfm_jax.tasks.distillation import divergence
from tfm_jax.tasks.mixture import make
from tfm_jax.train import rundir
from tfm_jax.train.build import build
from tfm_jax.train.run import train

# Learning is the same on one device, and cheaper.
ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A class that a word decides, and a number that another word is."""
    folder, draw = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for part, counts in (("tone", {"train": 300, "valid": 30}), ("count", {"train": 100, "valid": 20})):
        (folder / part).mkdir()
        for split, count in counts.items():
            rows = []
            for _ in range(count):
                words = list(draw.choice(["a", "b", "c"], 8))
                number, tone = int(draw.integers(2)), int(draw.integers(2))
                words.insert(int(draw.integers(9)), ("x", "y")[tone])
                words.insert(int(draw.integers(9)), "pq"[number])
                label = {"label": ("bad", "good")[tone]} if part == "tone" else {"label": 8.0 * number}
                rows.append({"text": " ".join(words), **label})
            (folder / part / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parts(folder):
    return {
        "tone": {"name": "examples", "source": f"jsonl:{folder}/tone/*.jsonl"},
        "count": {"name": "examples", "source": f"jsonl:{folder}/count/*.jsonl", "kind": "number"},
    }


def made(folder, **changes):
    return mixture.make(
        parts=parts(folder), **{"tokenizer": "bytes", "seq_len": 32, "batch_size": 4, "seed": 3, **changes}
    )


@pytest.mark.parametrize(("temperature", "want"), [(1.0, 750), (2.0, 634), (1e6, 500)])
def test_shares(sources, temperature, want):
    data = made(sources, temperature=temperature).train
    for block in (0, 1):
        turns = [data.turn(1000 * block + i)[0] for i in range(1000)]
        assert turns.count("tone") == want
    assert mixture.shares({"a": 10_000_000, "b": 1, "c": 5_000_000}, 1.0) == {"a": 666, "b": 1, "c": 333}
    assert mixture.shares({"a": 67_349, "b": 5_749}, 0.015) == {"a": 999, "b": 1}
    small = {f"p{i}": 1 for i in range(40)}
    assert mixture.shares({"big": 10**9, **small}, 1.0) == {"big": 960, **small}


def test_every_batch_is_the_parts_own_and_each_comes_once(sources):
    data = made(sources)
    alone = {
        name: examples.make(
            **{k: v for k, v in section.items() if k != "name"}, tokenizer="bytes", seq_len=32, batch_size=4, seed=3
        )
        for name, section in parts(sources).items()
    }
    following = {"tone": 0, "count": 0}
    turns = [data.train.turn(step) for step in range(2100)]
    for step, (name, own) in enumerate(turns):
        assert own == following[name]
        following[name] += 1
        if step % 100 == 7:
            batch, want = data.train.batch_at(step), alone[name].train.batch_at(own)
            assert list(batch.pop("part")) == [name]
            assert set(batch) == set(want)
            np.testing.assert_array_equal(batch["targets"], want["targets"])
            np.testing.assert_array_equal(batch["inputs"]["tokens"], want["inputs"]["tokens"])
    # In any order, as a run that goes on asks for them.
    assert [data.train.turn(step) for step in reversed(range(2100))] == turns[::-1]
    assert [data.train.turn(step)[0] for step in range(1000)] != [
        data.train.turn(step)[0] for step in range(1000, 2000)
    ]
    held = data.evals("count/validation", 8)
    assert held.num_batches == 3 and list(held.batch_at(0)["part"]) == ["count"]
    assert data.sizes == {"classes": {"tone": 2, "count": 1}}


def test_two_tasks_are_learnt_on_one_trunk(sources, tmp_path):
    """By the smoke form of the recipe, without its third part."""
    raw = configs.load(f"{FOLDER}/glue_mixture.py:smoke").to_dict()
    raw["data"]["parts"] = {"sst2": parts(sources)["tone"], "stsb": parts(sources)["count"]}
    raw["task"] |= {"weights": {"stsb": 10.0}, "tasks": {k: v for k, v in raw["task"]["tasks"].items() if k != "cola"}}
    raw["evals"] = {k: v for k, v in raw["evals"].items() if k != "cola"}
    raw["train"] |= {"steps": 300}
    result = train(
        configs.resolve(raw, [("log.tensorboard", "False"), ("log.every", "50")]), tmp_path, devices=ONE
    ).result
    assert result["eval/sst2/accuracy"] > 0.9 and result["eval/stsb/spearman"] > 0.8
    assert {"train/loss", "train/sst2_loss", "train/stsb_absolute_error"} <= set(result)


def test_a_weight_is_a_factor_of_its_parts_loss():
    part = Task(loss=lambda apply, params, extra, batch, rng, train: LossOut(
        jnp.float32(5.0), jnp.float32(4.0), {"loss": (jnp.float32(5.0), jnp.float32(4.0))}, None))  # fmt: skip

    def loss(name, train=True, **weights):
        task = make(build=lambda section: part, tasks={"tone": {}, "count": {}}, weights=weights)
        return task.loss(lambda params: {}, {}, {}, {"part": {name: ()}}, None, train)

    found = loss("count", count=8.0)
    assert (found.total, found.weight) == (40.0, 4.0) and found.metrics["loss"] == (40.0, 4.0)
    assert found.metrics["count_loss"] == (5.0, 4.0)
    assert loss("tone", count=8.0).total == 5.0 and loss("count").total == 5.0
    assert loss("count", train=False, count=8.0).metrics["loss"] == (5.0, 4.0)


def test_bad_input(sources):
    with says('data.parts is empty: give each part a name and a section, {"a": {"source": "jsonl:..."}}.'):
        mixture.make(parts={})
    with says("config: unknown key 'data.parts.tone.labl' (=1). Did you mean 'label'?"):
        mixture.make(parts={"tone": {**parts(sources)["tone"], "labl": 1}})
    with says(
        "data.parts.count and data.parts.tone have tokenizers of their own; name one that is made already: run:FOLDER,"
        " file:PATH or sentencepiece:PATH."
    ):
        made(sources, tokenizer="bpe:300")
    with says("evals: there is no split 'tune/valid' in the mixture. Did you mean 'tone/validation'?"):
        made(sources).evals("tune/valid", None)

    def built(**changes):
        section = {"name": "mixture", "parts": parts(sources), "tokenizer": "bytes", "seq_len": 32, "batch_size": 8}
        tasks = {"tone": {"name": "classification"}, "count": {"name": "regression"}}
        model = {"name": "bert", "variant": "mini", "layers": 1, "width": 32, "heads": 2, "outputs": ("classes",)}
        raw = {"model": model, "data": section, "task": {"name": "mixture", "tasks": tasks}, "train": {"steps": 200}}
        for key, value in changes.items():
            raw[key] = {k: v for k, v in {**raw.get(key, {}), **value}.items() if v is not None}
        return build(configs.resolve(raw))

    with says("config: unknown key 'task.tasks.tone.label_smooth' (=0.1). Did you mean 'label_smoothing'?"):
        built(task={"tasks": {"tone": {"name": "classification", "label_smooth": 0.1}}})
    with says("task.tasks.tune: no part of the data is for it. Did you mean 'tone'? See data.parts."):
        built(task={"tasks": {name: {"name": "classification"} for name in ("tone", "count", "tune")}})
    long = {**parts(sources)["count"], "seq_len": 513}
    with says("data.parts.count.seq_len=513 is longer than model.max_len=512."):
        built(data={"parts": {**parts(sources), "count": long}}, model={"max_len": 512})
    with says(
        "mesh.context=2 splits sequences of one length, and data.name='mixture' has rows of many. Use mesh.fsdp."
    ):
        built(mesh={"context": 2})
    with says("data.parts.count has no task. Valid: tone. See task.tasks."):
        built(task={"tasks": {"tone": {"name": "classification"}}})
    for task in ({"name": "classification"}, {"name": "distillation", "task": {"name": "regression"}}):
        with says(
            f"model.outputs=('classes',): each part of the data has a head of its own, and task.name={task.get('task', task)['name']!r} is"
            " one task. Set task.name='mixture', and each part's task in task.tasks."
        ):
            built(task={"tasks": None, **task})
    # Before training, and not at the first batch of that part.
    with pytest.raises(
        UserError, match=r"^task\.name=classification wants classes, and this data's targets are numbers: try"
    ):
        built(task={"tasks": {name: {"name": "classification"} for name in ("tone", "count")}})
    with says("task.weights.tune: there is no such task. Did you mean 'tone'?"):
        built(task={"weights": {"tune": 2.0}})
    with says(
        "task.tasks.tone and task.tasks.count both mark spans, and a model has one head for them. Make one part of their data."
    ):
        built(task={"tasks": {name: {"name": "span_extraction"} for name in ("tone", "count")}})
    with says("model.classes={'tone': 2}: the data has {'tone': 2, 'count': 1}. Set these, or leave it out."):
        built(model={"classes": {"tone": 2}})


def test_a_mixture_is_distilled(sources, tmp_path):
    """The weighted loss of a batch's part and, by hand, what that part's two heads say."""
    trunk = {"name": "bert", "width": 16, "heads": 2, "max_len": 32, "outputs": ("classes",)}
    data = {"name": "mixture", "tokenizer": "bytes", "seq_len": 32, "batch_size": 8}
    tasks = {"tone": {"name": "classification"}, "count": {"name": "regression"}}
    mixed, folder = {"name": "mixture", "tasks": tasks, "weights": {"count": 3.0}}, tmp_path / "teacher"

    def built(layers, task, **files):
        told = {part: {**section, "predictions": files.get(part)} for part, section in parts(sources).items()}
        section = {"model": {**trunk, "layers": layers}, "data": {**data, "parts": told}, "task": task,
                   "train": {"steps": 200}}  # fmt: skip
        made = build(configs.resolve(section))
        return made, jax.jit(made.model.init)(jax.random.key(layers), jnp.zeros((1, 8), jnp.int32))["params"]

    teacher, told = built(2, mixed)
    rundir.begin(folder, teacher.config, teacher.data.tokenizer)
    heat = {"name": "distillation", "teacher": str(folder), "temperature": 2.5, "soft_weight": 0.3}
    student, params = built(1, {**heat, "task": mixed})
    turns = [student.data.train.turn(step)[0] for step in range(100)]
    for part in tasks:
        batch = student.data.train.batch_at(turns.index(part))
        apply, extra = bind(student.model, {}), {"inner": {}, "teacher": told}
        out = jax.jit(lambda b: student.task.loss(apply, params, extra, b, None, True))(batch)  # noqa: B023
        hard = jax.jit(lambda b: teacher.task.loss(apply, params, {}, b, None, True))(batch)  # noqa: B023
        logits = [bind(made.model, {})(of, **batch["inputs"], train=False)["logits"][part]
                  for made, of in ((teacher, told), (student, params))]  # fmt: skip
        soft = float(jnp.sum(divergence(*logits, 2.5) * batch["weights"]))
        assert soft > 0
        assert float(out.total) == pytest.approx(0.7 * float(hard.total) + 0.3 * 2.5**2 * soft, rel=1e-5)
        assert f"{part}_loss" in out.metrics and float(out.metrics["soft_loss"][0]) == pytest.approx(soft, rel=1e-5)
    with says(
        "task.tasks.tone.name='distillation' has a teacher or a memory, which a part of a mixture cannot. A teacher may be"
        " that of all: task.name='distillation' around task.task.name='mixture'."
    ):
        built(1, {"name": "mixture", "tasks": {**tasks, "tone": {**heat, "task": tasks["tone"]}}})
    # One head's classes would be learnt as those of each part that has as many.
    single = build(configs.resolve({"model": {**trunk, "layers": 2}, "task": tasks["tone"], "train": {"steps": 200},
                                    "data": {**data, **parts(sources)["tone"], "name": "examples"}}))  # fmt: skip
    rundir.begin(tmp_path / "single", single.config, single.data.tokenizer)
    # Raised where it is traced, which adds a line to it.
    with pytest.raises(
        UserError, match="single' has one head for all parts, and here each part has its own: take a teacher of the"
    ):
        built(1, {**heat, "teacher": str(tmp_path / "single"), "task": mixed})
    teacher.config["data"]["parts"]["tone"]["names"] = ["good", "bad"]
    rundir.begin(folder, teacher.config, None)
    with says(
        f"task.teacher={str(folder)!r} has data.parts.tone.names=['good', 'bad'], and here it is ['bad', 'good']: set data.parts.tone.names in"
        " the teacher's order."
    ):
        built(1, {**heat, "task": mixed})
    # What a teacher has said beforehand must be there for all parts, or for none, found before any of it is read.
    beforehand, files = {"name": "distillation", "task": mixed}, {}
    with says(
        "data.parts.tone.predictions is not set, and data.parts.count.predictions is: a student learns every part from a"
        " teacher. Set it for all parts, or task.teacher=RUN instead."
    ):
        built(1, beforehand, count="nothing.npy")
    with says("task.teacher and data.parts.count.predictions are both set: a student learns from one of them."):
        built(1, {**heat, "task": mixed}, count="nothing.npy")
    for part, shape in (("tone", (300, 2)), ("count", (100, 1))):
        files[part] = str(tmp_path / f"{part}.npy")
        np.save(files[part], np.ones(shape))
    own = built(1, beforehand, **files)[0].data.train
    assert {own.batch_at(turns.index(part))["teacher"].shape for part in tasks} == {(8, 2), (8, 1)}


@pytest.mark.journey
def test_questions_and_classes_on_one_trunk(sources, tmp_path):
    """Each part is scored by the evaluator of its kind."""
    rows = [{"question": "a b", "context": "p x q", "answers": {"text": ["x"], "answer_start": [2]}}] * 20
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"name": "questions", "source": f"jsonl:{tmp_path}/*.jsonl", "overlap": 2, "longest_question": 6}
    config = {
        "model": {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 64, "outputs": ("classes", "span")},
        "task": {"name": "mixture", "tasks": {"tone": {"name": "classification"}, "ask": {"name": "span_extraction"}}},
        "data": {"name": "mixture", "parts": {"tone": parts(sources)["tone"], "ask": asked}, "tokenizer": "bytes",
                 "seq_len": 32, "batch_size": 8},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 80},
        "evals": {"tone": {"split": "tone/validation"}, "ask": {"name": "squad", "split": "ask/validation"}},
        "log": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    result = train(configs.resolve(config), tmp_path / "run").result
    assert result["eval/ask/questions"] == 20 and 0 <= result["eval/tone/accuracy"] <= 1
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["parts"]
    assert kept["tone"]["names"] == ["bad", "good"] and "names" not in kept["ask"]
    made = {}
    for part, key in (("tone", "label"), ("ask", "answer")):
        to = tmp_path / "run" / f"{part}.jsonl"
        assert predict.main([f"--run={tmp_path}/run", f"--split={part}/validation", f"--to={to}"]) == 0
        made[part] = [json.loads(line)[key] for line in to.read_text().splitlines()]
    wanted = [json.loads(line)["label"] for line in (sources / "tone" / "valid.jsonl").read_text().splitlines()]
    right = np.mean([a == b for a, b in zip(made["tone"], wanted, strict=True)])
    assert right == pytest.approx(result["eval/tone/accuracy"])
    # Another order would be another score.
    assert np.mean([a == b for a, b in zip(made["tone"], wanted[::-1], strict=True)]) < right - 0.2
    right = [normal(answer) == "x" for answer in made["ask"]]
    assert len(right) == 20 and 100 * np.mean(right) == pytest.approx(result["eval/ask/exact_match"])
    config["task"]["tasks"]["ask"] = {"name": "classification"}
    del config["evals"]["ask"]
    with pytest.raises(UserError, match="This model gives no class: it returns"):
        train(configs.resolve(config), tmp_path / "other")


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """Words with tags that they decide: `x` and what follows it is a thing."""
    folder, draw = tmp_path_factory.mktemp("tagged"), np.random.default_rng(1)
    for split, count in {"train": 100, "valid": 20}.items():
        rows = []
        for _ in range(count):
            words = draw.choice(["a", "b", "x"], 8).tolist()
            words = [w if i == 0 or words[i - 1] != "x" else "c" for i, w in enumerate(words)]
            tags = [{"x": "B-THING", "c": "I-THING"}.get(w, "O") for w in words]
            rows.append({"words": words, "tags": tags})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "tags", "source": f"jsonl:{folder}/*.jsonl"}


def of_tags(sources, tagged, **changes):
    """The config of a mixture of classes, a number and tags."""
    asked = {"tone": "classification", "count": "regression", "thing": "token_prediction"}
    config = {
        "model": {"name": "bert", "layers": 1, "width": 16, "heads": 2, "max_len": 64, "outputs": ("classes", "tags")},
        "task": {"name": "mixture", "tasks": {part: {"name": name} for part, name in asked.items()}},
        "data": {"name": "mixture", "parts": {**parts(sources), "thing": tagged}, "tokenizer": "bytes", "seq_len": 32,
                 "batch_size": 8},
        "train": {"steps": 300},
    }  # fmt: skip
    return config | changes


def test_a_parts_head_is_that_of_a_model_of_its_own(sources, tagged):
    """Tags, classes and a number on one trunk: each loss is the one of a model with that head alone."""
    mixed = build(configs.resolve(of_tags(sources, tagged)))
    params = mixed.model.init(jax.random.key(0), **mixed.model.example())["params"]
    assert {name for name in params if "head" in name} == {"class_head_tone", "class_head_count", "class_head_thing"}
    for part, output in (("tone", "classes"), ("count", "classes"), ("thing", "tags")):
        section = {**mixed.config["data"]["parts"][part], "tokenizer": "bytes", "seq_len": 32, "batch_size": 8}
        alone = build(
            configs.resolve(
                {
                    "model": {**mixed.config["model"], "outputs": (output,), "classes": None},
                    "task": mixed.config["task"]["tasks"][part],
                    "data": section,
                    "train": {"steps": 300},
                }
            )
        )
        its = {name: x for name, x in params.items() if "head" not in name and (output != "tags" or name != "pooler")}
        its["class_head"] = params[f"class_head_{part}"]
        losses = []
        for made, weights, split in ((alone, its, "validation"), (mixed, params, f"{part}/validation")):
            apply, batch = bind(made.model, {}), made.data.evals(split, 8).batch_at(0)
            losses.append(made.task.loss(apply, weights, {}, batch, None, False).metrics)
        jax.tree.map(np.testing.assert_array_equal, losses[0], losses[1])
        assert float(losses[0]["loss"][0]) > 0


def test_evaluators_say_before_training_what_they_give(sources, tagged, tmp_path):
    """And what they cannot."""
    pytest.importorskip("sklearn")
    pytest.importorskip("seqeval")
    rows = [{"question": "a b", "context": "p x q", "answers": {"text": ["x"], "answer_start": [2]}}] * 8
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = of_tags(sources, tagged)
    config["model"]["outputs"] += ("span",)
    config["task"]["tasks"]["ask"] = {"name": "span_extraction"}
    config["data"]["parts"]["ask"] = {"name": "questions", "source": f"jsonl:{tmp_path}/*.jsonl", "overlap": 2,
                                      "longest_question": 6}  # fmt: skip
    evals = {
        "tone": {"name": "scores", "split": "tone/validation", "metrics": ("accuracy", "macro_f1")},
        "count": {"split": "count/validation"},
        "thing": {"name": "entities", "split": "thing/validation"},
        "ask": {"name": "squad", "split": "ask/validation"},
    }
    built = build(configs.resolve(config | {"evals": evals}), devices=ONE)
    with jax.set_mesh(built.layout.mesh):
        state = built.fresh_state()
        for evaluate in built.evaluators().values():
            assert {*evaluate.gives(built.abstract_state())} == evaluate(state).keys()
    evals["tone"]["split"] = "thing/validation"
    with pytest.raises(UserError, match=r"^The task of 'thing' has no 'predict'\. Valid: next_token\."):
        train(configs.resolve(config | {"evals": evals}), tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run" / "config.json").exists()


def test_heads_of_the_wrong_kind(sources, tagged):
    for outputs, message in (
        (("classes",), "This model predicts no tokens: it returns"),
        (("tags",), "gives no class"),
    ):
        config = of_tags(sources, tagged)
        config["model"]["outputs"] = outputs
        with pytest.raises(UserError, match=message):
            build(configs.resolve(config))
    with says(
        "model.outputs=('classes', 'tags'): both 'classes' and 'tags' would be the logits. Give one. Both are for a mixture of"
        " tasks, whose heads have names (model.classes)."
    ):
        build_model(configs.resolve(config)["model"] | {"outputs": ("classes", "tags"), "classes": 3})


@pytest.mark.journey
def test_tags_and_classes_on_one_trunk(sources, tagged, tmp_path):
    """Entities are found and classes told by one model, which says its tags to `predict` as well."""
    pytest.importorskip("seqeval")
    config = of_tags(
        sources,
        tagged,
        optim={"lr": 1e-2, "warmup_steps": 10},
        evals={
            "tone": {"split": "tone/validation"},
            "thing": {"name": "entities", "split": "thing/validation"},
        },
        log={"every": 50, "tensorboard": False},
    )
    result = train(configs.resolve(config), tmp_path / "run").result
    assert result["eval/thing/f1"] > 0.95 and result["eval/thing/sentences"] == 20
    to = tmp_path / "tags.jsonl"
    assert predict.main([f"--run={tmp_path}/run", "--split=thing/validation", f"--to={to}"]) == 0
    said = [json.loads(line)["tags"] for line in to.read_text().splitlines()]
    assert len(said) == 20 and {len(tags) for tags in said} == {8}

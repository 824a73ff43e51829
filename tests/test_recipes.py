"""Recipes on files of the user's, from the command line: their smoke form on a made-up task that can be learnt."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import evaluate, predict, results
from experiments import train as train_command
from experiments.reproduce import recipe
from experiments.reproduce.goals import check
from experiments.reproduce.record import origin
from tests.errors import says
from tests.test_configs import FOLDER, NAMES
from tfm_jax import config as configs
from tfm_jax.data.tokenizers import load_tokenizer
from tfm_jax.errors import UserError
from tfm_jax.train import rundir
from tfm_jax.train.build import build
from tfm_jax.train.restore import with_donors

GOOD, BAD = ["bright", "warm", "fine", "sweet"], ["dull", "cold", "flat", "sour"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Sentences whose class is that of one word in them."""
    folder, draw = tmp_path_factory.mktemp("reviews"), np.random.default_rng(0)
    for name, count in (("train", 600), ("valid", 60)):
        rows = []
        for _ in range(count):
            label = int(draw.integers(2))
            words = list(draw.choice(["a", "film", "the", "plot", "and", "cast"], draw.integers(2, 12)))
            words.insert(int(draw.integers(len(words) + 1)), str(draw.choice((BAD, GOOD)[label])))
            rows.append({"text": " ".join(words), "label": ("bad", "good")[label]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}/*.jsonl"


def trained_here(arguments):
    """The recipe's command, whose runs are of this process: another Python takes longer to start than to train them."""

    def run(command, **_):
        assert command[1:3] == ["-m", "experiments.train"]
        return SimpleNamespace(returncode=train_command.main(command[3:]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
        return recipe.main(arguments)


@pytest.fixture(scope="module")
def common(reviews, tmp_path_factory):
    """The folder of the recipes' runs and figures, and what they are told."""
    base = tmp_path_factory.mktemp("recipes")
    return base, [
        "--metric", "eval/validation/accuracy", "eval/validation/loss", "--at-least=0.95", f"--config.data.source={reviews}", "--json",
        "--config.log.tensorboard=False", f"--workdir={base}", f"--results={base}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(common):
    """The smoke form by the recipe's command, as it is."""
    base, told = common
    return base, recipe.main([f"--config={FOLDER}/minilm_sst2.py:smoke", *told])


def test_a_class_is_learnt_and_the_figure_written(trained):
    base, code = trained
    assert code == 0
    record = json.loads((base / "minilm_sst2-smoke.json").read_text())
    assert record["figures"]["mean"] >= 0.95 and record["config"]["file"].endswith("minilm_sst2.py:smoke")
    assert set(record["figures"]["by_seed"]) == {"0"} and record["revision"]
    assert set(record["figures"]["also"]) == {"eval/validation/loss"}
    result = json.loads((base / "minilm_sst2-smoke-0" / "result.json").read_text())
    assert {key: record[key] for key in ("revision", "machine", "versions")} == {
        "revision": result["revision"], "machine": rundir.machine(), "versions": rundir.versions()
    }  # fmt: skip


def test_figures_are_of_the_evaluators_that_the_run_had(common, trained, tmp_path):
    (base, told), config = common, f"--config={FOLDER}/minilm_sst2.py:smoke"
    with says(
        f"{base}/minilm_sst2-smoke-0 has finished with evals.validation.max_batches=None, and now it is 2: move the run away, or"
        " name another --workdir."
    ):
        recipe.main([config, *told, f"--results={tmp_path}", "--config.evals.validation.max_batches=2"])


def test_a_run_gives_its_picture(common, trained, tmp_path, monkeypatch):
    (base, told), load = common, configs.load_module

    def loaded(spec):
        module, arguments = load(spec)
        module.RECIPES["smoke"] = {"metrics": ("eval/validation/loss",), "picture": "loss.png"}
        return module, arguments

    monkeypatch.setattr(configs, "load_module", loaded)
    assert trained_here([f"--config={FOLDER}/minilm_sst2.py:smoke", *told, f"--results={tmp_path}"]) == 0
    picture = base / "minilm_sst2-smoke-0" / "plots" / "loss.png"
    assert (tmp_path / "minilm_sst2-smoke.png").read_bytes() == picture.read_bytes()


def test_older_runs_say_that_they_recorded_less():
    runs = [{"date": "2026-01-01", "machine": "a", "versions": {"jax": "1"}}, {"date": "2026-01-02"}]
    assert origin(runs) == {
        "revision": "not recorded", "date": "2026-01-01, 2026-01-02", "machine": "a, not recorded", "versions": {"jax": "1, not recorded"}
    }  # fmt: skip


def test_a_student_learns_from_the_trained_run(reviews, trained):
    base, _ = trained
    teacher = base / "minilm_sst2-smoke-0"
    code = trained_here(
        [f"--config={FOLDER}/distil_sst2.py:smoke", "--metric", "eval/validation/accuracy", "--at-least=0.95",
         f"--config.data.source={reviews}", f"--config.data.tokenizer=run:{teacher}", f"--config.task.teacher={teacher}",
         "--config.log.tensorboard=False", f"--workdir={base}", f"--results={base}"]
    )  # fmt: skip
    lines = [json.loads(line) for line in (base / "distil_sst2-smoke-0" / "metrics.jsonl").read_text().splitlines()]
    matched = [line["train/hidden_loss"] for line in lines if "train/hidden_loss" in line]
    assert code == 0 and matched[-1] < matched[0]


def test_a_teacher_that_has_spoken_beforehand(reviews, trained, tmp_path):
    """Its logits are those of the run, in the order of the records, and a student without it hears the same."""
    base, _ = trained
    teacher, file = base / "minilm_sst2-smoke-0", tmp_path / "told.npy"
    assert predict.main([f"--run={teacher}", "--split=train", f"--to={file}"]) == 0
    config = configs.resolve(
        configs.load(f"{FOLDER}/distil_sst2.py:smoke"),
        [("data.source", reviews), ("data.tokenizer", f"run:{teacher}"), ("task.teacher", str(teacher)),
         ("task.hidden", "()")],
    )  # fmt: skip
    apart = configs.resolve(config, [("task.teacher", "None"), ("data.predictions", str(file))])
    losses = []
    for section in (config, apart):
        built = build(section)
        with jax.set_mesh(built.layout.mesh):
            state = with_donors(built.fresh_state(), built.task.donors)
            _, metrics = built.jitted_step()(state, built.batch(0))
        losses.append(float(metrics["soft_loss"][0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] > 0
    # What it has said is to learn from: what has learnt needs it no more, and may label other texts.
    assert built.data.told and built.data.fingerprint == build(apart, for_training=False).data.fingerprint
    gone = configs.resolve(
        apart, [("data.predictions", str(tmp_path / "gone.npy")), ("data.source", reviews.replace("*", "valid"))]
    )
    assert build(gone, for_training=False).data.evals("validation", 8).batch_at(0)["weights"].sum() > 0
    with says(
        f"data.predictions='{file}' is of the classes ['bad', 'good'], as told.about.json says, and here they are ['good', 'bad']:"
        " set data.names in the teacher's order."
    ):
        build(configs.resolve(apart, [("data.names", "('good', 'bad')")]))
    # The same texts in another order: each would be told what another one is.
    lines, turned = (
        Path(reviews.removeprefix("jsonl:").replace("*", "train")).read_text().splitlines(),
        tmp_path / "data",
    )
    turned.mkdir()
    (turned / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    (turned / "valid.jsonl").write_text("\n".join(lines[:60]) + "\n")
    with says(
        f"data.predictions='{file}' is of other texts, or of these in another order, as told.about.json says: make it of this data's train split."
    ):
        build(configs.resolve(apart, [("data.source", f"jsonl:{turned}/*.jsonl")]))
    # Of the examples that a run learns from, and not of others that it is evaluated by.
    elsewhere = {"name": "loss", "split": "train", "data": {"source": reviews.replace("*", "valid"), "split": "all"}}
    other = build(configs.resolve({**apart, "evals": {"other": elsewhere}})).evaluation_data("other")
    assert other.facts["train"]["examples"] == 60 and "teacher" not in other.train.batch_at(0)
    with says(f"data.predictions='{file}' is (600, 2), and the train split has 60 examples."):
        build(configs.resolve(apart, [("data.source", reviews.replace("*", "valid")), ("data.split", "all")]))
    with says("task.teacher and data.predictions are both set: a student learns from one of them."):
        build(configs.resolve(config, [("data.predictions", str(file))]))
    alone = configs.load(f"{FOLDER}/minilm_sst2.py:smoke")
    with says(
        "data.predictions is what a teacher has said, which task.name='classification' does not read. Set"
        " task.name='distillation', or leave it out."
    ):
        build(configs.resolve(alone, [("data.source", reviews), ("data.predictions", str(file))]))
    with says("task.hidden and task.attention need the teacher itself: task.teacher=RUN."):
        build(configs.resolve(apart, [("task.hidden", "((1, 1),)")]))


def test_predictions_of_texts_without_labels(reviews, trained, tmp_path):
    """Those of the same texts with their labels, in the file's order."""
    base, _ = trained
    labelled, new = reviews.removeprefix("jsonl:").replace("*", "valid"), tmp_path / "new.jsonl"
    with open(labelled) as rows:
        new.write_text("".join(json.dumps({"text": json.loads(row)["text"]}) + "\n" for row in rows))
    found = {}
    for source, more in ((labelled, []), (new, ["--config.data.label=None"])):
        to = tmp_path / "logits.npy"
        command = [f"--run={base}/minilm_sst2-smoke-0", f"--to={to}", f"--config.data.source=jsonl:{source}"]
        assert predict.main([*command, "--config.data.split=all", *more]) == 0
        found[source] = np.load(to)
    assert found[new].shape == (60, 2)
    np.testing.assert_allclose(found[new], found[labelled], atol=1e-6)
    assert predict.main([*command, "--config.data.split=all", *more, f"--to={tmp_path}/labels.jsonl"]) == 0
    with open(labelled) as rows, open(tmp_path / "labels.jsonl") as labels:
        same = [json.loads(a)["label"] == json.loads(b)["label"] for a, b in zip(rows, labels, strict=True)]
    assert np.mean(same) >= 0.95
    # What other data fills in is not what the run has learnt.
    unnamed = [
        command[0],
        f"--config.data.source=jsonl:{labelled}",
        "--config.data.split=all",
        "--config.data.names=None",
    ]
    assert predict.main([*unnamed, f"--to={tmp_path}/numbers.jsonl"]) == 0
    numbers = [json.loads(line)["label"] for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    assert numbers == np.load(to).argmax(axis=1).tolist()
    # An older run has kept none: they are those of its own data.
    old = tmp_path / "old"
    shutil.copytree(base / "minilm_sst2-smoke-0", old)
    config = json.loads((old / "config.json").read_text())
    del config["data"]["names"]
    (old / "config.json").write_text(json.dumps(config))
    assert predict.main([f"--run={old}", f"--to={tmp_path}/again.jsonl"]) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "labels.jsonl").read_text()
    assert predict._named(np.eye(2), ["bad", "good"]) == [{"label": "bad"}, {"label": "good"}]
    assert predict._named(np.eye(3), ["bad", "good"]) == [{"label": i} for i in range(3)]
    with pytest.raises(UserError, match=r"This data has no labels to train or to score by: data\.label=None"):
        evaluate.main(["--run", f"{base}/minilm_sst2-smoke-0", f"--config.data.source=jsonl:{new}", "--config.data.split=all",
                       "--config.data.label=None"])  # fmt: skip


@pytest.mark.parametrize("name", ["bert_books", "t5_books", "lm_wikitext2"])
def test_language_models_of_the_recipes(corpus, tmp_path, name):
    code = trained_here([f"--config={FOLDER}/{name}.py:smoke", "--metric", "eval/validation/loss", f"--workdir={tmp_path}",
                        f"--config.data.source=text:{corpus}/*.txt", f"--results={tmp_path}",
                        "--config.log.tensorboard=False"])  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / f"{name}-smoke-0" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/validation/loss"] for line in lines if "eval/validation/loss" in line]
    assert code == 0 and losses[-1] < losses[0]


def test_summaries_of_the_recipe(tmp_path):
    row = {"source": "the whale swims in the sea", "target": "a whale", "references": ["sea", "a whale"]}
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 12)
    code = trained_here([f"--config={FOLDER}/scitldr.py:smoke", "--metric", "eval/test/rouge1", f"--workdir={tmp_path}", "--at-least=99",
                        f"--config.data.source=jsonl:{tmp_path}/*.jsonl", f"--results={tmp_path}",
                        "--config.log.tensorboard=False"])  # fmt: skip
    assert code == 0


@pytest.mark.journey
@pytest.mark.parametrize("first", ["bert_books", "t5_books"])
def test_pretraining_and_what_it_is_for(corpus, tmp_path, first):
    """With the ids that pretraining has added; and it goes on when the donor is gone."""
    common = [f"--workdir={tmp_path}", f"--results={tmp_path}", "--config.log.tensorboard=False"]
    assert recipe.main([f"--config={FOLDER}/{first}.py:smoke", "--metric=eval/validation/loss", *common,
                        f"--config.data.source=text:{corpus}/*.txt", "--config.train.steps=2"]) == 0  # fmt: skip
    bert, donor = first == "bert_books", tmp_path / f"{first}-smoke-0"
    row = {"text": "the whale sees 3", "label": "a"} if bert else {"source": "the whale sees", "target": "a whale"}
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 40)
    second, metric = ("small_bert", "accuracy") if bert else ("scitldr", "rouge1")
    command = [f"--config={FOLDER}/{second}.py:smoke", f"--metric=eval/test/{metric}", *common, "--config.train.steps=2",
               "--config.optim.warmup_steps=1", f"--config.data.tokenizer=run:{donor}", "--config.train.eval_every=0",
               f"--config.data.source=jsonl:{tmp_path}/*.jsonl", f"--config.checkpoint.init_from={donor}",
               *(["--config.model.max_len=32", "--config.data.seq_len=32"] if bert else ["--config.data.references=target"])]  # fmt: skip
    assert recipe.main(command) == 0
    sizes = [rundir.read_config(tmp_path / f"{n}-smoke-0")["model"]["vocab_size"] for n in (first, second)]
    assert sizes[0] == sizes[1] > load_tokenizer(donor / "tokenizer").vocab_size
    if not bert:
        # A field that is missing is missed before training.
        with pytest.raises(SystemExit, match="2"):
            recipe.main([*command, "--seeds=1", "--config.data.references=summaries"])
        assert not (tmp_path / "scitldr-smoke-1" / "metrics.jsonl").is_file()


def test_the_small_bert_of_the_recipe(reviews, trained):
    base, _ = trained
    code = trained_here([f"--config={FOLDER}/small_bert.py:smoke", "--metric", "eval/test/accuracy", "--at-least=0.9",
                        f"--workdir={base}", f"--config.data.source={reviews}", f"--results={base}",
                        f"--config.data.tokenizer=run:{base}/minilm_sst2-smoke-0",
                        "--config.log.tensorboard=False"])  # fmt: skip
    assert code == 0


def test_embeddings_find_their_partners(tmp_path):
    """Sentences and themselves without a few words, by nothing but their company in the batch."""
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    for name, count in (("train", 400), ("valid", 48)):
        rows = []
        for _ in range(count):
            text = draw.choice(words, 8, replace=False)
            rows.append({"text": " ".join(text), "pair": " ".join(draw.permutation(text)[:6])})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = trained_here([f"--config={FOLDER}/embed_stsb.py:smoke", "--metric", "eval/validation/accuracy", "--at-least=0.8",
                        f"--workdir={tmp_path}", f"--config.data.source=jsonl:{tmp_path}/*.jsonl", f"--results={tmp_path}",
                        "--config.log.tensorboard=False"])  # fmt: skip
    assert code == 0


def test_the_table_is_drawn_from_the_files(trained, tmp_path):
    base, _ = trained
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- results -->\nold\n<!-- /results -->\nB\n")
    assert results.main([f"--results={base}", f"--readme={readme}"]) == 0
    first, header, line, *rows, last, _ = readme.read_text().splitlines()[1:]
    assert (first, last) == ("<!-- results -->", "<!-- /results -->") and line.count("---") == header.count(
        "|"
    ) - 1 == 8
    (row,) = (row for row in rows if row.startswith("| minilm_sst2-smoke "))
    figure = json.loads((base / "minilm_sst2-smoke.json").read_text())["figures"]
    assert f"**{figure['mean']:.4g}**" in row and "at least 0.95" in row and "VARIANT=smoke" in row
    readme.write_text("no table")
    with says(f"--readme={readme} has no lines <!-- results --> and <!-- /results -->."):
        results.main([f"--results={base}", f"--readme={readme}"])


def test_recipes_say_what_they_want(tmp_path):
    with says(f"--config={FOLDER}/gpt_stdlib.py:smoke says no figure in RECIPES. Or give --metric."):
        recipe.main([f"--config={FOLDER}/gpt_stdlib.py:smoke"])
    small = f"{FOLDER}/small_bert.py"
    names = ", ".join(f"{small}:{name}" for name in ("sst2", "sst2_scratch", "cola", "cola_scratch"))
    with says(f"--config={small} says no figure in RECIPES. Its recipes are {names}. Or give --metric."):
        recipe.main([f"--config={small}"])
    with says(
        "--config.train.steps=3: runs/ and results/ are the recipe's as it is. Name folders for others: --workdir=FOLDER --results=FOLDER."
    ):
        recipe.main([f"--config={FOLDER}/bert_books.py", "--config.train.steps=3"])
    (tmp_path / "data").mkdir()
    with says(f"--data={tmp_path}/dta: there is no such folder. Did you mean 'data'?"):
        recipe.main([f"--config={FOLDER}/bert_books.py", f"--data={tmp_path}/dta"])
    with says(f"{FOLDER}/scitldr.py starts from runs/t5_books-0: finish `make reproduce-t5_books` (seed 0) first."):
        recipe.main([f"--config={FOLDER}/scitldr.py"])
    with says(f"--model=there: {FOLDER}/bert_books.py starts from no imported model."):
        recipe.main([f"--config={FOLDER}/bert_books.py", "--model=there"])
    for name in NAMES:
        module, _ = configs.load_module(f"{FOLDER}/{name}.py")
        for arguments, found in getattr(module, "RECIPES", {}).items():
            assert set(found) <= set(recipe.Recipe.__annotations__), name
            evaluators = configs.resolve(configs.load(f"{FOLDER}/{name}.py:{arguments}"))["evals"]
            for _, split, metric in (x.split("/") for x in (*found["metrics"], *_goals(found))):
                evaluator = evaluators[split]
                known = _KEYS.get(evaluator["name"]) or evaluator["metrics"]
                assert any(metric == one or metric.startswith(one) for one in known), (name, metric)


_KEYS = {"loss": ("loss", "accuracy", "perplexity", "spearman"), "squad": ("f1", "exact_match")}


def _goals(found):
    return [goal["metric"] for goal in found.get("goals", ()) if "metric" in goal]


def test_results_say_what_their_recipes_say():
    """The table is drawn from `results/`: a text that was changed in a config is there too (the command writes it anew)."""
    folder, seen = FOLDER.parent / "results", 0
    for record in (json.loads(path.read_text()) for path in folder.glob("*.json")):
        if "metric" in record["figures"] and "file" in record["config"]:
            module, arguments = configs.load_module(str(FOLDER.parent / record["config"]["file"]))
            want = json.loads(json.dumps(module.RECIPES[arguments]))
            for key in ("title", "goals", "published", "tried"):
                assert (record["figures"][key] or None) == (want.get(key) or None), (record["name"], key)
            seen += 1
    assert seen > 20


def _figures(mean, deviation=0.0, seeds=1, **also):
    return {
        "metric": "eval/test/a",
        "mean": mean,
        "deviation": deviation,
        "by_seed": dict.fromkeys(range(seeds), mean),
        "also": also,
    }


@pytest.mark.parametrize(("goal", "words", "met"), [
    ({"least": 0.9}, "at least 0.9", False),
    ({"most": 0.9}, "at most 0.9", True),
    ({"metric": "b", "least": 3.0}, "b at least 3", True),
    ({"beside": "other"}, "at least 0.8 (`other`)", True),
    ({"beside": "other", "lower": True}, "at most 0.8 (`other`)", False),
    ({"beside": "other", "plus": -0.01}, "at least 0.79 (`other` less 0.01)", True),
    ({"beside": "other", "times": 1.1}, "at least 0.88 (1.1 times `other`)", False),
    # 0.8 + 2 sqrt(0.03^2 / 4 + 0.04^2 / 4) = 0.85
    ({"beside": "other", "errors": 2.0}, "at least 0.85 (`other` and 2 standard errors)", False),
    ({"beside": "other", "seed": 3, "times": 1.1}, "at least 0.77 (1.1 times `other`, seed 3)", True),
    ({"beside": "other", "seed": 4}, "at least `other`, seed 4, which has no figure yet", None),
    ({"beside": "none"}, "at least `none`, which has no figure yet", None),
])  # fmt: skip
def test_goals(goal, words, met, tmp_path):
    other = _figures(0.8, 0.03, 4)
    other["by_seed"][3] = 0.7
    (tmp_path / "other.json").write_text(json.dumps({"figures": other}))
    assert check(goal, _figures(0.849, 0.04, 4, b=3.5), tmp_path) == (words, met)
    with says("A goal is for eval/test/c, and the recipe's metrics are eval/test/a."):
        check({**goal, "metric": "eval/test/c"}, _figures(1.0), tmp_path)


@pytest.mark.parametrize("variant", ["lora", pytest.param("adalora", marks=pytest.mark.journey)])
def test_adapters_go_on_from_it_and_are_evaluated_like_any_run(common, trained, tmp_path, capsys, variant):
    """The recipe's own, whose patterns mean parameters of the smoke form too."""
    (base, told), (_, first) = common, trained
    adapter = configs.load(f"{FOLDER}/minilm_sst2.py:{variant}").train.adapter.to_dict()
    more = [f"--config.checkpoint.init_from={base}/minilm_sst2-smoke-0", f"--config.train.adapter={adapter}",
            f"--config.data.tokenizer=run:{base}/minilm_sst2-smoke-0"]  # fmt: skip
    # The first one's figures are read by other tests, whichever comes before.
    more += ["--seeds=1", f"--results={tmp_path}", f"--workdir={tmp_path}"]
    assert first == trained_here([f"--config={FOLDER}/minilm_sst2.py:smoke", *told, *more]) == 0
    assert set(json.loads((tmp_path / "minilm_sst2-smoke.json").read_text())["figures"]["by_seed"]) == {"1"}
    run = tmp_path / "minilm_sst2-smoke-1"
    assert rundir.read_config(run)["train"]["adapter"]["name"] == variant
    result = json.loads((run / "result.json").read_text())
    assert evaluate.main([f"--run={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval/validation/loss"] == pytest.approx(result["eval/validation/loss"], rel=1e-6)


def test_a_prediction_that_is_no_number_is_named_by_its_place(monkeypatch):
    """The second batch's first row is the third example."""
    rows = [np.array([[0.1, 0.2], [0.3, 0.4]]), np.array([[np.nan, 1.0], [9.0, 9.0]])]
    weights = [np.array([1.0, 1.0]), np.array([1.0, 0.0])]
    made = [({"weights": w}, {"prediction": row}) for w, row in zip(weights, rows, strict=True)]
    monkeypatch.setattr("tfm_jax.evals.base.predictions", lambda *_: iter(made))
    dataset = SimpleNamespace(places=SimpleNamespace(order=np.array([1, 0, 2])))
    with pytest.raises(UserError, match=r"^The run's prediction for example 2 is not finite: \[nan +1\.\]\.$"):
        predict._rows(None, None, dataset)
    rows[1][0, 0] = 0.5
    np.testing.assert_array_equal(predict._rows(None, None, dataset), [[0.3, 0.4], [0.1, 0.2], [0.5, 1.0]])

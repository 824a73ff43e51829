"""BLEU of a model that has learnt to copy, and of one that has not; the words of the errors."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import predict
from experiments.generate import Loaded
from tests.errors import says
from tests.test_configs import FOLDER
from tfm_jax import config as configs
from tfm_jax.evals import generation
from tfm_jax.evals.base import Context
from tfm_jax.train.build import build
from tfm_jax.train.run import train

pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The smoke form of the recipe of translation: turn digits into words, one by one."""
    folder, draw = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    words = ["nil", "one", "two", "tre"]
    for name, count in (("train", 400), ("valid", 24)):
        rows = [draw.integers(0, 4, draw.integers(4, 6)) for _ in range(count)]
        lines = [{"source": " ".join(map(str, row)), "target": " ".join(words[i] for i in row)} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = [
        ("data.source", f"jsonl:{folder}/*.jsonl"),
        ("evals.test.batch_size", "16"),
        ("log.tensorboard", "False"),
    ]
    return configs.resolve(configs.load(f"{FOLDER}/mt_multi30k.py:smoke"), changes)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The run's directory and result."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, train(config, folder, devices=jax.devices()[:1]).result


def test_what_is_learnt_is_scored(run):
    folder, result = run
    assert result["eval/test/sentences"] == 24
    assert result["eval/validation/accuracy"] > 0.97 and result["eval/test/bleu"] > 90
    # The command frames a source as the data did.
    assert Loaded(folder).likeliest("0 1 2 3", 2, 1.0, 10)[0] == "nil one two tre"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert min(line["eval/test/bleu"] for line in lines if "eval/test/bleu" in line) < 80


def test_what_is_written_to_a_file_is_what_was_scored(config, run, tmp_path, monkeypatch):
    """Line by line that of the source's."""
    import sacrebleu

    (folder, result), to = run, tmp_path / "new" / "made.jsonl"
    asked, search = list[dict[str, float]](), generation.beam_search
    monkeypatch.setattr(generation, "beam_search", lambda *a, **k: (asked.append(k), search(*a, **k))[1])

    def written(*flags):
        assert predict.main([f"--run={folder}", f"--to={to}", *flags]) == 0
        return [json.loads(line)["text"] for line in to.read_text().splitlines()]

    made = written()
    source = Path(config["data"]["source"].removeprefix("jsonl:")).parent / "valid.jsonl"
    wanted = [json.loads(line)["target"] for line in source.read_text().splitlines()]
    assert sacrebleu.corpus_bleu(made, [wanted]).score == pytest.approx(result["eval/test/bleu"])
    # Another order would be another score.
    assert sacrebleu.corpus_bleu(made, [wanted[::-1]]).score < 0.9 * result["eval/test/bleu"]
    # The run's own search, but for what flags say.
    short = written("--beams=1", "--length_penalty=-3.0", "--max_new=2")
    for at, search_of in ((0, (2, 1.0, 10)), (-1, (1, -3.0, 2))):
        assert tuple(asked[at][name] for name in ("beams", "length_penalty", "max_new")) == search_of
    assert all(len(a) < len(b) for a, b in zip(short, made, strict=True))
    with says(f"--to={to.with_suffix('.npy')}: this run predicts no class or number for each example. Name a .jsonl."):
        written(f"--to={to.with_suffix('.npy')}")


def test_the_score_is_sacrebleus_over_the_rows_that_there_are(config, monkeypatch):
    """What is 'made' here is the reference with its first word said twice; rows behind the last example do not count."""
    import sacrebleu

    built = build(config)
    dataset = built.data.evals("validation", 16)
    batches = [dataset.references(step) for step in range(dataset.num_batches)]
    assert [len(texts) for texts in batches] == [16, 8]
    waiting = iter([*batches, batches[1]])

    def twice(text):
        return f"{text.split()[0]} {text}"

    def search(model, params, prompts, *, sources, **_):
        texts = [twice(text) for (text,) in next(waiting)]
        assert len(prompts) == len(sources) == 16
        texts += ["one one one"] * (16 - len(texts))
        ids = built.data.tokenizer.encode_batch(texts)
        return [[type("Hypothesis", (), {"tokens": row.tolist()})] for row in ids]

    monkeypatch.setattr(generation, "beam_search", search)
    context = Context(built.task, built.model, built.layout, built.data, 32)
    state = type("State", (), {"params": {}, "extra": {"ema": {}, "inner": {}}})
    evaluate = generation.make(context, batch_size=16)
    found = evaluate(state)
    assert evaluate.gives(None) == found.keys()
    wanted = [text for texts in batches for (text,) in texts]
    want = sacrebleu.corpus_bleu([twice(text) for text in wanted], [wanted]).score
    assert found["bleu"] == pytest.approx(want) and 50 < want < 99 and found["sentences"] == 24
    # Of one batch of two, sorted by length, the middle of the pass is in the second.
    some = generation.make(context, batch_size=16, max_batches=1)(state)
    assert some["sentences"] == 8
    assert some["bleu"] == pytest.approx(sacrebleu.corpus_bleu([twice(t) for t in wanted[16:]], [wanted[16:]]).score)


def test_bad_input(make_config):
    built = build(make_config())
    context = Context(built.task, built.model, built.layout, built.data, 8)
    with says("evals: generation needs data with reference texts: data.name=pairs."):
        generation.make(context)


def test_a_search_that_cannot_be_is_found_before_training(config):
    built = build(config)
    context = Context(built.task, built.model, built.layout, built.data, 8)
    with says("evals: batch_size=-4: must be at least 1."):
        generation.make(context, batch_size=-4)
    limit = built.model.max_len
    with says(
        f"A prompt of 1 token and max_new={limit} need {limit + 1} positions, but model.max_len={limit}. Ask for at most"
        f" {limit - 1} new tokens, or shorten the prompt."
    ):
        generation.make(context, max_new=limit)
    with says("evals: max_batches=-1: must be at least 1, or None for the whole split."):
        generation.make(context, max_batches=-1)
    with says("beams=0: must be at least 1."):
        generation.make(context, beams=0)


def test_rouge_and_several_references():
    """ROUGE-1 of 2 shared words of 3 and 4 is 4/7; the better reference counts."""
    pytest.importorskip("rouge_score")
    made, wanted = ["the white whale"], [["nothing", "a white whale swims"]]
    found = generation.scored(made, wanted, ("rouge", "bleu"))
    assert found["rouge1"] == pytest.approx(100 * 4 / 7) and found["rouge2"] == pytest.approx(100 * 2 / 5)
    assert found["rougeL"] == pytest.approx(100 * 4 / 7)
    several = [["a b c d e", "x"], ["f g h i j"]]
    assert generation.scored(["a b c d e", "f g h i j"], several, ("bleu",))["bleu"] == pytest.approx(100)


def test_cases_count_unless_they_are_not_to():
    """Four of five words agree with their case, and two of four pairs; without a match, smoothed, 1/6 and 1/8."""
    found = generation.scored(["a b Whale d e"], [["a b whale d e"]], ("bleu", "bleu_lowercase", "chrf"))
    assert found["bleu_lowercase"] == pytest.approx(100) and set(found) == {"bleu", "bleu_lowercase", "chrf"}
    assert found["bleu"] == pytest.approx(100 * (4 / 5 * 2 / 4 * 0.5 / 3 * 0.25 / 2) ** 0.25)

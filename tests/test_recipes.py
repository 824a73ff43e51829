"""Recipes on files of the user's, from the command line: their smoke form on a made-up task that can be learnt."""

import json

import numpy as np
import pytest

from experiments import evaluate
from experiments.reproduce import recipe
from tests.test_configs import FOLDER
from tfm_jax.train import rundir

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


@pytest.fixture(scope="module")
def trained(reviews, tmp_path_factory):
    """The smoke form by the recipe's command, and then low-rank adapters on its end."""
    base = tmp_path_factory.mktemp("recipes")
    common = ["--metric=eval/validation/accuracy", "--at-least=0.95", f"--config.data.source={reviews}", "--json",
              "--config.log.tensorboard=False", f"--workdir={base}", f"--results={base}"]  # fmt: skip
    first = recipe.main([f"--config={FOLDER}/minilm_sst2.py:smoke", *common])
    lora = "{'rank': 4, 'pattern': 'attention/(query|value)/kernel$', 'train': ['class_head/']}"
    more = [f"--config.checkpoint.init_from={base}/minilm_sst2-smoke-0", f"--config.train.adapter={lora}",
            f"--config.data.tokenizer=run:{base}/minilm_sst2-smoke-0"]  # fmt: skip
    second = recipe.main([f"--config={FOLDER}/minilm_sst2.py:smoke", *common, *more, "--seeds=1"])
    return base, first, second


def test_a_class_is_learnt_and_the_figure_written(trained):
    base, first, _ = trained
    assert first == 0
    record = json.loads((base / "minilm_sst2-smoke.json").read_text())
    assert record["figures"]["mean"] >= 0.95 and record["config"]["file"].endswith("minilm_sst2.py:smoke")
    assert set(record["figures"]["by_seed"]) == {"1"} and record["revision"]


def test_adapters_go_on_from_it_and_are_evaluated_like_any_run(trained, capsys):
    base, _, second = trained
    run = base / "minilm_sst2-smoke-1"
    assert second == 0
    assert rundir.read_config(run)["train"]["adapter"]["rank"] == 4
    result = json.loads((run / "result.json").read_text())
    assert evaluate.main([f"--run={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["eval/validation/loss"] == pytest.approx(result["eval/validation/loss"], rel=1e-6)

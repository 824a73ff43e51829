"""Encoder-decoders through the commands: a run of each family's objective, given back and brought in again."""

import json

import jax
import numpy as np
import pytest

from experiments import generate
from experiments.convert import bring_in, give_back
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.train.restore import load_params
from tfm_jax.train.run import train

SHAPE = {"width": 16, "heads": 2, "mlp_width": 24, "encoder_layers": 1, "decoder_layers": 2}
FAMILIES = {
    "encdec": ("continue", SHAPE | {"max_len": 16}),
    "bart": ("denoise", SHAPE | {"max_len": 16}),
    "t5": ("span", SHAPE | {"head_dim": 4, "output": "free", "mlp": "gated", "activation": "gelu_tanh"}),
}


@pytest.mark.journey
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_and_a_journey_there_and_back(name, corpus, tmp_path, capsys):
    objective, model = FAMILIES[name]
    config = {
        "model": {"name": name, **model},
        "data": {
            "source": f"text:{corpus}/*.txt",
            "tokenizer": "bytes",
            "objective": objective,
            "seq_len": 12,
            "batch_size": 8,
        },
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "train": {"steps": 2},
        "evals": {"validation": {"split": "validation", "max_batches": 1}},
        "log": {"tensorboard": False},
    }
    outcome = train(configs.resolve(config), tmp_path / "run")
    assert outcome.status == "finished" and np.isfinite(outcome.result["eval/validation/loss"])

    give_back(tmp_path / "run", tmp_path / "theirs")
    bring_in(tmp_path / "theirs", tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "run")[0], load_params(tmp_path / "again")[0])

    assert generate.sample(tmp_path / "run") == (None, "--prompt 'a text' --beams 4")
    made = [f"--run={tmp_path / 'run'}", "--max_new=5", "--json"]
    with says("An encoder-decoder answers a text: give one with --prompt."):
        generate.main(made)
    for how in (["--beams=2"], ["--temperature=0"], ["--temperature=0", "--no_stream"]):
        assert generate.main([*made, "--prompt=The whale", *how]) == 0
        lines = capsys.readouterr().out.splitlines()
        record = json.loads(lines[-1])
        assert record["tokens"] <= 5 and lines[0] == record["text"].partition("\n")[0]

"""Drawn batches: the same for the same step, in the shapes of the data that they stand for."""

import jax
import numpy as np
import pytest

from tests.errors import says
from tests.test_configs import FOLDER
from tfm_jax import config as configs
from tfm_jax.data.synthetic import in_place_of, make
from tfm_jax.sections import fill, make_named, section_fields
from tfm_jax.train.run import train


def opened(section):
    return make_named("data", fill("data", section, section_fields("data", section)), tokenizer_dir=lambda _: None)


@pytest.mark.parametrize("kind", ["tokens", "pairs", "images"])
def test_batches_are_functions_of_their_step(kind):
    data = make(kind=kind, vocab_size=19, seq_len=7, target_len=5, image_size=6, classes=3, batch_size=8)
    whole = data.train.batch_at(3)
    part, other = data.train.batch_at(3, slice(2, 5)), data.train.batch_at(4)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2:5], y), whole, part)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True))
    if kind == "images":
        images = whole["inputs"]["images"]
        assert images.shape == (8, 6, 6, 3) and -1 <= images.min() < -0.8 and 0.8 < images.max() < 1
        assert set(whole["targets"]) <= {0, 1, 2} and data.sizes == {"classes": 3}
    else:
        tokens = whole["inputs"]["tokens"]
        assert tokens.shape == (8, 7) and tokens.min() >= 0 and tokens.max() < 19 and len(set(tokens.flat)) > 12
        assert whole["targets"].shape == whole["weights"].shape == (8, 7 if kind == "tokens" else 5)


@pytest.mark.parametrize(
    "name", ["gpt_stdlib", "bert_stdlib", "t5_stdlib", "bart_stdlib", "encdec_stdlib", "vit_digits", "moe_stdlib"]
)
def test_the_shapes_are_those_of_the_data_it_stands_for(name):
    config = configs.resolve(configs.load(f"{FOLDER}/{name}.py:smoke"))
    real = opened(config["data"])
    drawn = opened(in_place_of(config["data"], config["model"]))
    shapes = [
        {path: (x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(data.train.batch_at(0))}
        for data in (real, drawn)
    ]
    # What says where a source is padded has no counterpart; its shape is the source's.
    missing = {path for path in shapes[0].keys() - shapes[1].keys() if path[-1].key != "valid"}
    assert not missing and {path: shapes[0][path] for path in shapes[1]} == shapes[1]


def test_a_model_trains_on_it(make_config, tmp_path):
    config = make_config()
    section = {**in_place_of(config["data"], config["model"]), "batch_size": 8}
    changed = configs.resolve({**config, "data": section, "train": {**config["train"], "steps": 3}})
    result = train(changed, tmp_path / "run").result
    assert 5 < result["eval/validation/loss"] < 7


def test_bad_input():
    with says("data.seq_len=0: must be at least 1."):
        make(seq_len=0)
    with says("data.name='examples' has rows of many lengths, so its batches have no one shape to plan for."):
        in_place_of({"name": "examples", "batch_size": 8, "seed": 0}, {})
    section = {"name": "tokens", "batch_size": 8, "seed": 0, "seq_len": 9, "tokenizer": "file:a.json"}
    with says("data.tokenizer='file:a.json' does not say how many pieces it has: set model.vocab_size."):
        in_place_of(section, {"vocab_size": None})
    assert in_place_of(section, {"vocab_size": 50257})["vocab_size"] == 50257

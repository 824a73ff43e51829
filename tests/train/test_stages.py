"""Which models are pipelines on a mesh with stages, what is refused before anything starts, and a run on one."""

import json

import jax
import pytest

from experiments import evaluate
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.parallel import mesh
from tfm_jax.train.check import check
from tfm_jax.train.log import read_metrics
from tfm_jax.train.run import train
from tfm_jax.train.stages import pipeline_of

SCAN = {"model.layer_loop": "scan", "model.layers": 2}
ON_STAGES = SCAN | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.stage": 2}


def found(config):
    return pipeline_of(config, mesh.make(**config["mesh"]))


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, None),
        (ON_STAGES, Pipeline(2, 2)),
        (ON_STAGES | {"data.batch_size": 96}, Pipeline(2, 8)),  # four a stage
        (ON_STAGES | {"data.batch_size": 96, "mesh.microbatches": 12}, Pipeline(2, 12)),
        (ON_STAGES | {"data.batch_size": 96, "train.accum": 4}, Pipeline(2, 6)),
        (ON_STAGES | {"model.layers": 8, "mesh.data": 1, "mesh.fsdp": 1, "mesh.stage": 8}, Pipeline(8, 8)),
    ],
)  # fmt: skip
def test_what_is_chosen(make_config, changes, want):
    assert found(make_config(changes)) == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layer_loop": "loop"}, "mesh.stage=2: model.name='gpt' has layers with parameters of their own. Set"
         " model.layer_loop='scan'."),
        ({"model.layers": 15}, "mesh.stage=2 does not divide model.layers=15. What does: 3, 5, 15."),
        ({"mesh.microbatches": 3}, "mesh.microbatches=3: must be a multiple of mesh.stage=2."),
        ({"mesh.microbatches": 4, "mesh.data": 4, "mesh.stage": 1}, "mesh.microbatches=4 are for a pipeline, and mesh.stage=1 is"
         " none. For accumulation: train.accum."),
        ({"mesh.microbatches": 4}, "mesh.microbatches=4 does not divide the 2 rows that each pipeline has of data.batch_size=8"
         " (train.accum=1, 4 pipelines)."),
        ({"evals.text.name": "generation"}, "mesh.stage=2: model.name='gpt' cannot decode on stages, as evals.text wants."
         " Leave it out, and evaluate the run."),
    ],
)  # fmt: skip
def test_what_is_refused(make_config, changes, message):
    with says(message):
        found(make_config(ON_STAGES | changes))


@pytest.mark.parametrize("name", ["albert", "transformer_xl"])
def test_families_without_layers_to_split(raw_config, name):
    """One block for all layers; a memory of the batch before."""
    section = {"name": name, "layers": 2, "width": 16, "heads": 2, "layer_loop": "scan"}
    config = configs.resolve(raw_config | {"model": section, "mesh": {"stage": 2}})
    with says(
        f"mesh.stage=2: model.name='{name}' is not made of layers that can be on stages. Use mesh.fsdp or mesh.tensor."
    ):
        found(config)


def test_both_sides_of_an_encoder_decoder_are_asked(raw_config):
    sides = {"encoder_layers": 2, "decoder_layers": 3}
    section = {"name": "bart", "width": 16, "heads": 2, "layer_loop": "scan", **sides}
    config = configs.resolve(raw_config | {"model": section, "mesh": {"stage": 2}})
    with says("mesh.stage=2 does not divide model.decoder_layers=3. What does: 3."):
        found(config)


def test_a_run_on_stages_is_evaluated_without_them(make_config, tmp_path, capsys, caplog):
    config = make_config(ON_STAGES | {"train.steps": 3, "log.tensorboard": False})
    with caplog.at_level("INFO", logger="tfm_jax"):
        assert train(config, tmp_path / "run").status == "finished"
    assert "pipeline: 2 stages, 2 microbatches, waiting 33.3 %." in caplog.messages
    lines = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert [line["perf/bubble_frac"] for line in lines] == [1 / 3] * 3
    logged = json.loads((tmp_path / "run" / "result.json").read_text())["eval/validation/loss"]
    assert evaluate.main(["--run", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["eval/validation/loss"] == pytest.approx(logged, rel=1e-5) and jax.device_count() == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.experts": 2, "model.bias": "none", "mesh.data": 1, "mesh.context": 2},
            "mesh.stage=2 with mesh.context=2: a mixture of experts puts a row's tokens in order over `context`, which a pipeline's"
            " stages cannot. Use mesh.expert with one of them.",
        ),
        (
            {"train.quantize": (("mlp/", "int8"),)},
            "mesh.stage=2: products on stages cannot be in 8 bits (train.quantize). Leave one out.",
        ),
    ],
)
def test_what_else_stages_cannot(make_config, changes, message):
    config = make_config(ON_STAGES | changes)
    with says(message):
        check(config, mesh.make(**config["mesh"]))

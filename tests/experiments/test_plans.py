"""The page of plans, from records."""

import json

import jax
import pytest

from experiments.reproduce import plans
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.parallel import search as searching
from tfm_jax.parallel.plan import drawn
from tfm_jax.train.build import build

ONE = {"params": 7e9, "hbm_gib_per_chip": 54.8, "fits": True, "step_seconds": 2.0, "mfu": 0.7, "bottleneck": "compute",
       "compile_seconds": 40.0, "compute_seconds": 1.6, "memory_seconds": 0.5, "model_flops": 3.0, "hardware_flops": 4.0,
       "traffic": [{"axes": ["fsdp"], "network": False, "exposed_seconds": 0.4}]}  # fmt: skip


def test_the_page(tmp_path, capsys):
    """What is there is drawn, not compiled again: its own mesh beside the found one, one that does not fit, a measured one."""
    slower = {**ONE, "step_seconds": 3.0, "mfu": 0.5}
    tried = [{"changes": {}, **slower}, {"changes": {"mesh.data": 4}, **ONE}]
    none_fits = {**ONE, "fits": False, "hbm_gib_per_chip": 120.0}
    figures = {
        "llama_7b_v5p_4x4x4": {**ONE, "tried": tried},
        "llama_7b_v6e_16x16": {**ONE, "tried": [{"changes": {}, **none_fits}, {"changes": {"mesh.data": 2}, **ONE}]},
        "t5_3b_v5e_4x4": {**ONE, "tried": [{"changes": {}, **ONE}]},
        "gpt_stdlib_cpu": {**ONE, "measured_step_seconds": 4.0, "prediction_error": -0.5},
    }
    for name, found in figures.items():
        record = {"figures": found, "config": plans.PODS[name]._asdict()}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert plans.main([*figures, f"--results={tmp_path}", "--json"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["planned"] == sorted(figures)
    rows = {line.split("]")[1].split("|")[0]: line for line in page.splitlines() if line.startswith("| [")}
    assert len(rows) == 4 and "| 3000 ms | 50.0 % | compute | 40 s | `mesh.data=4` | 54.8 | 2000 ms | 70.0 %" in page
    assert page.count("links along fsdp 400; computed again 400") == 3  # which one does not fit is not known
    assert "| 120.0, too much |  |  |  | 40 s | `mesh.data=2` |" in page
    assert page.rstrip().endswith("| 4000 ms, the prediction -50 % |")
    with pytest.raises(UserError, match=r"^'gpt2_v5e' is not planned here\. Did you mean 'gpt2_v5e_2x4'\?"):
        plans.main(["gpt2_v5e"])


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("gpt2", 12 * 1024),
        ("llama_70b", 80 * 4096),
        ("mixtral_8x7b", 32 * 4096),
        ("vit_large", 24 * 197),
        ("t5_3b", 24 * 626),
    ],
)
def test_a_pods_model_can_be_differentiated(name, states):
    """In shapes only, on one chip: of everything computed again, the states between layers at least are kept, in bfloat16."""
    config = drawn(configs.resolve(configs.load(f"configs/pod.py:{name}")))
    experiment = build({**config, "mesh": {**config["mesh"], "fsdp": 1, "expert": 1}}, devices=jax.devices()[:1])
    assert config["task"]["name"] == ("classification" if name == "vit_large" else "token_prediction")
    assert 2 * states * experiment.model.block.width <= searching._kept(experiment) < 8 * 2**30

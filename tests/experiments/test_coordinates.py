"""The coordinate check as a command."""

import json

import jax
import pytest

from experiments import coordinates
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.train.coordinates import at_width, slopes


def test_flat_for_mup_and_not_for_the_standard(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_, found=jax.devices()[:1]: found)
    flags = [f"--config={config_file}", f"--to={tmp_path}", "--steps=3", "--seeds=1", "--json"]
    flags += ["--config.optim.lr=0.01", "--config.model.bias=none"]
    assert coordinates.main([*flags, "--widths", "16", "128"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["slopes"]["mup"]) == set(found["slopes"]["standard"])
    assert {"logits", "stack/block_0/states", "stack/block_0/attention/scores"} <= set(found["slopes"]["mup"])
    assert found["worst"]["mup"] <= coordinates.FLAT < 0.5 < found["slopes"]["standard"]["logits"]
    assert (tmp_path / "coordinates.png").stat().st_size > 10_000
    # What has been measured is not measured again.
    assert coordinates.main([*flags, "--widths", "16", "128"]) == 0
    assert "measured" not in capsys.readouterr().out


def test_the_standard_one_begins_by_its_fan_in():
    """Four times the width has half the standard deviation; muP's is the base's, scaled where it is made; at the base both are one."""
    config = configs.resolve(configs.load("configs/gpt_mup.py"))
    standard, mup = (at_width(config, 256, name, 64) for name in ("standard", "mup"))
    assert (standard["model"]["init_std"], standard["train"]["mup"]) == (0.0625, None)
    assert (mup["model"]["init_std"], mup["train"]["mup"]) == (0.125, {"width": 64})
    assert standard["optim"] == mup["optim"] == config["optim"]
    base = [at_width(config, 64, name, 64) for name in ("standard", "mup")]
    assert base[0] == base[1] and base[0]["model"]["init_std"] == 0.125


def test_a_family_without_such_a_parametrisation():
    config = configs.resolve(configs.load("configs/t5_stdlib.py"))
    with pytest.raises(UserError, match=r"model\.name='t5' does not say where its width ends"):
        at_width(config, 128, "standard", 16)


def test_a_class_of_ones_own(tmp_path, monkeypatch):
    """It needs the field that the standard parametrisation scales, and no blocks."""
    (tmp_path / "my_nets.py").write_text(
        "import flax.linen as nn\n\nREADOUT = ('out/kernel$',)\n\n\nclass Fixed(nn.Module):\n    vocab_size: int | None = None\n"
        "    width: int = 16\n\n\nclass Scaled(Fixed):\n    init_std: float = 0.02\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"data": {"source": "stdlib"}, "train": {"steps": 1}, "optim": {"lr": 0.1}}
    fixed, scaled = (configs.resolve({"model": {"name": f"my_nets:{name}"}, **own}) for name in ("Fixed", "Scaled"))
    assert at_width(fixed, 64, "mup", 16)["train"]["mup"] == {"width": 16}
    with says(
        "The coordinate check's standard parametrisation scales model.init_std, the standard deviation that weights begin with,"
        " and model.name='my_nets:Fixed' has no such field. Give it one."
    ):
        at_width(fixed, 64, "standard", 16)
    assert at_width(scaled, 64, "standard", 16)["model"]["init_std"] == 0.01


def test_one_width_says_nothing(config_file, tmp_path):
    with pytest.raises(UserError, match=r"--widths 16 16: give two or more"):
        coordinates.main([f"--config={config_file}", f"--to={tmp_path}", "--widths", "16", "16"])


def test_what_diverged_is_not_flat():
    """0.1 at each width is flat; with one that is no number, or that did not move, there is no answer."""
    moves = {64: [{"logits": [0.1, 0.1]}], 128: [{"logits": [0.1, 0.1]}, {"logits": [9.0, 0.1]}]}
    assert slopes(moves) == {"logits": pytest.approx(0, abs=1e-12)}
    for bad in (float("nan"), float("inf"), 0.0):
        broken = {**moves, 256: [{"logits": [0.1, 0.1]}, {"logits": [0.1, bad]}]}
        with pytest.raises(UserError, match=rf"at width 256, logits has moved by {bad}, .* Lower optim\.lr"):
            slopes(broken)

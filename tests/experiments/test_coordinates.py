"""The coordinate check as a command."""

import json

import jax
import pytest

from experiments import coordinates
from tfm_jax.errors import UserError


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


def test_one_width_says_nothing(config_file, tmp_path):
    with pytest.raises(UserError, match=r"--widths 16 16: give two or more"):
        coordinates.main([f"--config={config_file}", f"--to={tmp_path}", "--widths", "16", "16"])

"""What a device can do at best, by the names that drivers give."""

import types

import pytest

from tfm_jax.parallel import devices


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_data_sheet_is_that_of_the_device(monkeypatch, kind, peak):
    here = types.SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(devices.jax, "local_devices", lambda: [here])
    assert devices.peak_flops.__wrapped__("bfloat16") == peak

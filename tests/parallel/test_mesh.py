"""The mesh from sizes in a config."""

import re

import jax
import pytest

from tfm_jax.errors import UserError
from tfm_jax.parallel import mesh


@pytest.mark.parametrize(
    ("sizes", "shape", "ways"),
    [
        ({}, (8, 1, 1, 1, 1), 8),
        (dict(fsdp=4), (2, 4, 1, 1, 1), 8),
        (dict(data=1, fsdp=-1, tensor=2), (1, 4, 2, 1, 1), 4),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 2, 1, 1), 4),
        (dict(data=1, tensor=-1), (1, 1, 8, 1, 1), 1),
        (dict(data=1, tensor=2, expert=-1), (1, 1, 2, 4, 1), 4),
        (dict(data=2, context=-1), (2, 1, 1, 1, 4), 2),
    ],
)
def test_sizes(sizes, shape, ways):
    layout = mesh.make(**sizes)
    assert layout.mesh.axis_names == ("data", "fsdp", "tensor", "expert", "context")
    assert layout.mesh.devices.shape == shape and layout.batch_ways == ways
    assert set(layout.mesh.devices.flat) == set(jax.devices())


def test_some_of_the_devices():
    layout = mesh.make(tensor=2, devices=jax.devices()[4:8])
    assert layout.mesh.devices.shape == (2, 1, 2, 1, 1)
    assert {d.id for d in layout.mesh.devices.flat} == {4, 5, 6, 7}


def test_the_batch_is_split_over_data_and_fsdp():
    layout = mesh.make(data=2, fsdp=2, tensor=2)
    x = jax.device_put(jax.numpy.arange(8).reshape(8, 1), layout.batch())
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 1)}
    assert len({shard.data.tobytes() if hasattr(shard.data, "tobytes") else bytes(shard.data)
                for shard in x.addressable_shards}) == 4  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=0), "mesh.data=0: an axis has a size of at least 1, or -1 for what is left."),
        (dict(tensor=-2), "mesh.tensor=-2: an axis has a size of at least 1, or -1 for what is left."),
        (dict(fsdp=-1, tensor=-1), "mesh: only one axis can be -1, these are: data, fsdp, tensor."),
        (
            dict(fsdp=3),
            "mesh: data=-1 x fsdp=3 x tensor=1 x expert=1 x context=1: 3 does not divide the number of devices, 8, so data=-1 has no size.",
        ),
        (
            dict(data=2, fsdp=3, tensor=2),
            "mesh: data=2 x fsdp=3 x tensor=2 x expert=1 x context=1 = 12 devices, but there are 8. Set one axis to -1 to fill up.",
        ),
        (dict(rules=["kernel"]), "mesh.rules: 'kernel' is not a pair (regex, axes of the last dimensions)."),
        (
            dict(rules=[("kernel", ("model", None))]),
            "mesh.rules: ('kernel', ('model', None)) names the axis 'model'; the mesh has data, fsdp, tensor, expert, context.",
        ),
        (
            dict(rules=[("kernel", (("data", "model"),))]),
            "mesh.rules: ('kernel', (('data', 'model'),)) names the axis 'model'; the mesh has data, fsdp, tensor, expert, context.",
        ),
    ],
)
def test_errors(sizes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        mesh.make(**sizes)


def test_rules_of_a_config_are_tuples_afterwards():
    layout = mesh.make(rules=[["a$", [["data", "fsdp"], None]]])
    assert layout.rules == (("a$", (("data", "fsdp"), None)),)

"""The mesh from sizes in a config."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.parallel import mesh


@pytest.mark.parametrize(
    ("sizes", "shape", "ways"),
    [
        ({}, (8, 1, 1, 1, 1, 1), 8),
        (dict(fsdp=4), (2, 4, 1, 1, 1, 1), 8),
        (dict(data=1, fsdp=-1, tensor=2), (1, 4, 2, 1, 1, 1), 4),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 2, 1, 1, 1), 4),
        (dict(data=1, tensor=-1), (1, 1, 8, 1, 1, 1), 1),
        (dict(data=1, tensor=2, expert=-1), (1, 1, 2, 4, 1, 1), 4),
        (dict(data=2, context=-1), (2, 1, 1, 1, 4, 1), 2),
        (dict(data=2, stage=-1), (2, 1, 1, 1, 1, 4), 8),
    ],
)
def test_sizes(sizes, shape, ways):
    layout = mesh.make(**sizes)
    assert layout.mesh.axis_names == ("data", "fsdp", "tensor", "expert", "context", "stage")
    assert layout.mesh.devices.shape == shape and layout.batch_ways == ways
    assert set(layout.mesh.devices.flat) == set(jax.devices())


def test_some_of_the_devices():
    layout = mesh.make(tensor=2, devices=jax.devices()[4:8])
    assert layout.mesh.devices.shape == (2, 1, 2, 1, 1, 1)
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
            "mesh: data=-1 x fsdp=3 x tensor=1 x expert=1 x context=1 x stage=1: 3 does not divide the number of devices, 8, so data=-1 has no size.",
        ),
        (
            dict(data=2, fsdp=3, tensor=2),
            "mesh: data=2 x fsdp=3 x tensor=2 x expert=1 x context=1 x stage=1 = 12 devices, but there are 8. Set one axis to -1 to fill up.",
        ),
        (dict(rules=["kernel"]), "mesh.rules: 'kernel' is not a pair (regex, axes of the last dimensions)."),
        (
            dict(rules=[("kernel", ("model", None))]),
            "mesh.rules: ('kernel', ('model', None)) names the axis 'model'; the mesh has data, fsdp, tensor, expert, context, stage.",
        ),
        (
            dict(rules=[("kernel", (("data", "model"),))]),
            "mesh.rules: ('kernel', (('data', 'model'),)) names the axis 'model'; the mesh has data, fsdp, tensor, expert, context, stage.",
        ),
    ],
)
def test_errors(sizes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        mesh.make(**sizes)


def test_rules_of_a_config_are_tuples_afterwards():
    layout = mesh.make(rules=[["a$", [["data", "fsdp"], None]]])
    assert layout.rules == (("a$", (("data", "fsdp"), None)),)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A device of a pod that is not here."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def slices(*sizes):
    of = [i for i, size in enumerate(sizes) for _ in range(size)]
    # Not in order, as a backend may give them.
    return [Elsewhere(i, of[i]) for i in range(len(of))][::-1]


@pytest.mark.parametrize(
    ("sizes", "across"),
    [(dict(data=4, fsdp=2, tensor=2), "data"), (dict(data=2, fsdp=4, stage=2), "data"), (dict(fsdp=4, data=2, stage=2), "stage")],
)  # fmt: skip
def test_slices_are_the_outermost_part_of_one_axis(sizes, across):
    made = mesh.make(**sizes, across=across, devices=slices(8, 8)).mesh
    devices = made.devices
    where = np.vectorize(lambda device: device.slice_index)(devices)
    place = np.indices(where.shape)[made.axis_names.index(across)]
    assert made.shape[across] == sizes[across] and [device.slice_index for device in devices.flat] == [0] * 8 + [1] * 8
    np.testing.assert_array_equal(where, place // (sizes[across] // 2))
    assert len({device.id for device in devices.flat}) == 16


def test_slices_that_do_not_fit():
    with says("mesh: data=1 x fsdp=16 x tensor=1 x expert=1 x context=1 x stage=1 on 2 slices of 8 devices: mesh.data=1 is not a multiple of 2."
              " Only mesh.across='data' crosses the network between them; the other axes lie inside of one."):  # fmt: skip
        mesh.make(data=1, fsdp=-1, devices=slices(8, 8))
    with says("mesh: slices of 8, 4 devices; they must be of one size."):
        mesh.make(devices=sorted(slices(8, 4), key=lambda device: device.id))

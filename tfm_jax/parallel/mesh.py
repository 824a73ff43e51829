"""The device mesh, from sizes in a config."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from tfm_jax.errors import UserError
from tfm_jax.parallel.devices import has_host_memory
from tfm_jax.parallel.sharding import Layout, Memory, Rule, names_of


def make(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    stage: int = 1,
    microbatches: int | None = None,
    across: Literal["data", "stage"] = "data",
    rules: Sequence[Any] = (),
    optimizer_memory: Memory = "device",
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """The config section `mesh`: axis sizes, one of which may be -1 to take what is left.

    Args:
      data: copies of the model, each on its own part of the batch.
      fsdp: ways in which the batch *and* the parameters are split; parameters are gathered when used.
      tensor: ways in which heads, MLP width and vocabulary are split within one copy.
      expert: ways in which a mixture's experts are split; outside of them, ways in which the batch is.
      context: ways in which the length of a sequence is split; attention goes round a ring of them (`nn.ring`), and parameters
        are copied along it.
      stage: ways in which the layers are split, a pipeline; outside of them, ways in which the batch is. See `nn.pipeline`.
      microbatches: one after the other through that pipeline, a multiple of `stage`: the more, the less of the time stages wait.
        Four for each stage if None, or as many as there are rows.
      across: the axis whose outermost part are the slices of a pod, where the data-centre network joins several.
      rules: `(regex, axes of the last dimensions)` tried before the model family's own.
      optimizer_memory: where the optimizer's large arrays are between updates: in the `device`'s memory or the `host`'s, from
        where each update brings them.
      devices: all of them by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert, "context": context, "stage": stage}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise UserError(f"mesh.{axis}={size}: an axis has a size of at least 1, or -1 for what is left.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one axis can be -1, these are: {', '.join(free)}.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if free:
        if len(found) % fixed:
            raise UserError(
                f"mesh: {asked}: {fixed} does not divide the number of devices, {len(found)}, so {free[0]}=-1 has no size."
            )
        sizes[free[0]] = len(found) // fixed
    elif fixed != len(found):
        raise UserError(f"mesh: {asked} = {fixed} devices, but there are {len(found)}. Set one axis to -1 to fill up.")
    if optimizer_memory == "host" and not has_host_memory(found[0]):
        raise UserError(
            f"mesh.optimizer_memory='host': a program for {found[0].platform} has no access to its host's memory here. Use 'device'."
        )
    if microbatches is not None and (sizes["stage"] == 1 or microbatches < 1 or microbatches % sizes["stage"]):
        raise UserError(
            f"mesh.microbatches={microbatches}: must be a multiple of mesh.stage={sizes['stage']}."
            if sizes["stage"] > 1
            else f"mesh.microbatches={microbatches} are for a pipeline, and mesh.stage=1 is none. For accumulation: train.accum."
        )
    mesh = _mesh(sizes, found, across)
    return Layout(mesh, tuple(_rule(rule, tuple(sizes)) for rule in rules), microbatches, optimizer_memory)


def _mesh(sizes: dict[str, int], devices: list[jax.Device], across: str) -> Mesh:
    """Devices in the order in which neighbours on an axis are near each other; slices are the outermost part of `across`."""
    kinds = (AxisType.Auto,) * len(sizes)
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len({*slices.values()}) > 1:
        raise UserError(f"mesh: slices of {', '.join(map(str, slices.values()))} devices; they must be of one size.")
    if sizes[across] % len(slices):
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh: {shape} on {len(slices)} slices of {slices.most_common(1)[0][1]} devices: mesh.{across}={sizes[across]} is"
            f" not a multiple of {len(slices)}. Only mesh.across={across!r} crosses the network between them; the other axes"
            " lie inside of one."
        )
    # Slice by slice, as the TPU compiler numbers them.
    sizes = {across: sizes[across], **sizes}
    outside = {axis: len(slices) if axis == across else 1 for axis in sizes}
    inside = [size // outside[axis] for axis, size in sizes.items()]
    # An axis that is no product of whole dimensions of the torus is a part of one; it has no ring, and is slower.
    if len(slices) == 1:
        placed = create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        placed = create_hybrid_device_mesh(inside, [*outside.values()], devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=kinds)


def _rule(rule: Any, axes: tuple[str, ...]) -> Rule:
    try:
        pattern, dims = rule
        dims = tuple(tuple(d) if isinstance(d, list | tuple) else d for d in dims)
    except (TypeError, ValueError):
        raise UserError(f"mesh.rules: {rule!r} is not a pair (regex, axes of the last dimensions).") from None
    for dim in dims:
        for name in names_of(dim):
            if name not in axes:
                raise UserError(f"mesh.rules: {rule!r} names the axis {name!r}; the mesh has {', '.join(axes)}.")
    return str(pattern), dims

"""What a training step would cost on devices that are not here: compiled ahead of time for them, and read.

The compiler is the real one (`libtpu`); the times are a roofline from data sheets and have met no chip.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from tfm_jax import config as configs
from tfm_jax.data.synthetic import in_place_of
from tfm_jax.errors import UserError, nearest
from tfm_jax.nn import splash
from tfm_jax.parallel import flops, hbm, hlo
from tfm_jax.parallel.chips import CHIPS, Chip, of, seconds
from tfm_jax.parallel.sharding import Placement
from tfm_jax.train.build import Experiment, build

GIB = 2.0**30


@dataclass(frozen=True)
class Topology:
    """Devices and what each can do."""

    name: str
    devices: Sequence[Any]
    chip: Chip


@dataclass(frozen=True)
class Traffic:
    """What collectives of a kind send along some axes of the mesh, and how long it takes; `exposed` is the part that nothing hides."""

    kind: str
    axes: tuple[str, ...]
    network: bool
    bytes_per_chip: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0

    @property
    def links(self) -> str:
        return f"{'network' if self.network else 'links'} along {' and '.join(self.axes) or 'all'}"


@dataclass(frozen=True)
class Plan:
    """A step on a topology; all times in seconds, all sizes in bytes on one chip.

    Attributes:
      params: of the model.
      hbm: what the program needs at its highest; `fits` says whether a chip has it.
      arguments, temporaries: of that, the state and batch that it is given, and what it works with; nan where it does not fit.
      model_flops, hardware_flops: of a step on all chips, without and with what is computed again; attention is not halved.
      causal_flops: the model's, with causal attention counted half.
      compute, memory: of a step if nothing else took time.
      step: predicted: the longest of what overlaps, plus what does not.
      mfu: model FLOPs over what the chips could do in that time.
      bottleneck: what the longest is.
    """

    topology: str
    chips: int
    params: int
    tokens: int
    hbm: float
    arguments: float
    temporaries: float
    fits: bool
    model_flops: float
    causal_flops: float
    hardware_flops: float
    compute: float
    memory: float
    traffic: list[Traffic]
    step: float
    mfu: float
    bottleneck: str
    compile_seconds: float
    endless_loops: int
    table: list[Placement] = field(repr=False, default_factory=list)

    @property
    def halved_mfu(self) -> float:
        """With causal attention counted half."""
        return self.mfu * self.causal_flops / self.model_flops


def topology(name: str) -> Topology:
    """`v5p:4x4x4`, or `2xv5e:16x16` for two slices that the data-centre network joins; `cpu:8` and `gpu:8` are devices here.

    Raises:
      UserError: a chip or a shape that there is not, or no TPU compiler.
    """
    if here := re.fullmatch(r"(cpu|gpu):(\d+)", name):
        return _here(name, here[1], int(here[2]))
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
    if found is None or found[2] not in CHIPS:
        raise UserError(
            f"--topology={name}: write CHIP:SHAPE, for instance v5p:4x4x4, or 2xv5e:16x16 for two slices, or cpu:8, gpu:8."
            f"{nearest(name.partition(':')[0], CHIPS)}"
        )
    # Otherwise the library asks a metadata server about a TPU that is not here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    more = {"num_slices": int(found[1])} if found[1] else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{found[2]}:{found[3]}", **more)
    except Exception as error:
        if any(word in str(error) for word in ("libtpu", "Unable to", "TPU support not installed")):
            raise UserError("--topology needs the TPU compiler: pip install 'tfm_jax[tpu]'.") from error
        raise UserError(f"--topology={name}: the compiler knows no such shape: {error}") from None
    return Topology(name, described.devices, CHIPS[found[2]])


def _here(name: str, kind: str, count: int) -> Topology:
    try:
        devices = jax.devices(kind)
    except RuntimeError as error:
        raise UserError(f"--topology={name}: there is no {kind} here: {error}") from None
    if not 0 < count <= len(devices):
        more = f" JAX_NUM_CPU_DEVICES={count} simulates as many." if kind == "cpu" else ""
        raise UserError(f"--topology={name}: devices of this kind here: {len(devices)}.{more}")
    return Topology(name, devices[:count], of(devices[:count]))


def measured(experiment: Experiment, steps: int) -> float:
    """Seconds of a step on devices that are here, the median of so many after two."""
    with jax.set_mesh(experiment.layout.mesh):
        state, batch = experiment.fresh_state(), experiment.batch(0)
        step, took = experiment.jitted_step(), []
        for _ in range(2 + steps):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


def planned(config: configs.Config, where: Topology) -> tuple[Experiment, Plan]:
    """Compile the config's training step for a topology, and say what it would cost.

    Raises:
      UserError: whatever does not fit together, the mesh and the topology among it.
    """
    config = drawn(config)
    experiment = build(config, devices=where.devices)
    causal, rows = _causal(experiment), experiment.data.train.batch_size
    once = _plainly(config, experiment, where)
    with jax.set_mesh(once.layout.mesh):
        own: Any = once.jitted_step().trace(once.abstract_state(), _batch(once, rows)).jaxpr
    model = flops.count(own)
    halved = model - flops.count(own, weights=False) / 2 if causal else model
    with jax.set_mesh(experiment.layout.mesh):
        state, batch = experiment.abstract_state(), _batch(experiment, rows)
        traced: Any = experiment.jitted_step().trace(state, batch)
        hardware = hardware_flops(traced, experiment)
        began = time.perf_counter()
        compiled, needed, arguments, temporaries = _compiled(traced, where.devices[0].platform)
        took = time.perf_counter() - began
    base = Plan(
        topology=where.name, chips=len(where.devices), params=experiment.parameter_count,
        tokens=math.prod(batch["weights"].shape), hbm=needed, arguments=arguments, temporaries=temporaries, fits=compiled is not None and needed <= where.chip.hbm,
        model_flops=model, causal_flops=halved, hardware_flops=hardware,
        compute=hardware / len(where.devices) / where.chip.flops, memory=0.0, traffic=[], step=math.inf, mfu=0.0,
        bottleneck="memory does not suffice", compile_seconds=took, endless_loops=0,
        table=experiment.layout.table(state),
    )  # fmt: skip
    if compiled is None:
        return experiment, base
    text = compiled.as_text()
    program = hlo.read(text, dict(experiment.layout.mesh.shape))
    traffic = _traffic(program, experiment.layout.mesh.devices.flatten().tolist(), where.chip)
    rivals = {"compute": base.compute, "memory": hbm.moved(text) / where.chip.hbm_rate}
    for one in traffic:
        rivals[one.links] = rivals.get(one.links, 0.0) + one.seconds
    hidden = sum(one.seconds - one.exposed for one in traffic)
    step = max(base.compute, rivals["memory"], hidden) + sum(one.exposed for one in traffic)
    return experiment, dataclasses.replace(
        base,
        memory=rivals["memory"],
        traffic=traffic,
        step=step,
        mfu=model / (step * len(where.devices) * where.chip.flops),
        bottleneck=max(rivals, key=lambda name: rivals[name]),
        endless_loops=program.endless,
    )


def _plainly(config: configs.Config, experiment: Experiment, where: Topology) -> Experiment:
    """The same step as its formulas have it: nothing computed again, attention in full, all on one device."""
    # Empty slots and what finds them are no model's FLOPs.
    plain: dict[str, Any] = {"remat": "none", "attention": "xla", "expert_capacity": None}
    plain = {name: value for name, value in plain.items() if name in config["model"]}
    return on_one_chip({**config, "model": {**config["model"], **plain}}, experiment, where)


def on_one_chip(config: configs.Config, experiment: Experiment, where: Topology) -> Experiment:
    """The config's step on the topology's first chip alone; the experiment is the same one on all of them."""
    sizes = {**config["mesh"], **dict.fromkeys(experiment.layout.mesh.shape, 1), "microbatches": None}
    return build({**config, "mesh": sizes}, devices=where.devices[:1])


def hardware_flops(traced: Any, experiment: Experiment) -> float:
    """FLOPs of a traced step with what is computed again, and without the blocks that attention kernels leave out."""
    inputs = _batch(experiment, 1)["inputs"]
    return flops.count(traced.jaxpr, seen=splash.seen(inputs["tokens"].shape[1]) if _causal(experiment) else 1.0)


def drawn(config: configs.Config) -> configs.Config:
    """The config with drawn data of the same shapes, and nothing to start from."""
    config = {**config, "data": {**in_place_of(config["data"], config["model"])}, "evals": {}, "checkpoint": {}}
    config["train"] = {**config["train"], "stop_metric": None}
    return configs.resolve(config)


def _batch(experiment: Experiment, rows: int) -> Any:
    one = experiment.data.train.batch_at(0, slice(0, 1))
    where = experiment.layout.batch()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where), one)


def _causal(experiment: Experiment) -> bool:
    return "decoder_tokens" not in _batch(experiment, 1)["inputs"] and hasattr(experiment.model, "init_caches")


def _compiled(traced: Any, platform: str) -> tuple[Any, float, float, float]:
    """The program, its highest memory, and of that its arguments and temporaries; no program where the compiler says that it does not fit."""
    try:
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)(?: of|\) exceeds)", str(error))
        if used is None:
            raise
        return None, float(used[1]) * 1024 ** "_KMGT".index(used[2] or "_"), math.nan, math.nan
    sizes = compiled.memory_analysis()
    own = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    highest = float(own + sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    return compiled, highest, float(sizes.argument_size_in_bytes), float(sizes.temp_size_in_bytes)


def _traffic(program: hlo.Program, devices: Sequence[Any], chip: Chip) -> list[Traffic]:
    """By kind and mesh axes, inside slices and between them, the slowest first."""
    found: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
    for one in program.collectives:
        members = [devices[i] for i in one.members]
        across = one.across or len({getattr(device, "slice_index", 0) for device in members}) > 1
        places = np.array([getattr(device, "coords", (device.id,)) for device in members])
        dimensions = sum(len(set(column.tolist())) > 1 for column in places.T)
        took = seconds(chip, one, dimensions=dimensions, across=across)
        old = found.setdefault((one.kind, one.axes, across), Traffic(one.kind, one.axes, across))
        found[one.kind, one.axes, across] = dataclasses.replace(
            old,
            bytes_per_chip=old.bytes_per_chip + one.size * one.times,
            seconds=old.seconds + took,
            exposed=old.exposed + (0.0 if one.hidden else took),
        )
    return sorted(found.values(), key=lambda one: -one.seconds)

"""Which mesh, microbatches and rematerialisation a training step is fastest with on a topology.

All that divide are put in order by what they need at least, from formulas in milliseconds; the compiler then judges the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel import mesh
from tfm_jax.parallel.plan import Plan, Topology, drawn, hardware_flops, on_one_chip, planned
from tfm_jax.parallel.sharding import Layout, names_of
from tfm_jax.sections import family
from tfm_jax.tasks.base import bind
from tfm_jax.train.build import Experiment, build
from tfm_jax.train.check import check, check_batch

ACCUMULATED = (1, 2, 4, 8)
REMATERIALISED = ("none", "dots", "full")
# Wider than a host's chips and their neighbours, the products in a layer are over before their sums are.
WIDEST_TENSOR = 16


@dataclass(frozen=True)
class Bound:
    """What a choice needs at least on each chip.

    Attributes:
      changes: flat keys of the config.
      memory: bytes: the state, its gradient, what the backward pass finds kept, and one layer of what it computes again.
      seconds: of a step: products, or parameters and gradients on their way, whichever is longer, and the sums of split
        products in the layers.
      sent: seconds of parameters and gradients on their way.
    """

    changes: dict[str, Any]
    memory: float
    seconds: float
    sent: float


class Found(NamedTuple):
    """The fastest of the choices that were compiled, and all of them with their plans, the config's own first."""

    config: configs.Config
    experiment: Experiment
    plan: Plan
    tried: list[tuple[dict[str, Any], Plan]]


def search(
    config: configs.Config, where: Topology, *, compiled: int = 4, say: Callable[[str], None] = lambda line: None
) -> Found:
    """Compile a config's own mesh and the best few others.

    Args:
      compiled: choices to compile besides the config's own.
      say: is told what is done, a line at a time.

    Raises:
      UserError: nothing that was compiled fits.
    """
    config = drawn(config)
    found = sorted(bounds(config, where), key=lambda bound: (bound.seconds, bound.sent))
    fitting = [bound for bound in found if bound.memory <= where.chip.hbm]
    say(f"{len(found)} choices, {len(fitting)} that may fit.")
    best, (experiment, plan) = config, planned(config, where)
    own = {f"mesh.{axis}": size for axis, size in experiment.layout.mesh.shape.items()}
    say(f"as it is: {_said(plan)}")
    tried: list[tuple[dict[str, Any], Plan]] = [({}, plan)]
    for bound in fitting:
        if len(tried) > compiled or (plan.fits and bound.seconds >= plan.step):
            break
        changed = configs.changed(config, bound.changes)
        if changed == configs.changed(config, own):
            continue
        made, other = planned(changed, where)
        tried.append((bound.changes, other))
        say(f"{_shown(bound.changes)}: {_said(other)}")
        if other.fits and (not plan.fits or other.step < plan.step):
            best, experiment, plan = changed, made, other
    if not plan.fits:
        raise UserError(
            f"Nothing fits on {where.name}: the least is {min(bound.memory for bound in found) / 2**30:.1f} GiB a chip, of"
            f" {where.chip.hbm / 2**30:.0f}. Use more chips, a smaller data.batch_size, or a higher --search."
        )
    return Found(best, experiment, plan, tried)


def _shown(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())


def _said(plan: Plan) -> str:
    if not plan.fits:
        return f"{plan.hbm / 2**30:.1f} GiB a chip do not fit"
    return f"{1e3 * plan.step:.1f} ms, MFU {100 * plan.mfu:.1f} %, {plan.hbm / 2**30:.1f} GiB a chip"


def bounds(config: configs.Config, where: Topology) -> Iterator[Bound]:
    """What each choice that divides needs at least."""
    base = build(config, devices=where.devices)
    alone = {remat: on_one_chip(configs.changed(config, remat), base, where) for remat in _remats(config)}
    kept = {remat: _kept(experiment) for remat, experiment in alone.items()}
    work = {remat: step_flops(experiment) for remat, experiment in alone.items()}
    plain = max(kept.values())
    state, spec = base.abstract_state(), getattr(base.model, "block", None)
    layers = _layers(config)
    for sizes in meshes(config, where):
        settings = {f"mesh.{axis}": size for axis, size in sizes.items()}
        try:
            layout = mesh.make(**configs.changed(config, settings)["mesh"], devices=where.devices)
            check(configs.changed(config, settings), layout)
        except UserError:
            # The model has no such axis.
            continue
        layout = layout.with_rules(family(config["model"]["name"], "RULES", ()))
        table = layout.table(state)
        held = sum(row.bytes_per_device for row in table)
        own = sum(row.bytes_per_device for row in table if row.path.startswith("params/"))
        rows = base.data.train.batch_size / layout.batch_ways
        for accum, remat in itertools.product(ACCUMULATED, kept):
            changes = {**settings, "train.accum": accum, **dict(remat)}
            try:
                check_batch(configs.changed(config, changes), layout)
            except UserError:
                continue
            again = plain / layers if kept[remat] < plain else 0.0
            ways = sizes["tensor"] * layout.mesh.shape["context"]
            memory = held + own + rows / accum * (kept[remat] + again) / ways
            sent = _sent(layout, table, accum, where)
            seconds = max(work[remat] / len(where.devices) / where.chip.flops, sent)
            if isinstance(spec, BlockSpec):
                seconds += _summed(base, spec, layers, rows, sizes["tensor"], where)
            yield Bound(changes, memory, seconds, sent)


def meshes(config: configs.Config, where: Topology) -> Iterator[dict[str, int]]:
    """Sizes of the axes that are tried, whose product is the number of devices; the other axes are as the config has them."""
    asked, model, count = config["mesh"], config["model"], len(where.devices)
    fixed = math.prod(size for axis, size in asked.items() if axis in _FIXED and size > 0)
    slices = _slices(where)
    tensors = [n for n in _divisors(count) if n <= WIDEST_TENSOR and not (model.get("heads") or n) % n]
    experts = [n for n in _divisors(count) if not model["experts"] % n] if model.get("experts") else [1]
    for tensor, expert in itertools.product(tensors, experts):
        left, rest = divmod(count, fixed * tensor * expert)
        if rest:
            continue
        for data in _divisors(left):
            if data % slices == 0:
                yield {"data": data, "fsdp": left // data, "tensor": tensor, "expert": expert}


# Axes that a config chooses for what they allow, not for speed.
_FIXED = ("context", "stage")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _remats(config: configs.Config) -> list[tuple[tuple[str, Any], ...]]:
    if "remat" not in config["model"]:
        return [()]
    return [(("model.remat", name),) for name in REMATERIALISED]


def _layers(config: configs.Config) -> int:
    model = config["model"]
    return int(model.get("layers") or (model.get("encoder_layers") or 0) + (model.get("decoder_layers") or 0) or 1)


def _kept(experiment: Experiment) -> float:
    """Bytes that the forward pass keeps for the backward pass, for each row of the batch: what jax.vjp closes over."""
    state = jax.eval_shape(experiment.init)
    one = experiment.data.train.batch_at(0, slice(0, 1))

    def held(rows: int) -> int:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), one)

        def pulled(params: Any, batch: Any) -> Any:
            def total(params: Any) -> jax.Array:
                model = bind(experiment.model, state.mutables)
                return experiment.task.loss(model, params, state.extra, batch, jax.random.key(0), True).total

            return jax.vjp(total, params)[1]

        found = jax.tree.leaves(jax.eval_shape(pulled, state.params, batch))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in found)

    with jax.set_mesh(experiment.layout.mesh):
        return held(2) - held(1)


def step_flops(experiment: Experiment) -> float:
    """FLOPs of a step on all chips, with what is computed again."""
    rows = experiment.data.train.batch_size
    one = experiment.data.train.batch_at(0, slice(0, 1))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), one)
    with jax.set_mesh(experiment.layout.mesh):
        traced: Any = jax.jit(experiment.step).trace(jax.eval_shape(experiment.init), batch)
    return hardware_flops(traced, experiment)


def _sent(layout: Layout, table: Any, accum: int, where: Topology) -> float:
    """Seconds in which each microbatch is brought the parameters that are split over fsdp, forward and backward, and in which
    its gradients are summed, in bfloat16 all: over fsdp to each chip's part, over data as a whole, there between slices too."""
    sizes, slices = layout.mesh.shape, _slices(where)
    inside, across = 0.0, 0.0
    for row in table:
        if not row.path.startswith("params/"):
            continue
        names = {name for axis in row.spec for name in names_of(axis)}
        size = row.bytes_per_device / 2
        inside += 3 * size * (sizes["fsdp"] - 1) if "fsdp" in names else 0.0
        copies = sizes["data"] // slices
        inside += 2 * size * (copies - 1) / copies
        across += 2 * size * (slices - 1) / slices
    return accum * (inside / (where.chip.link_rate * _dimensions(where)) + across / where.chip.network_rate)


def _summed(base: Experiment, spec: BlockSpec, layers: int, rows: float, tensor: int, where: Topology) -> float:
    """Seconds of the four sums of a layer's states over the chips that its products are split over."""
    if tensor == 1:
        return 0.0
    length = base.config["data"].get("seq_len") or 1
    size = 2 * rows * length * spec.width
    return 4 * layers * 2 * (tensor - 1) / tensor * size / where.chip.link_rate


def _slices(where: Topology) -> int:
    return len({getattr(device, "slice_index", 0) for device in where.devices})


def _dimensions(where: Topology) -> int:
    places = [getattr(device, "coords", (device.id,)) for device in where.devices]
    return max(1, sum(len(set(column)) > 1 for column in zip(*places, strict=True)))

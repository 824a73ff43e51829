"""Which device holds which part of an array: rules for parameters, names for activations.

A rule is `(regex on the path, mesh axes of the array's last dimensions)`, for instance
`(r"mlp/up/kernel$", ("fsdp", "tensor"))`. Aligning to the *last* dimensions lets one rule serve the unrolled kernel,
the scanned kernel with its leading layer axis, and the optimizer's moments, whose paths end in the parameter's. That layer
axis, of what lies under `blocks`, is split over `stage`.
First match wins. An axis that does not divide its dimension is dropped and reported; a large array that matches no
rule is split over `fsdp` on its largest divisible dimension (ZeRO-3, Rajbhandari et al. 2020) and reported.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tfm_jax.errors import UserError
from tfm_jax.paths import compile_patterns, flatten, map_with_path

log = logging.getLogger(__name__)

Axis = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Axis, ...]]
Memory = Literal["device", "host"]

BATCH_AXES = ("data", "fsdp", "expert")
# Outside of the blocks the stages of a pipeline have rows of their own: nothing is embedded or predicted twice.
ROW_AXES = (*BATCH_AXES, "stage")
SCANNED = re.compile(r"(^|/)blocks/")
# Activation dimensions by their meaning; a name that is not here is not split.
ACTIVATION_AXES: dict[str, Axis] = {
    "rows": ROW_AXES,
    "batch": BATCH_AXES,
    "length": "context",
    "stage": "stage",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # Where tokens are with their experts, `expert` has split those, and the rest splits the rows.
    "expert": "expert",
    "group": ("data", "fsdp"),
    "slot": "context",
}
# Below this many elements (256 KiB in float32) gathering an array costs more latency than holding it costs memory.
FALLBACK_MIN_SIZE = 2**16


class Placement(NamedTuple):
    """One row of the sharding table; what is in the host's memory takes none of the device's."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    bytes_per_device: int
    note: str  # what was dropped or fell back, "" when a rule fitted as written


def constrain(x: jax.Array, names: Sequence[str | None], *, rest: bool = False) -> jax.Array:
    """Tell the partitioner how an activation is split, by the meaning of its dimensions; a no-op without a mesh.

    Args:
      rest: whether there are more dimensions behind the named ones, with which it does as it likes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape, rest=rest))


def spec_of(names: Sequence[str | None], shape: tuple[int, ...], *, rest: bool = False) -> P:
    """How an activation of this shape is split over the current mesh, by the meaning of its dimensions."""
    if len(names) != len(shape) and not (rest and len(names) < len(shape)):
        raise ValueError(f"constrain: {len(names)} names {tuple(names)} for an array of shape {shape}.")
    axes = [ACTIVATION_AXES.get(name) if name else None for name in names]
    sizes, free = dict(jax.sharding.get_abstract_mesh().shape), [P.UNCONSTRAINED] * (len(shape) - len(names))
    # Not strict: what is left of the shape is free.
    return P(*(_fitting(a, d, sizes)[0] for a, d in zip(axes, shape, strict=False)), *free)


def ways(name: str) -> int:
    """Over how many devices of the current mesh an activation's dimension of this meaning is split."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(each, 1) for each in names_of(ACTIVATION_AXES[name]))


def on_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function of arrays as one of the parts that each device of the current mesh holds; inside, collectives are its own.

    An axis over which the caller has taken the parts already stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    mapped: Callable[..., Any] = jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False
    )
    return mapped


def merged(x: jax.Array, *, keep: int = 1) -> jax.Array:
    """(B, T, D) to (B*T, D), keeping so many last dimensions; as it is where T is split over devices, which rows and positions in
    one dimension could not be."""
    return x if ways("length") > 1 else x.reshape(-1, *x.shape[x.ndim - keep :])


def names_of(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def _fitting(axis: Axis, dim: int, sizes: dict[str, int]) -> tuple[Axis, str]:
    """The axis if it divides the dimension, else None and the reason."""
    names = names_of(axis)
    if unknown := [name for name in names if name not in sizes]:
        raise ValueError(f"Sharding names the axis {unknown[0]!r}; the mesh has {tuple(sizes)}.")
    ways = math.prod(sizes[name] for name in names)
    if ways == 1:
        return None, ""
    if dim % ways:
        return None, f"{'*'.join(names)}={ways} does not divide {dim}"
    return axis, ""


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place arrays on it.

    Attributes:
      microbatches: into which a pipeline over `stage` cuts a batch; None leaves it to the pipeline.
      optimizer_memory: where the optimizer's arrays are between updates.
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = field(default=())
    microbatches: int | None = None
    optimizer_memory: Memory = "device"

    def with_rules(self, rules: Sequence[Rule]) -> Layout:
        """A layout that tries these rules after its own: the config's come first, then the family's."""
        return dataclasses.replace(self, rules=(*self.rules, *rules))

    @property
    def batch_ways(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    def batch(self) -> NamedSharding:
        """Rows over `ROW_AXES`, the other dimensions whole: ids are a few bytes a position, and `context` splits what is made of
        them."""
        return NamedSharding(self.mesh, P(ROW_AXES))

    def place(self, tree: Any) -> Any:
        """A tree of `NamedSharding` for a tree of arrays or abstract arrays."""
        patterns = compile_patterns([pattern for pattern, _ in self.rules], setting="mesh.rules")
        return map_with_path(lambda path, x: NamedSharding(self.mesh, self._spec(path, x.shape, patterns)[0]), tree)

    def at_rest(self, placed: Any, tree: Any) -> Any:
        """The placement of the optimizer's state between updates: of what is small, that of during them."""

        def move(sharding: NamedSharding, x: Any) -> NamedSharding:
            return sharding.with_memory_kind("pinned_host") if math.prod(x.shape) >= FALLBACK_MIN_SIZE else sharding

        return placed if self.optimizer_memory == "device" else jax.tree.map(move, placed, tree)

    def table(self, tree: Any) -> list[Placement]:
        """Every array's placement and what had to give way, largest first."""
        patterns = compile_patterns([pattern for pattern, _ in self.rules], setting="mesh.rules")
        rows = []
        for path, x in flatten(tree).items():
            spec, note = self._spec(path, x.shape, patterns)
            shard = NamedSharding(self.mesh, spec).shard_shape(x.shape)
            on_host = getattr(getattr(x, "sharding", None), "memory_kind", None) == "pinned_host"
            dtype, size = f"{x.dtype}{' on host' * on_host}", math.prod(shard) * _itemsize(x.dtype) * (not on_host)
            rows.append(Placement(path, x.shape, dtype, spec, size, note))
        return sorted(rows, key=lambda row: -row.bytes_per_device)

    def check_splits(self, params: Any) -> None:
        """Say what gives way to a size that does not fit, and raise where `mesh.tensor` splits no parameter: each of its
        devices would do the same work."""
        rows = self.table(params)
        if gave_way := [row for row in rows if row.note]:
            log.info(
                "mesh: %d of %d arrays are not placed as a rule says, for instance %s: %s. --print_sharding has all.",
                len(gave_way), len(rows), gave_way[0].path, gave_way[0].note,
            )  # fmt: skip
        if (ways := self.mesh.shape["tensor"]) == 1:
            return
        if any("tensor" in names_of(axis) for row in rows for axis in row.spec):
            return
        named = [re.compile(regex) for regex, dims in self.rules if any("tensor" in names_of(axis) for axis in dims)]
        why = [f"{row.path}: {row.note}" for row in rows if row.note and any(x.search(row.path) for x in named)]
        raise UserError(
            f"mesh.tensor={ways} splits none of the parameters. "
            + (
                f"{why[0]}. Use a number that divides model.heads and the widths, or mesh.fsdp."
                if why
                else "No rule names it: give one in mesh.rules, or RULES beside the model's class; or use mesh.fsdp."
            )
        )

    def _spec(self, path: str, shape: tuple[int, ...], patterns: Sequence[Any]) -> tuple[P, str]:
        spec, note = self._by_rule(path, shape, patterns)
        axes = [*spec, *[None] * (len(shape) - len(spec))]
        if self.mesh.shape["stage"] == 1 or not SCANNED.search(path) or not shape or axes[0] is not None:
            return spec, note
        axes[0], gave_way = _fitting("stage", shape[0], dict(self.mesh.shape))
        return P(*axes), "; ".join(filter(None, (note, gave_way)))

    def _by_rule(self, path: str, shape: tuple[int, ...], patterns: Sequence[Any]) -> tuple[P, str]:
        sizes = dict(self.mesh.shape)
        for pattern, (_, dims) in zip(patterns, self.rules, strict=True):
            if not pattern.search(path):
                continue
            if len(dims) > len(shape):
                # A factored moment or a scalar that lives under the parameter's path.
                return P(), f"rule {pattern.pattern!r} is for {len(dims)} dimensions: replicated"
            axes: list[Axis] = [None] * (len(shape) - len(dims))
            notes = []
            for axis, dim in zip(dims, shape[len(shape) - len(dims) :], strict=True):
                fitted, note = _fitting(axis, dim, sizes)
                axes.append(fitted)
                notes += [note] if note else []
            return P(*axes), "; ".join(notes)
        ways = sizes["fsdp"]
        if ways > 1 and math.prod(shape) >= FALLBACK_MIN_SIZE:
            for index in sorted(range(len(shape)), key=lambda i: -shape[i]):
                if shape[index] % ways == 0:
                    return P(*("fsdp" if i == index else None for i in range(len(shape)))), "no rule: fsdp fallback"
            return P(), f"no rule and no dimension divides by fsdp={ways}: replicated"
        return P(), ""


def _itemsize(dtype: Any) -> int:
    # Random keys have no numpy item size of their own; none is stored in a state, so plain numbers suffice.
    return int(jax.numpy.dtype(dtype).itemsize)


def format_table(rows: Sequence[Placement]) -> str:
    """The placements as text, with the totals that decide whether a run fits."""
    header = ("parameter", "shape", "dtype", "spec", "MiB/device", "note")
    body = [
        (
            r.path,
            "x".join(map(str, r.shape)) or "scalar",
            r.dtype,
            str(tuple(r.spec)),
            f"{r.bytes_per_device / 2**20:.3f}",
            r.note,
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *body]
    ]
    total = sum(r.bytes_per_device for r in rows) / 2**20
    elements = sum(math.prod(r.shape) for r in rows)
    gave_way = sum(1 for r in rows if r.note)
    lines.append(
        f"{len(rows)} arrays, {elements:,} elements, {total:.1f} MiB per device; {gave_way} not as a rule says."
    )
    return "\n".join(lines)

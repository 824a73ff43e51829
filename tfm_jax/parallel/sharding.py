"""Which device holds which part of an array: rules for parameters, names for activations.

A rule is `(regex on the path, mesh axes of the array's last dimensions)`, for instance
`(r"mlp/up/kernel$", ("fsdp", "tensor"))`. Aligning to the *last* dimensions lets one rule serve the unrolled kernel,
the scanned kernel with its leading layer axis, and the optimizer's moments, whose paths end in the parameter's.
First match wins. An axis that does not divide its dimension is dropped and reported; a large array that matches no
rule is split over `fsdp` on its largest divisible dimension (ZeRO-3, Rajbhandari et al. 2020) and reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tfm_jax.paths import compile_patterns, flatten, map_with_path

Axis = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Axis, ...]]

BATCH_AXES = ("data", "fsdp", "expert")
# Activation dimensions by their meaning; a name that is not here is not split.
ACTIVATION_AXES: dict[str, Axis] = {
    "batch": BATCH_AXES,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # Where tokens are with their experts, `expert` has split those, and the rest splits the rows.
    "expert": "expert",
    "group": ("data", "fsdp"),
}
# Below this many elements (256 KiB in float32) gathering an array costs more latency than holding it costs memory.
FALLBACK_MIN_SIZE = 2**16


class Placement(NamedTuple):
    """One row of the sharding table."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    bytes_per_device: int
    note: str  # what was dropped or fell back, "" when a rule fitted as written


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Tell the partitioner how an activation is split, by the meaning of its dimensions; a no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if len(names) != x.ndim:
        raise ValueError(f"constrain: {len(names)} names {tuple(names)} for an array of shape {x.shape}.")
    axes = [ACTIVATION_AXES.get(name) if name else None for name in names]
    sizes = dict(mesh.shape)
    return jax.lax.with_sharding_constraint(
        x, P(*(_fitting(a, d, sizes)[0] for a, d in zip(axes, x.shape, strict=True)))
    )


def _fitting(axis: Axis, dim: int, sizes: dict[str, int]) -> tuple[Axis, str]:
    """The axis if it divides the dimension, else None and the reason."""
    names = (axis,) if isinstance(axis, str) else tuple(axis or ())
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
    """A mesh and the rules that place arrays on it."""

    mesh: Mesh
    rules: tuple[Rule, ...] = field(default=())

    def with_rules(self, rules: Sequence[Rule]) -> Layout:
        """A layout that tries these rules after its own: the config's come first, then the family's."""
        return Layout(self.mesh, (*self.rules, *rules))

    @property
    def batch_ways(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def batch(self) -> NamedSharding:
        """Rows over `BATCH_AXES`, the other dimensions whole."""
        return NamedSharding(self.mesh, P(BATCH_AXES))

    def place(self, tree: Any) -> Any:
        """A tree of `NamedSharding` for a tree of arrays or abstract arrays."""
        patterns = compile_patterns([pattern for pattern, _ in self.rules], setting="mesh.rules")
        return map_with_path(lambda path, x: NamedSharding(self.mesh, self._spec(path, x.shape, patterns)[0]), tree)

    def table(self, tree: Any) -> list[Placement]:
        """Every array's placement and what had to give way, largest first."""
        patterns = compile_patterns([pattern for pattern, _ in self.rules], setting="mesh.rules")
        rows = []
        for path, x in flatten(tree).items():
            spec, note = self._spec(path, x.shape, patterns)
            shard = NamedSharding(self.mesh, spec).shard_shape(x.shape)
            rows.append(Placement(path, x.shape, str(x.dtype), spec, math.prod(shard) * _itemsize(x.dtype), note))
        return sorted(rows, key=lambda row: -row.bytes_per_device)

    def _spec(self, path: str, shape: tuple[int, ...], patterns: Sequence[Any]) -> tuple[P, str]:
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

"""Start a model from another one's parameters: rename, restack, resize, and say what did not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.paths import compile_patterns, flatten, map_with_path

_BLOCK = re.compile(r"(^|/)block_(\d+)/")
_BLOCKS = re.compile(r"(^|/)blocks/")

# (regex on a table's path, function from a table (N, D) and another N to a table of that length).
Resize = tuple[str, Callable[[jax.Array, int], jax.Array]]


def _linear(table_ND: jax.Array, length: int) -> jax.Array:
    return jax.image.resize(table_ND, (length, table_ND.shape[1]), "linear", antialias=False)


# Positions in a line. A family whose tables are laid out otherwise says so by a `RESIZE` of its own.
LINE: tuple[Resize, ...] = ((r"position_embedding/embedding$", _linear),)


class Misfit(UserError):
    """A donor does not fit; `why` says so without the settings of training that could mend it."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class Report(NamedTuple):
    """What `transfer` did, by parameter path."""

    taken: list[str]
    missing: list[str]  # in the model, not in the donor: left as initialised
    extra: list[str]  # in the donor, not in the model: left out
    resized: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} parameters taken"]
        for name in ("resized", "missing", "extra"):
            paths = getattr(self, name)
            if paths:
                shown = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
                parts.append(f"{len(paths)} {name}: {shown}")
        return "; ".join(parts)


def transfer(
    donor: dict[str, jax.Array],
    params: Any,
    *,
    rename: Sequence[Any] = (),
    layers: Sequence[int] | None = None,
    resize_positions: bool = False,
    resize: Sequence[Resize] = LINE,
) -> tuple[Any, Report]:
    """The model's parameters with the donor's values where paths agree.

    Args:
      donor: `{path: array}`; layers may be stacked (`blocks/`) or not (`block_0/`) on either side.
      params: the freshly initialised tree; its shapes, dtypes and shardings stay.
      rename: `(regex, replacement)` pairs, applied in order to the donor's paths.
      layers: of the donor, the ones that become this model's, in this order (Sanh et al. 2019, section 3); all if None.
      resize_positions: interpolate position tables of another length.
      resize: which tables those are, and how.

    Raises:
      Misfit: shapes differ (all are listed), layers are not there, `rename` names nothing of the donor's or several parameters
        alike, or nothing at all fits.
      UserError: a rule of `rename` is no pair with a regex, or `layers` are not as many as those of one of the
        model's stacks.
    """
    target = flatten(params)
    renamed = _rename(donor, rename)
    source = _restack(
        renamed if layers is None else _chosen(renamed, layers, _depths(target)),
        stacked=any(_BLOCKS.search(path) for path in target),
    )
    resized, wrong, values = [], [], {}
    for path, leaf in target.items():
        if path not in source:
            continue
        value = source[path]
        if value.shape != leaf.shape:
            same_but_length = value.ndim == 2 and leaf.ndim == 2 and value.shape[1] == leaf.shape[1]
            interpolate = next((function for pattern, function in resize if re.search(pattern, path)), None)
            if interpolate is not None and same_but_length and resize_positions:
                value = interpolate(value, leaf.shape[0])
                resized.append(path)
            else:
                hint = " (checkpoint.resize_positions=True would interpolate)" if interpolate is not None else ""
                wrong.append((f"{path}: donor {value.shape}, model {leaf.shape}", hint))
                continue
        values[path] = value
    if wrong:
        listed = "".join(f"\n  {difference}{hint}" for difference, hint in wrong)
        raise Misfit(f"checkpoint.init_from: these parameters have another shape:{listed}", why=wrong[0][0])
    if not values:
        raise Misfit(
            "checkpoint.init_from: no parameter of the donor fits this model. Donor: "
            f"{', '.join(list(source)[:5])} ...; model: {', '.join(list(target)[:5])} ... Use checkpoint.rename.",
            why="none of its parameters fits",
        )
    report = Report(
        sorted(values), sorted(set(target) - set(source)), sorted(set(source) - set(target)), sorted(resized)
    )

    def place(path: str, leaf: jax.Array) -> jax.Array:
        if path not in values:
            return leaf
        return jax.device_put(jnp.asarray(values[path], leaf.dtype), leaf.sharding)

    return map_with_path(place, params), report


def _rename(donor: dict[str, jax.Array], rules: Sequence[Any]) -> dict[str, jax.Array]:
    for rule in rules:
        if len(rule) != 2:
            raise UserError(f"checkpoint.rename: {rule!r} is not a pair (regex, replacement).")
        (pattern,) = compile_patterns([rule[0]], setting="checkpoint.rename")
        renamed = {pattern.sub(rule[1], path): value for path, value in donor.items()}
        if list(renamed) == list(donor):
            raise Misfit(
                f"checkpoint.rename: {rule[0]!r} matches no parameter of the donor.",
                why=f"it has no parameter that {rule[0]!r} renames",
            )
        if len(renamed) < len(donor):
            raise Misfit(
                f"checkpoint.rename: {rule!r} gives several parameters the same name.",
                why=f"{rule!r} gives several of its parameters the same name",
            )
        donor = renamed
    return donor


def _depths(params: dict[str, jax.Array]) -> dict[str, int]:
    """Layers of each stack, by its path."""
    found: dict[str, int] = {}
    for path, x in params.items():
        if one := _BLOCK.search(path):
            stack = path[: one.start()]
            found[stack] = max(found.get(stack, 0), int(one[2]) + 1)
        elif stacked := _BLOCKS.search(path):
            found[path[: stacked.start()]] = x.shape[0]
    return found


def _chosen(donor: dict[str, jax.Array], layers: Sequence[int], wanted: dict[str, int]) -> dict[str, jax.Array]:
    """Some of the layers of each stack that is wanted, numbered anew, as many as are wanted."""
    out: dict[str, jax.Array] = {}
    depths = {stack: depth for stack, depth in _depths(donor).items() if stack in wanted}
    if not depths:
        raise Misfit(
            f"checkpoint.layers={tuple(layers)}: no stack of layers of the donor is where one of this model's is. Use checkpoint.rename.",
            why="it has no stack of layers where one is wanted",
        )
    for stack, depth in depths.items():
        of = f" in {stack}" if len(depths) > 1 else ""
        for i in layers:
            if not 0 <= i < depth:
                raise Misfit(
                    f"checkpoint.layers={tuple(layers)}: the donor has layers 0 to {depth - 1}{of}.",
                    why=f"it has layers 0 to {depth - 1}{of}, and layer {i} was taken",
                )
        if len(layers) != wanted[stack]:
            raise UserError(
                f"checkpoint.layers={tuple(layers)} are {len(layers)}, and this model has {wanted[stack]} layers{of}."
            )
    for path, value in donor.items():
        if (found := _BLOCK.search(path)) and path[: found.start()] in depths:
            for new, old in enumerate(layers):
                if old == int(found[2]):
                    out[_BLOCK.sub(rf"\g<1>block_{new}/", path)] = value
        elif (found := _BLOCKS.search(path)) and path[: found.start()] in depths:
            out[path] = value[jnp.asarray(layers)]
        else:
            out[path] = value
    return out


def _restack(donor: dict[str, jax.Array], *, stacked: bool) -> dict[str, jax.Array]:
    """Layers as one array with a leading axis, or as one array each."""
    out: dict[str, jax.Array] = {}
    layers: dict[str, dict[int, jax.Array]] = {}
    for path, value in donor.items():
        if stacked and (found := _BLOCK.search(path)):
            layers.setdefault(_BLOCK.sub(r"\1blocks/", path), {})[int(found[2])] = value
        elif not stacked and _BLOCKS.search(path):
            for i in range(value.shape[0]):
                out[_BLOCKS.sub(rf"\g<1>block_{i}/", path)] = value[i]
        else:
            out[path] = value
    for path, by_index in layers.items():
        if sorted(by_index) != list(range(len(by_index))):
            why = f"layers {sorted(by_index)} of {path} have gaps; they cannot be stacked"
            raise Misfit(f"checkpoint.init_from: {why}.", why)
        out[path] = jnp.stack([by_index[i] for i in range(len(by_index))])
    return out

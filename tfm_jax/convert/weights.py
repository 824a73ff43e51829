"""Move parameters between a table's two sides, one array at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import jax
import ml_dtypes
import numpy as np

from tfm_jax.convert.table import Conversion, Row, Section, located
from tfm_jax.convert.tensors import Tensors
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten, map_with_path


def read_params(
    conversion: Conversion, section: Section, abstract: Any, theirs: Mapping[str, np.ndarray], *, where: str
) -> Any:
    """Our parameters from their tensors, each made where it lives and the next one read only then.

    Args:
      section: the resolved `model` section.
      abstract: our parameter tree of arrays or abstract arrays; a leaf's sharding, if it has one, is used.
      theirs: tensors by name; a `Tensors` is read lazily.

    Raises:
      UserError: tensors are missing, left over, or of another shape: all are listed.
    """
    rows = conversion.table(section)
    wanted = {row.theirs for row in rows}
    every = names_in_file(conversion, theirs, wanted)
    names = {name: found[0] for name, found in every.items()}
    for repeated, source in conversion.ties(section).items():
        for missing, there in ((repeated, source), (source, repeated)):
            if missing in wanted and there in names:
                names.setdefault(missing, names[there])
    twice = [f"  {name}: is there as {' and '.join(found)}" for name, found in every.items() if len(found) > 1]
    _check(conversion, section, rows, abstract, theirs, names, where, twice)
    found = {path: (row, i) for row in rows for i, path in enumerate(row.ours)}
    leaves = flatten(abstract)
    pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for path in found:
        where_to, place = located(path, leaves)
        pieces.setdefault(where_to, []).append((path, place))

    def one(path: str) -> np.ndarray:
        row, i = found[path]
        return row.read(theirs[names[row.theirs]])[i]

    def leaf(path: str, like: Any) -> jax.Array:
        if path in found:
            value = np.ascontiguousarray(one(path), dtype=like.dtype)
        else:
            value = np.empty(like.shape, like.dtype)
            for piece, place in pieces[path]:
                value[place] = one(piece)
        placed: jax.Array = jax.device_put(value, getattr(like, "sharding", None))
        return placed

    return map_with_path(leaf, abstract)


def read_parts(
    conversions: Mapping[str, Conversion],
    sections: Mapping[str, Section],
    abstract: Any,
    theirs: Mapping[str, Mapping[str, np.ndarray]],
    *,
    where: str,
) -> Any:
    """`read_params` of a model that comes in parts; what several of them hold must be the same in each.

    Args:
      conversions, sections, theirs: by the name of the part, as in `huggingface.Folder`.

    Raises:
      UserError: as `read_params`, or parts differ in what they share.
    """
    params: dict[str, Any] = {}
    for part, conversion in conversions.items():
        mine = {path.partition("/")[0] for row in conversion.table(sections[part]) for path in row.ours}
        wanted = {name: abstract[name] for name in abstract if name in mine or len(conversions) == 1}
        found = read_params(conversion, sections[part], wanted, theirs[part], where=f"{where}/{part}".rstrip("/"))
        both = {name: params[name] for name in found if name in params}
        other = flatten({name: found[name] for name in both})
        differing = [path for path, x in flatten(both).items() if not np.array_equal(x, other[path])]
        if differing:
            raise UserError(f"{where}: its parts share these, but differ in them:\n  " + "\n  ".join(differing))
        params |= found
    return params


def write_tensors_of(
    conversion: Conversion, section: Section, params: Any
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Their tensors from our parameters: the shapes by name, and a function that makes one."""
    leaves = flatten(params)
    rows = {row.theirs: row for row in conversion.table(section)}

    def ours(path: str) -> np.ndarray:
        whole, place = located(path, leaves)
        return np.asarray(leaves[whole][place])

    def make(name: str) -> np.ndarray:
        row = rows[name]
        return row.write([ours(path) for path in row.ours])

    def shape(row: Row) -> tuple[int, ...]:
        # `write` moves numbers only, so that views of a single zero tell the shape.
        blank = [np.broadcast_to(np.float32(0), _shape(leaves, path)) for path in row.ours]
        return tuple(row.write(blank).shape)

    return {name: shape(row) for name, row in rows.items()}, make


def _shape(leaves: Mapping[str, Any], path: str) -> tuple[int, ...]:
    whole, place = located(path, leaves)
    return tuple(leaves[whole].shape[len(place) :])


def names_in_file(conversion: Conversion, theirs: Iterable[str], wanted: Set[str]) -> dict[str, list[str]]:
    """`{name in the table: names in the file that stand for it}`; a file should have one for each.

    Files from TensorFlow's days call a norm's weights gamma and beta, those saved from a trunk lack its prefix, and a
    trunk's may have it.
    """
    out: dict[str, list[str]] = {}
    prefix, trunk = conversion.prefix, f"{conversion.model_type}."
    bare = bool(prefix) and not any(name.startswith(prefix) for name in theirs)
    for name in theirs:
        plain = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        if bare and plain not in wanted and f"{prefix}{plain}" in wanted:
            plain = f"{prefix}{plain}"
        elif not prefix and plain not in wanted and plain.removeprefix(trunk) in wanted:
            plain = plain.removeprefix(trunk)
        out.setdefault(plain, []).append(name)
    return out


def _check(
    conversion: Conversion,
    section: Section,
    rows: Sequence[Row],
    abstract: Any,
    theirs: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    where: str,
    lines: list[str],
) -> None:
    want, have = {row.theirs for row in rows}, set(names)
    optional = {row.theirs for row in rows if not row.ours}
    ties = conversion.ties(section)
    skipped = {name for name in have if any(re.search(pattern, name) for pattern in conversion.skip)}
    lines += [f"  {name}: missing" for name in sorted(want - have - optional)]
    for name in sorted(have - want - skipped):
        if name not in ties:
            lines.append(f"  {name}: {_shape_of(theirs, names[name])} has no place in the model")
        elif ties[name] in have and not np.array_equal(theirs[names[name]], theirs[names[ties[name]]]):
            lines.append(f"  {name}: differs from {ties[name]}, to which the config ties it")
    leaves = flatten(abstract)
    covered = set()
    for row in rows:
        shapes = []
        for path in row.ours:
            covered.add(located(path, leaves)[0])
            shapes.append(_shape(leaves, path))
        if row.theirs in have:
            expected = row.write([np.broadcast_to(np.float32(0), shape) for shape in shapes]).shape
            found = _shape_of(theirs, names[row.theirs])
            if tuple(expected) != found:
                lines.append(f"  {row.theirs}: {found}, but the config makes it {tuple(expected)}")
            elif not row.ours and not _close(theirs[names[row.theirs]], row.write([])):
                lines.append(f"  {row.theirs}: is not what this model computes in its place")
    assert covered == set(leaves), f"The table of {conversion.architecture} leaves out {set(leaves) - covered}."
    if lines:
        more = [f"  ... and {len(lines) - 40} more"] if len(lines) > 40 else []
        raise UserError(
            f"{where} does not fit its config ({conversion.architecture}):\n" + "\n".join(lines[:40] + more)
        )


def _close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal but for rounding, to the file's precision."""
    atol = 4 * float(ml_dtypes.finfo(found.dtype).eps) * float(np.max(np.abs(expected), initial=0))
    return np.allclose(found.astype(np.float64), expected, rtol=0, atol=atol)


def _shape_of(theirs: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    return tuple(theirs.shapes[name] if isinstance(theirs, Tensors) else theirs[name].shape)

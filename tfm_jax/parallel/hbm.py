"""What a compiled program reads from and writes to a chip's memory: the buffers of its instructions, each as often as it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tfm_jax.parallel.hlo import array_bytes, computations_of, runs_of


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: list[str]
    line: str


_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
# These move nothing, or what they move is counted where it comes from.
_IDLE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "opt-barrier",
}  # fmt: skip
_SAME = ("bitcast", "reshape", "copy", "convert")


def moved(text: str) -> float:
    """Bytes to and from memory in a run of an optimized HLO module.

    What a compiler keeps on the chip itself (memory space 1) moves when it is brought there. Of a buffer of which a fusion takes a
    slice, or in which it changes one, only the slice moves.
    """
    lines, entry = computations_of(text)
    runs, _ = runs_of(lines, entry)
    parsed = {name: [one for line in body if (one := _parsed(line))] for name, body in lines.items()}
    total = 0.0
    for name in _flow(parsed, entry):
        shapes = {one.name: one.shape for one in parsed[name]}
        total += runs.get(name, 0) * sum(_bytes_of(one, shapes, parsed) for one in parsed[name])
    return total


def _parsed(line: str) -> Instruction | None:
    found = _LINE.match(line)
    if found is None:
        return None
    name, shape, kind, rest = found.groups()
    arguments = re.split(r"\)(?:,|$)", rest, maxsplit=1)[0]
    return Instruction(name, shape, kind, re.findall(r"%([\w.\-]+)", arguments), line)


def _flow(parsed: Mapping[str, Sequence[Instruction]], entry: str) -> Iterator[str]:
    """The computations whose instructions run one by one: the first, and bodies and branches of those that do."""
    waiting, seen = [entry], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in parsed:
            continue
        seen.add(name)
        yield name
        for one in parsed[name]:
            if one.kind in ("while", "conditional", "call"):
                for names in re.findall(
                    r"(?:body|branch_computations|true_computation|false_computation|to_apply)=(\{[^}]*\}|%?[\w.\-]+)",
                    one.line,
                ):
                    waiting += re.findall(r"[\w.\-]+", names)


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array of a type, and whether it lies in memory."""
    out = []
    for dtype, dims, layout in _SHAPE.findall(shape):
        out.append((array_bytes(dtype, dims), not re.search(r"S\([1-9]", layout)))
    return out


def _size(shape: str) -> int:
    """Bytes of all arrays of a type, wherever they lie."""
    return sum(size for size, _ in _arrays(shape))


def _bytes_of(one: Instruction, shapes: Mapping[str, str], parsed: Mapping[str, Sequence[Instruction]]) -> float:
    if one.kind in _IDLE or one.kind.endswith("-done") or '"AllocateBuffer"' in one.line:
        return 0.0
    if one.kind in ("copy-start", "slice-start"):
        return float(_arrays(one.shape)[0][0])
    if one.kind.endswith("-start"):
        return 0.0
    given = [sum(size for size, there in _arrays(shapes.get(name, "")) if there) for name in one.operands]
    results = [size if there else 0 for size, there in _arrays(one.shape)]
    if (inside := _callee(one, parsed)) is not None:
        given = [min(size, _taken(i, size, inside, parsed)) for i, size in enumerate(given)]
        results = [min(size, changed) for size, changed in zip(results, _changed(inside, parsed), strict=True)]
    elif one.kind == "dynamic-slice":
        given = results
    elif one.kind == "dynamic-update-slice":
        given, results = [0], [given[1]]
    return float(sum(given) + sum(results))


def _callee(one: Instruction, parsed: Mapping[str, Sequence[Instruction]]) -> Sequence[Instruction] | None:
    found = re.search(r"calls=%?([\w.\-]+)", one.line) if one.kind == "fusion" else None
    return parsed[found[1]] if found else None


def _taken(place: int, size: int, inside: Sequence[Instruction], parsed: Mapping[str, Sequence[Instruction]]) -> int:
    """How much of its operand a fusion reads, fusions in it included."""
    names = {one.name for one in inside if one.kind == "parameter" and f"parameter({place})" in one.line}
    total, grew = 0, True
    while grew:
        grew = False
        for one in inside:
            if one.kind in _SAME and one.name not in names and names & {*one.operands}:
                names.add(one.name)
                grew = True
    users = [one for one in inside if names & {*one.operands} and one.name not in names]
    for user in users:
        if user.kind in ("dynamic-slice", "slice") and user.operands[0] in names:
            total += _size(user.shape)
        elif (deeper := _callee(user, parsed)) is not None:
            total += sum(_taken(i, size, deeper, parsed) for i, name in enumerate(user.operands) if name in names)
        elif user.kind != "dynamic-update-slice" or user.operands[0] not in names:
            return size
    return total if users else size


def _changed(inside: Sequence[Instruction], parsed: Mapping[str, Sequence[Instruction]]) -> list[int]:
    """How much a fusion writes of each of its results."""
    by_name = {one.name: one for one in inside}
    root = next(one for one in inside if one.line.lstrip().startswith("ROOT"))
    out: list[int] = []
    for one in [by_name[name] for name in root.operands] if root.kind == "tuple" else [root]:
        while one.kind in _SAME and one.operands[0] in by_name:
            one = by_name[one.operands[0]]
        if one.kind == "dynamic-update-slice":
            out.append(_size(by_name[one.operands[1]].shape))
        elif (deeper := _callee(one, parsed)) is not None:
            out += _changed(deeper, parsed)
        else:
            out += [size for size, _ in _arrays(one.shape)]
    return out

"""What a compiled program reads from and writes to a chip's memory: the buffers of its instructions, each as often as it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tfm_jax.parallel.hlo import bits_of, computations_of, runs_of


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
                for names in re.findall(r"(?:body|branch_computations|to_apply)=(\{[^}]*\}|%?[\w.\-]+)", one.line):
                    waiting += re.findall(r"[\w.\-]+", names)


def _sizes(shape: str, *, everywhere: bool = False) -> list[int]:
    """Bytes of each array of a type that lies in memory, or wherever it lies."""
    out = []
    for dtype, dims, layout in _SHAPE.findall(shape):
        if everywhere or not re.search(r"S\([1-9]", layout):
            size = bits_of(dtype) // 8 or 1
            for d in dims.split(","):
                size *= int(d) if d else 1
            out.append(size)
    return out


def _bytes_of(one: Instruction, shapes: Mapping[str, str], parsed: Mapping[str, Sequence[Instruction]]) -> float:
    if one.kind in _IDLE or one.kind.endswith("-done"):
        return 0.0
    if one.kind in ("copy-start", "slice-start"):
        return float(_sizes(one.shape, everywhere=True)[0])
    if one.kind.endswith("-start"):
        return 0.0
    given = [sum(_sizes(shapes.get(name, ""))) for name in one.operands]
    result = sum(_sizes(one.shape))
    if one.kind == "fusion" and (callee := re.search(r"calls=%?([\w.\-]+)", one.line)):
        inside = parsed.get(callee[1], [])
        given = [min(size, _taken(i, size, inside)) for i, size in enumerate(given)]
        result = min(result, _changed(result, inside))
    elif one.kind == "dynamic-slice":
        given = [result]
    elif one.kind == "dynamic-update-slice":
        given, result = [0], given[1]
    return float(sum(given) + result)


def _taken(place: int, size: int, inside: Sequence[Instruction]) -> int:
    """How much of its operand a fusion reads."""
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
            total += sum(_sizes(user.shape, everywhere=True))
        elif user.kind != "dynamic-update-slice" or user.operands[0] not in names:
            return size
    return total if users else size


def _changed(size: int, inside: Sequence[Instruction]) -> int:
    """How much of its result a fusion writes."""
    shapes = {one.name: one.shape for one in inside}
    changes = [one for one in inside if one.kind == "dynamic-update-slice"]
    if not changes or not any("ROOT" in one.line and one.kind in ("dynamic-update-slice", *_SAME) for one in inside):
        return size
    return sum(sum(_sizes(shapes[one.operands[1]], everywhere=True)) for one in changes if len(one.operands) > 1)

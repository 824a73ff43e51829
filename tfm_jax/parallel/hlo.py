"""What a compiled program moves between devices: the collectives of its HLO, each as often as its loops run it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      size: bytes of its largest side on one device: what a gather gives, what a scatter is given.
      axes: of the mesh, along which its groups lie; empty where they do not follow the mesh.
      group: devices in a group.
      times: how often a run of the program does it.
      members: the partitions of its first group.
      hidden: whether the compiler has put other work between its start and its end.
      across: whether it goes from slice to slice, over the data-centre network.
    """

    kind: str
    size: int
    axes: tuple[str, ...]
    group: int
    times: int
    members: tuple[int, ...] = ()
    hidden: bool = False
    across: bool = False


class Program(NamedTuple):
    """The collectives of a program, and how many of its loops do not say how often they run (counted once)."""

    collectives: list[Collective]
    endless: int


def read(text: str, mesh: Mapping[str, int]) -> Program:
    """The collectives in the text of an optimized HLO module.

    A collective that a compiler has spread over several fusions, from its start to its end, is one: its channel says so. The TPU
    compiler makes one program for all slices, whose partitions are those of the first; between slices they send and receive.

    Args:
      mesh: sizes of its axes; the program's partitions are numbered along it. Slices are the outermost part of the first axis.
    """
    computations, entry = computations_of(text)
    runs, endless = runs_of(computations, entry)
    found: list[Collective] = []
    spread: dict[str, list[tuple[bool, Collective]]] = {}
    for name, lines in computations.items():
        begins = any('"AsyncCollectiveStart"' in line for line in lines)
        for number, line in enumerate(lines):
            if (sent := _sent(lines, number, next(iter(mesh)), runs.get(name, 0))) is not None and sent.times:
                found.append(sent)
            made, channel = _collective(lines, number, mesh, runs.get(name, 0)), re.search(r"channel_id=(\d+)", line)
            if made is not None and made.times:
                # A product in pieces, each of which is sent on while the next is worked on (Wang et al. 2023).
                made = dataclasses.replace(made, hidden=made.hidden or "windowed_dot_general" in name)
                if channel is None:
                    found.append(made)
                else:
                    spread.setdefault(channel[1], []).append((begins, made))
    for pieces in spread.values():
        # Those in the middle of one that is spread over fusions run as often as what it is hidden behind.
        started = [dataclasses.replace(one, hidden=True) for begins, one in pieces if begins]
        found += started[:1] or [one for _, one in pieces]
    return Program(found, endless)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first one to run."""
    out: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if found := _HEAD.match(line):
            name = found[2]
            out[name] = []
            entry = name if found[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            name = ""
        elif name and line.startswith(" "):
            out[name].append(line)
        elif name and out[name]:
            # A kernel's instruction, whose attributes go over several lines.
            out[name][-1] += line
    return out, entry


_CALLS = re.compile(
    r"(calls|to_apply|branch_computations|called_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


def runs_of(computations: Mapping[str, list[str]], entry: str) -> tuple[dict[str, int], int]:
    """How often each computation runs, and how many loops do not say."""
    endless = 0
    called: dict[str, list[tuple[str, int]]] = {}
    for name, lines in computations.items():
        calls = called.setdefault(name, [])
        for line in lines:
            calls += [(callee, 1) for _, names in _CALLS.findall(line) for callee in re.findall(r"[\w.\-]+", names)]
            if loop := _LOOP.search(line):
                times = _turns(line, computations.get(loop[1], []))
                endless += times is None
                calls.append((loop[2], times or 1))
    runs: dict[str, int] = {}

    def run(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for callee, each in called.get(name, ()):
            run(callee, times * each)

    run(entry, 1)
    return runs, endless


def _turns(line: str, condition: Sequence[str]) -> int | None:
    """How often a loop's body runs: as it says, or what its counter, from 0 on, is compared with."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(found[1])
    text = "\n".join(condition)
    limits = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in text else None


_OP = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def _collective(lines: Sequence[str], number: int, mesh: Mapping[str, int], times: int) -> Collective | None:
    found = _OP.search(lines[number])
    if found is None:
        return None
    shapes, kind, started = found.groups()
    if started and kind != "all-reduce":
        # What goes in and what comes out, each an array or several that travel together.
        shapes = _sides(shapes)[kind != "reduce-scatter"]
    size = sum(array_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(shapes))
    if not size:
        return None
    groups = _groups(lines[number], math.prod(mesh.values()))
    count = len(groups[0])
    if kind == "reduce-scatter" and not started:
        size *= count
    hidden = bool(started) and _busy(lines, number, rf"{kind}-done")
    return Collective(kind, size, _axes(groups, mesh), count, times, tuple(groups[0]), hidden)


def _sides(shapes: str) -> tuple[str, str]:
    """The two first parts of a tuple's type."""
    plain = re.sub(r"\{[^}]*\}", "", shapes)
    parts = re.findall(r"\(([^()]*)\)", plain) if plain.startswith("((") else re.findall(r"\w+\[[\d,]*\]", plain)
    return parts[0], parts[1]


_WORK = re.compile(r" (fusion|while|call|convolution|custom-call|dot)\(")


def _busy(lines: Sequence[str], number: int, done: str) -> bool:
    """Whether there is other work between a line and the one that ends what it begins."""
    name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", lines[number])
    ends = [i for i, line in enumerate(lines) if name and re.search(rf" {done}\(.*%?{re.escape(name[1])}\)", line)]
    return any(_WORK.search(line) for line in lines[number + 1 : min(ends, default=0)])


# What a slice's runtime calls its exchanges with others.
_TRANSFERS = {
    "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter", "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
_SEND = re.compile(r"= \((.*?), u32\[\].* send\(.*rendezvous=\"(.*?)\".*_xla_megascale_transfer_type=\"(\w+)\"")


def _sent(lines: Sequence[str], number: int, axis: str, times: int) -> Collective | None:
    """What a line sends to the same chip of other slices."""
    found = _SEND.search(lines[number])
    if found is None:
        return None
    shape, meeting, kind = found.groups()
    slices = re.search(r"_xla_megascale_target=\"\{([\d,]+)\}x", lines[number])
    group = len(slices[1].split(",")) if slices else 2
    size = sum(array_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(shape))
    if kind == "ALL_GATHER":
        size *= group
    received = [re.search(r"%?([\w.\-]+) = .* recv\(", line) for line in lines if f'rendezvous="{meeting}"' in line]
    names = {one[1] for one in received if one}
    ends = [
        i for i, line in enumerate(lines) if (end := re.search(r" recv-done\(%?([\w.\-]+)\)", line)) and end[1] in names
    ]
    busy = any(_WORK.search(line) for line in lines[number : min(ends, default=0)])
    return Collective(_TRANSFERS[kind], size, (axis,), group, times, hidden=busy, across=True)


def array_bytes(dtype: str, dims: str) -> int:
    """Of an array by the words of its type: `bf16`, `8,128`."""
    return math.prod(int(d) for d in dims.split(",") if d) * max(bits_of(dtype) // 8, 1)


def bits_of(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype))


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of partitions that talk to each other; pairs, for a permutation."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", line):
        return [[int(i) for i in group.split(",")] for group in found[1].split("},{")]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=" + _ORDER, line):
        groups: list[list[int]] = _ordered(*found.groups()[1:]).reshape(int(found[1].split(",")[0]), -1).tolist()
        return groups
    if found := re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_ORDER}\))?\s*\{{(.*?)\}}", line):
        sizes, shape, turned, axes = found.groups()
        return _named_groups(sizes, axes, None if shape is None else _ordered(shape, turned))
    if "replica_groups={}" in line or "replica_groups=" not in line:
        return [list(range(devices))]
    raise ValueError(f"Groups of devices in a spelling that is not known: {line.strip()[:300]}")


# Numbers from 0 on in this shape, its axes in another order: `[2,4]T(1,0)`.
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _ordered(shape: str, turned: str | None) -> np.ndarray:
    sizes = [int(i) for i in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids if turned is None else ids.transpose([int(i) for i in turned.split(",")])


def _named_groups(sizes: str, axes: str, ids: np.ndarray | None) -> list[list[int]]:
    """Groups along axes of a mesh that the compiler has made up; `'a':(2)4` is a part of an axis, 4 wide behind 2."""
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(shape.values())) if ids is None else ids
    split: list[tuple[str, int, bool]] = []
    parts = {name: (int(before or 1), int(width or shape[name])) for name, before, width in
             re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}  # fmt: skip
    for name, size in shape.items():
        before, width = parts.get(name, (1, 1))
        split += [(name, before, False), (name, width, name in parts), (name, size // before // width, False)]
    ids = ids.reshape([size for _, size, _ in split])
    along = [i for i, (_, _, chosen) in enumerate(split) if chosen]
    others = [i for i in range(len(split)) if i not in along]
    groups: list[list[int]] = ids.transpose(others + along).reshape(-1, math.prod(split[i][1] for i in along)).tolist()
    return groups


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which members of a group differ."""
    names, places = list(mesh), np.array(np.unravel_index(np.array(groups[0]), tuple(mesh.values())))
    return tuple(name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1)

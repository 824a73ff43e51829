"""How another library's tensors and config fields stand for ours: the vocabulary of the tables, one a family.

A table is read in both directions. Tensor names are templates in which `{i}` is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Section = Mapping[str, Any]  # a resolved config's `model`
_BLOCK = re.compile(r"(^|/)block_(\d+)/")
_EXPERT = re.compile(r"expert_(\d+)/")


@dataclass(frozen=True)
class Row:
    """One of their tensors, as one or more of ours.

    Attributes:
      theirs: its name.
      ours: parameter paths, layers unrolled (`stack/block_{i}/mlp/up/kernel`); none for a tensor that is computed.
      read: from their array to ours, one for each path.
      write: back; exactly, since it only moves numbers.
    """

    theirs: str
    ours: tuple[str, ...]
    read: Callable[[np.ndarray], Sequence[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]


def same(theirs: str, ours: str) -> list[Row]:
    return [Row(theirs, (ours,), lambda x: (x,), lambda x: x[0])]


def transposed(theirs: str, ours: str) -> list[Row]:
    return [Row(theirs, (ours,), lambda x: (x.T,), lambda x: x[0].T)]


def reshaped(theirs: str, ours: str, shape: tuple[int, ...], their_shape: tuple[int, ...]) -> list[Row]:
    """Their (1, 1, D) is our (D,), and the like."""
    return [Row(theirs, (ours,), lambda x: (x.reshape(shape),), lambda x: x[0].reshape(their_shape))]


def computed(theirs: str, make: Callable[[], np.ndarray]) -> list[Row]:
    """A tensor of theirs that no parameter of ours stands for: a file has just this value, or leaves it out."""
    return [Row(theirs, (), lambda x: (), lambda x: make())]


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Row]:
    """PyTorch's Linear, whose weight is (out, in)."""
    rows = transposed(f"{theirs}.weight", f"{ours}/kernel")
    return rows + same(f"{theirs}.bias", f"{ours}/bias") if bias else rows


def norm(theirs: str, ours: str, *, bias: bool = True) -> list[Row]:
    rows = same(f"{theirs}.weight", f"{ours}/scale")
    return rows + same(f"{theirs}.bias", f"{ours}/bias") if bias else rows


def embedding(theirs: str, ours: str) -> list[Row]:
    return same(f"{theirs}.weight", f"{ours}/embedding")


def fused(theirs: str, ours: Sequence[str], *, axis: int) -> list[Row]:
    """One tensor that is several of ours, of equal size, side by side along an axis."""

    def read(x: np.ndarray) -> list[np.ndarray]:
        return np.split(x, len(ours), axis)

    return [Row(theirs, tuple(ours), read, lambda x: np.concatenate(x, axis))]


def each_layer(rows: Sequence[Row], layers: int) -> list[Row]:
    """Rows whose names have `{i}`, for every layer."""
    return [
        Row(row.theirs.format(i=i), tuple(path.format(i=i) for path in row.ours), row.read, row.write)
        for i in range(layers)
        for row in rows
    ]


def located(path: str, leaves: Container[str]) -> tuple[str, tuple[int, ...]]:
    """Where a table's parameter is among those of a model: the path of its array, and its place in that.

    Experts of a mixture lie one behind the other, as `expert_{e}` in a table; the layers of a scanned stack do too.
    """
    place: tuple[int, ...] = ()
    if found := _EXPERT.search(path):
        path, place = path.replace(found[0], ""), (int(found[1]),)
    if path not in leaves and (found := _BLOCK.search(path)):
        path, place = _BLOCK.sub(r"\1blocks/", path), (int(found[2]), *place)
    return path, place


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass
class Fields:
    """Their config, and what was found wrong with it; every mistake is collected, so that one error lists all."""

    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def take(self, name: str, default: Any = None) -> Any:
        """A field that becomes one of ours. `default` is what their class takes where a file leaves it out.

        A value of another type than the default is a problem, and the default is given instead.
        """
        self.known.add(name)
        value = self.values.get(name, default)
        kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
        if default is None or (isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)):
            return value
        self.problems.append(f"{name}={value!r} is not {_KINDS.get(type(default), 'what it should be')}")
        return default

    def choose(self, name: str, default: Any, choices: Mapping[Any, Any]) -> Any:
        """Ours for theirs."""
        value = self.take(name, default)
        if not isinstance(value, Hashable) or value not in choices:
            self.problems.append(f"{name}={value!r} is not supported; what is: {', '.join(map(repr, choices))}")
            return next(iter(choices.values()))
        return choices[value]

    def need(self, name: str, *values: Any) -> None:
        """A field that changes the numbers and is supported only with these values; the first is the default."""
        value = self.take(name, values[0])
        if value not in values:
            self.problems.append(f"{name}={value!r} is not supported; what is: {', '.join(map(repr, values))}")

    def ignore(self, *names: str) -> None:
        """Fields that do not change what the model computes."""
        self.known.update(names)


@dataclass(frozen=True)
class Conversion:
    """A class of models elsewhere, and ours that is the same.

    Attributes:
      architecture: the name in their `config.json`, field `architectures`.
      model_type: theirs.
      family: our `model.name`.
      read: from their fields to our `model` section; says in `fields.problems` what cannot be.
      write: from a resolved `model` section to their fields.
      table: the rows for a resolved `model` section.
      ties: for such a section, names in a file that only repeat another tensor; those of a row are read from it where
        the file leaves them out.
      prefix: what a class puts before its trunk's names; files saved from the trunk alone leave it out.
      skip: patterns of names that have no place in the model and are left out: buffers, heads that it has not.
      data: the section `data` that a converted run begins with.
      task: its section `task`.
    """

    architecture: str
    model_type: str
    family: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Section], dict[str, Any]]
    table: Callable[[Section], list[Row]]
    ties: Callable[[Section], Mapping[str, str]] = lambda section: {}
    prefix: str = ""
    skip: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Joined:
    """A model of ours that is several of theirs, each in a folder of its own.

    Attributes:
      family: our `model.name`.
      parts: `{name of the folder: architecture}`; parameters that parts share are the same in each.
      split: from a resolved `model` section to those of the parts.
      join: from the parts' sections to the whole's; raises UserError where they do not fit together.
      data, task: as in a `Conversion`.
    """

    family: str
    parts: Mapping[str, str]
    split: Callable[[Section], dict[str, Section]]
    join: Callable[[Mapping[str, Section]], dict[str, Any]]
    data: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


# What activations are called there.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "relu": "relu"}

"""One compiled program for runs whose programs differ in numbers only.

A learning rate, a seed, a decay, a rate of dropout are numbers in a traced program. Where two runs' programs are the same but
for such numbers, these become arguments of one program, which is compiled once. So what may differ between the runs needs no
list: whatever leaves the program as it is.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.linear_util import WrappedFun

from tfm_jax.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Program:
    """What a traced program is without its numbers.

    Attributes:
      traced: the first of its kind.
      shape: its equations, one hashable thing each.
      numbers: its literals and constants, in the order of its equations.
      places: which of `numbers` differ between the runs seen so far.
    """

    traced: ClosedJaxpr
    shape: list[Any]
    numbers: list[Any]
    places: set[int] = field(default_factory=set)
    compiled: tuple[frozenset[int], Callable[..., Any]] | None = None


Caller = Callable[[Callable[..., Any], Mapping[str, Any], Sequence[Any]], Callable[..., Any]]


def in_turn(turns: int) -> Caller:
    """Calls are made one by one, so many of all programs at a time: threads take turns."""
    turn = threading.Semaphore(turns)

    def caller(function: Callable[..., Any], options: Mapping[str, Any], examples: Sequence[Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, **options).lower(*examples).compile()

        def call(*arguments: Any) -> Any:
            with turn:
                return jax.block_until_ready(compiled(*arguments))

        return call

    return caller


class Shared:
    """Used as `jax.jit` is: `jit(function, **options)`, then call it, or `.lower(*arguments).compile()`.

    Args:
      caller: makes, of a function, options of `jax.jit` and examples of its arguments, what threads call: `in_turn(turns)`, or
        `together.Together`.
    """

    def __init__(self, caller: Caller) -> None:
        self.programs: list[Program] = []
        self.caller = caller
        self._changing = threading.RLock()

    def __call__(self, function: Callable[..., Any], **options: Any) -> Jitted:
        return Jitted(self, function, options)

    def find(self, traced: ClosedJaxpr, options: str) -> tuple[Program, list[Any]]:
        """The program of a trace, new or known, and the trace's own numbers."""
        shape, numbers = list[Any]([options]), list[Any]()
        _read(traced.jaxpr, shape, numbers)
        numbers += traced.consts
        shape.append([_kind(const) for const in traced.consts])
        with self._changing:
            for program in self.programs:
                if program.shape == shape:
                    program.places |= {
                        i for i, pair in enumerate(zip(program.numbers, numbers, strict=True)) if _differ(*pair)
                    }
                    return program, numbers
            self.programs.append(Program(traced, shape, numbers))
            return self.programs[-1], numbers

    def compile(
        self, program: Program, make: Callable[[list[int]], Callable[..., Any]]
    ) -> tuple[list[int], Callable[..., Any]]:
        """The program with its places as they are now, compiled if it has not been yet."""
        with self._changing:
            places = frozenset(program.places)
            if program.compiled is None or program.compiled[0] != places:
                program.compiled = places, make(sorted(places))
            return sorted(places), program.compiled[1]


class Jitted:
    """A function that is traced for each run, and compiled for all."""

    def __init__(self, shared: Shared, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._shared, self._function, self._options = shared, function, options
        self._bound: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, tuple((x.shape, x.dtype) for x in leaves)
        if key not in self._bound:
            self._bound[key] = self.lower(*arguments).compile()
        return self._bound[key](*arguments)

    def lower(self, *arguments: Any) -> Lowered:
        return Lowered(
            self._shared, jax.jit(self._function, **self._options).trace(*arguments), self._options, arguments
        )


class Lowered:
    """A trace whose program is known, and may be another run's."""

    def __init__(self, shared: Shared, traced: Any, options: Mapping[str, Any], arguments: Any) -> None:
        self._shared, self._options, self._arguments = shared, options, arguments
        self._tree = jax.tree.structure(traced.out_info)
        self.program, self._numbers = shared.find(traced.jaxpr, f"{options} {self._tree}")

    def compile(self) -> Callable[..., Any]:
        places, compiled = self._shared.compile(self.program, self._compile)
        return functools.partial(compiled, self._at(places))

    def _at(self, places: Sequence[int]) -> list[np.ndarray]:
        return [np.asarray(self._numbers[i]) for i in places]

    def _compile(self, places: list[int]) -> Callable[..., Any]:
        program, tree = self.program, self._tree

        def with_numbers(numbers: Sequence[Any], *arguments: Any) -> Any:
            own: list[Any] = list(program.numbers)
            for place, number in zip(places, numbers, strict=True):
                own[place] = number
            literals: list[Literal] = []
            _read(program.traced.jaxpr, [], [], literals)
            count = len(literals)
            changed = {id(literals[i]): own[i] for i in places if i < count}
            out = _evaluate(program.traced.jaxpr, own[count:], jax.tree.leaves(arguments), changed)
            return jax.tree.unflatten(tree, out)

        options = dict(self._options)
        if "in_shardings" in options:
            options["in_shardings"] = (None, *options["in_shardings"])
        if "donate_argnums" in options:
            options["donate_argnums"] = options["donate_argnums"] + 1
        log.info(
            "Compiling a program of %d equations with %d numbers that differ.",
            len(program.traced.jaxpr.eqns),
            len(places),
        )
        return self._shared.caller(with_numbers, options, (self._at(places), *self._arguments))


def _read(jaxpr: Jaxpr, shape: list[Any], numbers: list[Any], literals: list[Literal] | None = None) -> None:
    """Append the equations of a program, and of those inside it, and their numbers."""
    names: dict[Any, int] = {}

    def name(v: Any) -> Any:
        if isinstance(v, Literal):
            numbers.append(v.val)
            if literals is not None:
                literals.append(v)
            return _kind(v.val), str(v.aval)
        return names.setdefault(v, len(names))

    shape.append([str(name(v)) + str(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)])
    for equation in jaxpr.eqns:
        read = [name(v) for v in equation.invars]
        params, inside = list[tuple[str, Any]](), []
        for key, value in sorted(equation.params.items()):
            if found := list(_jaxprs(value)):
                inside += found
                params += [(key, np.asarray(const).tobytes()) for const in _constants(value)]
            elif not callable(value) and not isinstance(value, WrappedFun):
                # Where an object lies in memory is not part of the program; what a function does is, as its trace.
                params.append((key, re.sub("0x[0-9a-f]+", "", str(value))))
        outs = [str(v.aval) for v in equation.outvars]
        for v in equation.outvars:
            name(v)
        shape.append((equation.primitive.name, read, outs, params))
        for one in inside:
            _read(one, shape, numbers, literals)
    shape.append([name(v) for v in jaxpr.outvars])


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """Programs inside a parameter."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _jaxprs(one)


def _constants(value: Any) -> Iterator[Any]:
    """Arrays that the programs inside a parameter have of their own: they must be the same in all."""
    if isinstance(value, ClosedJaxpr):
        yield from value.consts
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _constants(one)


def _kind(value: Any) -> str:
    return f"{np.shape(value)} {getattr(value, 'dtype', type(value).__name__)}"


def _differ(a: Any, b: Any) -> bool:
    return a is not b and not np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], changed: Mapping[int, Any]) -> list[Any]:
    """The program's equations one after the other, with other values for some of its literals."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

    def value(v: Any) -> Any:
        if not isinstance(v, Literal):
            return known[v]
        dtype = getattr(v.aval, "dtype", None)
        return jax.numpy.asarray(changed[id(v)], dtype) if id(v) in changed else v.val

    for equation in jaxpr.eqns:
        read = [value(v) for v in equation.invars]
        inside = [one for param in equation.params.values() for one in _jaxprs(param)]
        with equation.ctx.manager:
            if inside and any(_has(one, changed) for one in inside):
                out = _inside(equation, read, changed)
            else:
                out = equation.primitive.bind(*read, **equation.primitive.get_bind_params(equation.params))
        outs = out if equation.primitive.multiple_results else [out]
        known.update(zip(equation.outvars, outs, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _has(jaxpr: Jaxpr, changed: Mapping[int, Any]) -> bool:
    literals: list[Literal] = []
    _read(jaxpr, [], [], literals)
    return any(id(one) in changed for one in literals)


def _inside(equation: Any, read: Sequence[Any], changed: Mapping[int, Any]) -> Any:
    """An equation with programs inside it that have changed literals."""
    name, params = equation.primitive.name, equation.params

    def runs(program: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())
        return lambda *arguments: _evaluate(jaxpr, consts, arguments, changed)

    if name in (
        "pjit",
        "jit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    ):
        (program,) = [p for p in params.values() if isinstance(p, ClosedJaxpr | Jaxpr)]
        return runs(program)(*read)
    if name in ("checkpoint", "remat", "remat2"):
        again = jax.checkpoint(runs(params["jaxpr"]), prevent_cse=params["prevent_cse"], policy=params["policy"])
        return again(*read)
    if name == "cond":
        index, *operands = read
        return jax.lax.switch(index, [runs(branch) for branch in params["branches"]], *operands)
    if name == "while":
        a, b = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test, body = runs(params["cond_jaxpr"]), runs(params["body_jaxpr"])
        return jax.lax.while_loop(lambda c: test(*read[:a], *c)[0], lambda c: body(*read[a:b], *c), list(read[b:]))
    if name == "scan":
        a, b, body = params["num_consts"], params["num_consts"] + params["num_carry"], runs(params["jaxpr"])

        def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            out = body(*read[:a], *carry, *xs)
            return out[: b - a], out[b - a :]

        options = {key: params[key] for key in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(step, list(read[a:b]), list(read[b:]), **options)
        return [*carry, *ys]
    raise UserError(f"--vectorise: numbers differ inside of {name!r}, which is compiled as it is. Use --parallel.")

"""What a config's sections stand for: the functions and classes whose signatures are their keys."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import typeguard

from tfm_jax.errors import UserError, nearest
from tfm_jax.names import resolve as resolve_name
from tfm_jax.nn.spec import BlockSpec

REQUIRED = inspect.Parameter.empty
# Section -> (package, attribute) of the code that its `name` stands for.
NAMED = {"task": ("tfm_jax.tasks", "make"), "data": ("tfm_jax.data", "make"), "adapter": ("tfm_jax.tasks", "wrap")}
# Arguments of theirs that are not keys of a config.
HIDDEN = {
    "task": ("model", "batch_size", "taught_by", "build"),
    "data": ("tokenizer_dir",),
    "adapter": ("task", "steps"),
}
_UNIONS = (types.UnionType, typing.Union)
DEFAULT_NAMES = {"task": "token_prediction", "data": "tokens", "adapter": "lora"}


@dataclasses.dataclass(frozen=True)
class Inside:
    """Marks an argument as a section of some kind inside another: `Annotated[Mapping[str, Any], Inside("task")]`."""

    kind: str


@dataclasses.dataclass(frozen=True)
class InsideEach(Inside):
    """Marks an argument as several sections of some kind by name."""


class Field(NamedTuple):
    hint: Any
    default: Any
    inside: Inside | None = None


Fields = dict[str, Field]


def section_fields(section: str, given: Mapping[str, Any], setting: str | None = None) -> Fields:
    """The arguments that a section takes, given its `name` and `variant`; `setting` is where it stands, if inside another."""
    if section == "model":
        return _model_fields(given)
    if section in NAMED:
        package, attribute = NAMED[section]
        name = given.get("name", DEFAULT_NAMES[section])
        make = resolve_name(name, package=package, attribute=attribute, setting=f"{setting or section}.name")
        return {"name": Field(str, DEFAULT_NAMES[section]), **_signature(make, hidden=HIDDEN[section])}
    # Imported here: these modules import the device backend, which a config check by itself does not need.
    if section == "optim":
        from tfm_jax.train import optim

        return _signature(optim.make, hidden=("params", "steps", "scales"))
    if section == "mesh":
        from tfm_jax.parallel import mesh

        return _signature(mesh.make, hidden=("devices",))
    from tfm_jax.train import settings

    return _signature(getattr(settings, section.capitalize()))


def fill(section: str, given: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Every argument of a section, checked by name and type.

    Args:
      section: its name, for errors.
    """
    for key, value in given.items():
        if key not in fields:
            raise UserError(f"config: unknown key '{section}.{key}' (={value!r}).{nearest(key, fields)}")
    out: dict[str, Any] = {}
    for key, field in fields.items():
        value = given.get(key, field.default)
        if value is REQUIRED:
            raise UserError(f"config: {section}.{key} is not set, and has no default.")
        out[key] = _checked(f"{section}.{key}", value, field.hint)
        if field.inside is not None and out[key] is not None:
            kind, name = field.inside.kind, f"{section}.{key}"
            if isinstance(field.inside, InsideEach):
                out[key] = {n: _filled(kind, f"{name}.{n}", v) for n, v in out[key].items()}
            else:
                out[key] = _filled(kind, name, out[key])
    return out


def _filled(kind: str, setting: str, given: Any) -> dict[str, Any]:
    """A section inside another."""
    if not isinstance(given, Mapping):
        raise UserError(f"config: {setting}={given!r}: a section is a dict of arguments.")
    return fill(setting, given, section_fields(kind, given, setting))


def _checked(key: str, value: Any, hint: Any) -> Any:
    """The value, plain, if it fits the annotation; ints where floats are wanted become floats."""
    if isinstance(value, Mapping):
        value = {k: v for k, v in value.items()}
    probe = tuple(value) if isinstance(value, list) else value
    options = typing.get_args(hint) or (hint,)
    fitting: Any = hint
    if isinstance(value, str):
        # To Python a string is a sequence of strings, but nobody means its letters.
        kinds = options if typing.get_origin(hint) in _UNIONS else (hint,)
        others = [kind for kind in kinds if typing.get_origin(kind) is not Sequence]
        if not {*others} - {types.NoneType}:
            raise UserError(f"config: {key}={value!r} has the wrong type; expected a list, for instance ({value!r},).")
        fitting = functools.reduce(operator.or_, others)
    if isinstance(value, bool) and bool not in options and hint is not Any:
        raise UserError(f"config: {key}={value!r} has the wrong type; expected {_describe(hint)}.")
    try:
        typeguard.check_type(probe, fitting, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        choices = [c for c in options if isinstance(c, str)] or [
            c for o in options for c in typing.get_args(o) if isinstance(c, str)
        ]
        named = [value] if isinstance(value, str) else probe if isinstance(probe, tuple) else ()
        wrong = [str(item) for item in named if item not in choices]
        hint_text = nearest(wrong[0], choices) if choices and wrong else ""
        raise UserError(
            f"config: {key}={value!r} has the wrong type or value; expected {_describe(hint)}.{hint_text}"
        ) from None
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    return _plain(value)


def _plain(value: Any) -> Any:
    """As JSON gives it back, tuples being lists: a run's own config must equal the one in its folder."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _describe(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin in _UNIONS:
        return ", or ".join(map(_describe, inside))
    if origin is Sequence and typing.get_origin(inside[0]) is typing.Literal:
        return f"a list, each {_describe(inside[0])}"
    if origin in (Sequence, tuple):
        return "a list"
    if hint is types.NoneType:
        return "None"
    if isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def eval_fields(name: str, given: Mapping[str, Any]) -> Fields:
    if not isinstance(given, Mapping):
        raise UserError(f"config: evals.{name}={given!r}: an evaluator is a dict of arguments.")
    make = resolve_name(
        given.get("name", "loss"), package="tfm_jax.evals", attribute="make", setting=f"evals.{name}.name"
    )
    other = Field(Mapping[str, Any] | None, None)
    return {"name": Field(str, "loss"), "data": other, **_signature(make, hidden=("context",))}


def model_class(name: str) -> type[Any]:
    found: type[Any] = resolve_name(name, package="tfm_jax.models", attribute="Model", setting="model.name")
    return found


def family(name: str, attribute: str, default: Any) -> Any:
    """What stands beside a model class in its file: `VARIANTS`, `RULES`, `RESIZE`."""
    return getattr(sys.modules[model_class(name).__module__], attribute, default)


def build_model(section: Mapping[str, Any]) -> Any:
    """The linen module that a resolved `model` section describes.

    Fields that a run older than they are does not name have their defaults.
    """
    values = {k: v for k, v in section.items() if k not in ("name", "variant")}
    cls = model_class(section["name"])
    inlined = _block_class(cls)
    if inlined is not None:
        names = {f.name for f in dataclasses.fields(inlined)}
        own = _dataclass_fields(cls)["block"].default
        defaults = {name: getattr(own, name) for name in names} if isinstance(own, inlined) else {}
        values["block"] = inlined(**defaults | {k: values.pop(k) for k in names if k in values})
    return cls(**{k: _hashable(v) for k, v in values.items()})


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value


# Fields of a model, or of its blocks, that do not change what it computes with its parameters.
_IDLE = (
    "parent", "name", "block", "layer_loop", "remat", "pipeline", "dtype", "matmul_dtype", "gradient_dtype", "attention", "init",
    "init_std", "max_global", "dropout", "attention_dropout", "mlp_dropout",
)  # fmt: skip


def computes(section: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what a model computes: its fields and its blocks', with the sizes that stand for None."""
    model = build_model(section)
    found = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in _IDLE}
    spec = getattr(model, "block", None)
    if isinstance(spec, BlockSpec):
        found |= {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in _IDLE}
        found |= {"kv_heads": spec.groups, "head_dim": spec.key_size, "mlp_width": spec.hidden}
    return found


def _model_fields(given: Mapping[str, Any]) -> Fields:
    name = given.get("name", "gpt")
    cls = model_class(name)
    variants = family(name, "VARIANTS", {})
    fields = _dataclass_fields(cls)
    inlined = _block_class(cls)
    if inlined is not None:
        del fields["block"]
        # A family's own default block gives the defaults.
        own = next(f for f in dataclasses.fields(cls) if f.name == "block").default
        fields |= {
            key: field if own is dataclasses.MISSING else field._replace(default=getattr(own, key))
            for key, field in _dataclass_fields(inlined).items()
        }
    variant = given.get("variant")
    if variant is not None:
        if variant not in variants:
            raise UserError(f"model.variant={variant!r} is not a variant of {name!r}.{nearest(variant, variants)}")
        fields |= {k: fields[k]._replace(default=v) for k, v in variants[variant].items()}
    return {"name": Field(str, "gpt"), "variant": Field(str | None, None), **fields}


def _block_class(cls: type[Any]) -> type[Any] | None:
    """The dataclass of a model's field `block`, whose own fields are written flat in a config."""
    hint = _hints(cls).get("block")
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _dataclass_fields(cls: type[Any]) -> Fields:
    hints, out = _hints(cls), {}
    for f in dataclasses.fields(cls):
        if f.name in ("parent", "name", "pipeline") or not f.init:
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        out[f.name] = _field(hints.get(f.name, Any), REQUIRED if default is dataclasses.MISSING else default)
    return out


def _signature(function: Callable[..., Any], hidden: Sequence[str] = ()) -> Fields:
    if dataclasses.is_dataclass(function):
        return _dataclass_fields(typing.cast(type[Any], function))
    hints = _hints(function)
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in hidden]
    return {p.name: _field(hints.get(p.name, Any), p.default) for p in named}


def _field(hint: Any, default: Any) -> Field:
    if typing.get_origin(hint) is not typing.Annotated:
        return Field(hint, default)
    plain, *marks = typing.get_args(hint)
    return Field(plain, default, next((mark for mark in marks if isinstance(mark, Inside)), None))


def make_named(kind: str, section: Mapping[str, Any], **given: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What the code that a filled section names makes of it.

    Args:
      given: by the name of an argument that is not a key, what to give for it if it is asked for, from the section.
    """
    package, attribute = NAMED[kind]
    arguments = dict(section)
    make = resolve_name(arguments.pop("name"), package=package, attribute=attribute, setting=f"{kind}.name")
    asked = inspect.signature(make).parameters
    return make(**arguments, **{name: value(section) for name, value in given.items() if name in asked})


def _hints(of: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of, include_extras=True)
    except NameError:  # a name that its author imports for type checkers only: checked by name, not by type
        return {}

"""What a config's sections stand for: the functions and classes whose signatures are their keys."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tfm_jax.errors import UserError, nearest
from tfm_jax.names import resolve as resolve_name
from tfm_jax.nn.spec import BlockSpec

REQUIRED = inspect.Parameter.empty
# Section -> (package, attribute) of the code that its `name` stands for.
NAMED = {"task": ("tfm_jax.tasks", "make"), "data": ("tfm_jax.data", "make")}
# Arguments of theirs that are not keys of a config.
HIDDEN = {"task": ("model", "batch_size", "teacher_model"), "data": ("tokenizer_dir",)}
DEFAULT_NAMES = {"task": "token_prediction", "data": "tokens"}


class Field(NamedTuple):
    hint: Any
    default: Any


Fields = dict[str, Field]


def section_fields(section: str, given: Mapping[str, Any]) -> Fields:
    """The arguments that a section takes, given its `name` and `variant`."""
    if section == "model":
        return _model_fields(given)
    if section in NAMED:
        package, attribute = NAMED[section]
        name = given.get("name", DEFAULT_NAMES[section])
        make = resolve_name(name, package=package, attribute=attribute, setting=f"{section}.name")
        return {"name": Field(str, DEFAULT_NAMES[section]), **_signature(make, hidden=HIDDEN[section])}
    # Imported here: these modules import the device backend, which a config check by itself does not need.
    if section == "optim":
        from tfm_jax.train import optim

        return _signature(optim.make, hidden=("params", "steps"))
    if section == "mesh":
        from tfm_jax.parallel import mesh

        return _signature(mesh.make, hidden=("devices",))
    from tfm_jax.train import settings

    return _signature(getattr(settings, section.capitalize()))


def eval_fields(name: str, given: Mapping[str, Any]) -> Fields:
    if not isinstance(given, Mapping):
        raise UserError(f"config: evals.{name}={given!r}: an evaluator is a dict of arguments.")
    make = resolve_name(
        given.get("name", "loss"), package="tfm_jax.evals", attribute="make", setting=f"evals.{name}.name"
    )
    return {"name": Field(str, "loss"), **_signature(make, hidden=("context",))}


def model_class(name: str) -> type[Any]:
    found: type[Any] = resolve_name(name, package="tfm_jax.models", attribute="Model", setting="model.name")
    return found


def family(name: str, attribute: str, default: Any) -> Any:
    """What stands beside a model class in its file: `VARIANTS`, `RULES`, `RESIZE`."""
    return getattr(sys.modules[model_class(name).__module__], attribute, default)


def build_model(section: Mapping[str, Any]) -> Any:
    """The linen module that a resolved `model` section describes."""
    values = {k: v for k, v in section.items() if k not in ("name", "variant")}
    cls = model_class(section["name"])
    inlined = _block_class(cls)
    if inlined is not None:
        names = {f.name for f in dataclasses.fields(inlined)}
        values["block"] = inlined(**{k: values.pop(k) for k in names})
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# Fields of a model, or of its blocks, that do not change what it computes with its parameters.
_IDLE = (
    "parent", "name", "block", "layer_loop", "remat", "dtype", "attention", "init", "init_std", "max_global", "dropout",
    "attention_dropout", "mlp_dropout",
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
        if f.name in ("parent", "name") or not f.init:
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        out[f.name] = Field(hints.get(f.name, Any), REQUIRED if default is dataclasses.MISSING else default)
    return out


def _signature(function: Callable[..., Any], hidden: Sequence[str] = ()) -> Fields:
    if dataclasses.is_dataclass(function):
        return _dataclass_fields(typing.cast(type[Any], function))
    hints = _hints(function)
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in hidden]
    return {p.name: Field(hints.get(p.name, Any), p.default) for p in named}


def _hints(of: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of)
    except NameError:  # a name that its author imports for type checkers only: checked by name, not by type
        return {}

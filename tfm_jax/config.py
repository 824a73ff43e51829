"""Experiment configs: read a file, apply overrides, fill in defaults, refuse what is wrong.

A config is an `ml_collections.ConfigDict` with the sections of `SECTIONS`. Each section is the keyword arguments of one
function or model class, whose signature is the only place where defaults stand. Resolving a config makes every
argument explicit, so that what ran is on record.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections
import typeguard

from tfm_jax.errors import UserError, nearest
from tfm_jax.sections import build_model, eval_fields, fill, section_fields

Config = dict[str, Any]  # resolved: nested plain dicts, JSON-serialisable
SECTIONS = ("model", "task", "data", "optim", "mesh", "train", "checkpoint", "evals", "log")
# What may change between two starts of one run: nothing here alters the parameters that training arrives at, but for what
# another mesh does to the masks of dropout (`stage`, `context`) and to the rows that a mixture's experts are balanced over (`stage`).
FREE_KEYS = (
    "mesh",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.asynchronous",
    "evals",
    "log",
    "data.cache_dir",
    "data.workers",
    "train.eval_every",
)
# Keys that a run fills in where its config leaves them None: from its data, the model that it begins with, or its teacher.
FILLED_IN = ("vocab_size", "classes", "names", "teacher_model")
# What may differ between the processes of one run.
LOCAL_KEYS = ("data.cache_dir", "data.workers")


def load(spec: str) -> ml_collections.ConfigDict:
    """The ConfigDict of `path/to/file.py` or `path/to/file.py:arguments`, from its `get_config(arguments)`."""
    module, argument = load_module(spec)
    path = spec.partition(":")[0]
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={spec}: {path} has no get_config(arguments).")
    takes_argument = bool(inspect.signature(module.get_config).parameters)
    if argument and not takes_argument:
        raise UserError(f"--config={spec}: get_config in {path} takes no arguments, but {argument!r} was given.")
    try:
        config: ml_collections.ConfigDict = module.get_config(argument) if takes_argument else module.get_config()
    except ValueError as error:
        raise UserError(f"--config={spec}: {error}") from None
    return config


def load_module(spec: str, flag: str = "--config") -> tuple[ModuleType, str]:
    """The Python module of a config file, and the arguments behind its colon; `flag` is what names it."""
    path_text, _, argument = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        near = sorted(p.as_posix() for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"{flag}={spec}: there is no file {path}.{nearest(path.as_posix(), near)}")
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module, argument


def resolve(config: Mapping[str, Any] | ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Every argument of every section, checked by name and type; the input is left as it was.

    Args:
      overrides: `(dotted key, text)` pairs from a command line, applied in order.

    Raises:
      UserError: an unknown section, key or name, a missing key, or a value of a wrong type.
    """
    raw = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    raw = copy.deepcopy(raw)
    for section, value in raw.items():
        if section not in SECTIONS:
            raise UserError(f"config: unknown section {section!r}.{nearest(section, SECTIONS)}")
        if not isinstance(value, Mapping):
            raise UserError(f"config: {section}={value!r}: a section is a dict of arguments.")
    for section in SECTIONS:
        raw.setdefault(section, {})
    # Names decide which other keys exist, so they are applied first.
    first = [(k, v) for k, v in overrides if k.rpartition(".")[2] in ("name", "variant")]
    for key, text in first + [pair for pair in overrides if pair not in first]:
        _override(raw, key, text)
    resolved: Config = {}
    for section in SECTIONS:
        if section == "evals":
            resolved[section] = {n: fill(f"evals.{n}", v, eval_fields(n, v)) for n, v in raw[section].items()}
        else:
            resolved[section] = fill(section, raw[section], section_fields(section, raw[section]))
    _check_model(resolved["model"])
    return resolved


def changed(config: Config, changes: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> Config:
    """A resolved config with other values at some dotted keys, checked again; the input is left as it was."""
    raw = copy.deepcopy(config)
    for key, value in dict(changes).items():
        *path, last = key.split(".")
        target: Any = raw
        for part in path:
            target = target[part]
        target[last] = value
    return resolve(raw)


def _override(raw: Config, key: str, text: str) -> None:
    """Set a dotted key from a command line's text."""
    parts = key.split(".")
    if parts[0] not in SECTIONS:
        raise UserError(f"--config.{key}={text}: unknown section {parts[0]!r}.{nearest(parts[0], SECTIONS)}")
    if len(parts) < 2:
        raise UserError(f"--config.{key}={text}: a section cannot be set whole; name a key in it.")
    target, hint = raw[parts[0]], Any
    path = parts[1:]
    if parts[0] == "evals":
        if len(path) < 2:
            raise UserError(f"--config.{key}={text}: write evals.NAME.KEY.")
        if path[0] not in target and path[-1] != "name":
            raise UserError(
                f"--config.{key}={text}: there is no evaluator {path[0]!r}.{nearest(path[0], target)}"
                f" A new one starts with --config.evals.{path[0]}.name=loss."
            )
        target = target.setdefault(path[0], {})
        fields, path = eval_fields(path[0], target), path[1:]
    else:
        fields = section_fields(parts[0], target)
    if path[0] not in fields:
        # Compared without the section, which any two keys of it have in common.
        said = nearest(path[0], fields)
        if close := [name for name in fields if said == f" Did you mean {name!r}?"]:
            said = f" Did you mean {'.'.join([*parts[: -len(path)], *close])!r}?"
        raise UserError(f"--config.{key}={text}: unknown key {key!r}.{said}")
    hint = fields[path[0]].hint
    for i, part in enumerate(path[:-1]):
        if not isinstance(target.get(part), Mapping):
            default = fields[path[0]].default if i == 0 else None
            target[part] = dict(default) if isinstance(default, Mapping) else {}
        target, hint = target[part], Any
    target[path[-1]] = _parse(text, hint)


def _parse(text: str, hint: Any) -> Any:
    """A Python literal where it is one and the annotation takes it, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # `none` is also a choice of some settings, so the annotation decides below.
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if hint is not Any:
        try:
            typeguard.check_type(tuple(value) if isinstance(value, list) else value, hint)
        except typeguard.TypeCheckError:
            try:
                typeguard.check_type(text, hint)
            except typeguard.TypeCheckError:
                return value
            return text
    return value


def _check_model(section: Config) -> None:
    """Impossible values are the constructors' to find: heads that do not divide the width, sizes of 0."""
    try:
        build_model(section)
    except TypeError as error:
        raise UserError(f"config: model: {error}.") from None


def to_json(config: Config) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim.lr": 0.001, ...}`."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of some, or inside of one."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _is_free(key: str, *of: Config) -> bool:
    """Whether a dotted key may change between two starts of runs of these configs."""
    return is_below(key, FREE_KEYS) and not any(is_below(key, _watching(config)) for config in of)


def _watching(config: Config) -> Sequence[str]:
    """What a metric that may end the run is looked at by, and so decides when it ends."""
    watched = config.get("train", {}).get("stop_metric")
    return () if watched is None else ("train.eval_every", *(f"evals.{name}" for name in watched.split("/")[1:2]))


def fixed_part(config: Config) -> dict[str, Any]:
    """The flat keys that make a run what it is."""
    return {key: value for key, value in flat(config).items() if not _is_free(key, config)}


def digest(config: Config) -> str:
    """A short hash of the fixed part; two runs with equal hashes train the same parameters."""
    return hashlib.sha256(json.dumps(fixed_part(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> list[str]:
    """One line for each fixed key in which two configs differ."""
    a, b = flat(old), flat(new)
    missing = "(not set)"
    return [
        f"{k}: {a.get(k, missing)!r} -> {b.get(k, missing)!r}"
        for k in sorted(a | b)
        if a.get(k, missing) != b.get(k, missing) and not _is_free(k, old, new)
    ]

"""Model folders of Hugging Face `transformers`: `config.json`, weights, tokenizer. PyTorch is not needed."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfm_jax import convert
from tfm_jax.convert.table import Conversion, Fields, Section
from tfm_jax.errors import UserError, nearest
from tfm_jax.sections import computes, section_fields

CONFIG = "config.json"
# In every `config.json`; none of them changes what the model computes.
HARMLESS = re.compile(
    r"^(_.*|architectures|model_type|transformers_version|torch_dtype|dtype|use_cache|return_dict|output_.*|id2label"
    r"|label2id|problem_type|finetuning_task|task_specific_params|tokenizer_class|prefix|bos_token_id|eos_token_id"
    r"|pad_token_id|sep_token_id|cls_token_id|mask_token_id|unk_token_id|decoder_start_token_id|bad_words_ids"
    r"|forced_.*|summary_.*|gradient_checkpointing|chunk_size_feed_forward|is_encoder_decoder|max_length|min_length"
    r"|num_beams|do_sample|early_stopping|length_penalty|no_repeat_ngram_size|temperature|top_k|top_p|typical_p"
    r"|repetition_penalty|num_return_sequences|diversity_penalty|num_beam_groups|remove_invalid_values"
    r"|encoder_no_repeat_ngram_size|exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens"
    r"|torchscript|use_bfloat16|pruned_heads|name_or_path|attn_implementation|classifier_dropout.*|num_labels)$"
)


def conversions() -> list[Conversion]:
    """Every conversion of this package: the `CONVERSIONS` of its modules."""
    return _collected("CONVERSIONS")


def _collected(name: str) -> list[Any]:
    found: list[Any] = []
    for module in pkgutil.iter_modules(convert.__path__):
        found += getattr(importlib.import_module(f"{convert.__name__}.{module.name}"), name, ())
    return found


@dataclass(frozen=True)
class Folder:
    """A model folder, or one with a folder for each part of a model.

    Attributes:
      path: where it is.
      configs: `{part: its config.json}`; a model in one piece is the part "".
      conversions: of each part.
      section: our `model` section, not yet resolved.
      split: from the resolved one to those of the parts.
      data, task: the sections that a run of it begins with.
    """

    path: Path
    configs: dict[str, dict[str, Any]]
    conversions: dict[str, Conversion]
    section: dict[str, Any]
    split: Callable[[Section], dict[str, Section]]
    data: Mapping[str, Any]
    task: Mapping[str, Any]


def open_folder(path: Path, own: Sequence[Conversion] = (), ignore: Sequence[str] = ()) -> Folder:
    """Read what a model folder says of itself.

    Raises:
      UserError: as `find` and `read_section`, or the parts do not fit together.
    """
    if not path.is_dir():
        there = sorted(p.as_posix() for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise UserError(f"There is no folder {path}; nothing is downloaded.{nearest(path.as_posix(), there)}")
    joined = None
    if not (path / CONFIG).is_file():
        joined = next(
            (j for j in _collected("JOINED") if all((path / part / CONFIG).is_file() for part in j.parts)), None
        )
    read = {part: read_json(path / part / CONFIG) for part in (joined.parts if joined else [""])}
    found = {part: find(config, own) for part, config in read.items()}
    for part, conversion in found.items():
        if joined and conversion.architecture != joined.parts[part]:
            raise UserError(f"{path / part} holds a {conversion.architecture}, but belongs to a {joined.parts[part]}.")
    sections = {
        part: read_section(conversion, read[part], where=str(path / part / CONFIG), ignore=ignore)
        for part, conversion in found.items()
    }
    if joined:
        return Folder(path, read, found, joined.join(sections), joined.split, joined.data, joined.task)
    only = found[""]
    return Folder(path, read, found, dict(sections[""]), lambda m: {"": m}, only.data, only.task)


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(f"There is no {path}.{nearest(path.name, there)}")
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is a JSON {type(loaded).__name__}, not an object.")
    return loaded


def find(config: dict[str, Any], own: Sequence[Conversion] = ()) -> Conversion:
    """The conversion for a `config.json`; a table of the user's own is taken as it is.

    Raises:
      UserError: the architecture is unknown, with the ones that are known.
    """
    if own:
        return own[0]
    known = {c.architecture: c for c in conversions()}
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"config.json: architectures={named!r} is not a list of names.")
    for architecture in named:
        if architecture in known:
            return known[architecture]
    asked = ", ".join(named) or f"model_type {config.get('model_type')!r}"
    raise UserError(
        f"The architecture {asked} is not known.{nearest(named[0] if named else '', sorted(known))}"
        " A table of your own: --table=my_package.my_module:CONVERSION."
    )


def read_section(conversion: Conversion, config: dict[str, Any], *, where: str, ignore: Sequence[str] = ()) -> Section:
    """Our `model` section, not yet resolved.

    Raises:
      UserError: fields that would change the numbers and are not supported, or are not known at all: all are listed.
    """
    fields = Fields(config)
    try:
        section = {"name": conversion.family, **conversion.read(fields)}
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # Of a kind or a size that no model has.
        section = {}
        fields.problems.append(f"its fields do not fit together ({type(error).__name__}: {error})")
    for name in ignore:
        if name not in config:
            raise UserError(f"--ignore {name}: {where} has no such field.{nearest(name, sorted(config))}")
    problems = [line for line in fields.problems if line.partition("=")[0] not in ignore]
    unknown = [
        f"{name}={value!r} is not known"
        for name, value in config.items()
        if name not in fields.known and name not in ignore and not HARMLESS.match(name)
    ]
    if problems or unknown:
        hint = "" if not unknown else f"\nIf an unknown field changes nothing: --ignore {unknown[0].partition('=')[0]}"
        raise UserError(
            f"{where} ({conversion.architecture}) asks for what is not here:\n  "
            + "\n  ".join(problems + unknown)
            + hint
        )
    return section


def for_export(
    section: Section, own: Sequence[Conversion] = (), prefer: str | None = None
) -> dict[str, tuple[Conversion, Section]]:
    """What gives a resolved `model` section back: for each part of the model its conversion and section.

    Raises:
      UserError: nothing can, with what the nearest would lose.
    """
    section = {**section, "name": re.sub(r"^tfm_jax\.models\.(\w+):Model$", r"\1", section["name"])}
    joined = next((j for j in _collected("JOINED") if j.family == section["name"]), None)
    if joined is None or own:
        return {"": (best(section, own, prefer), section)}
    return {part: (best(m), m) for part, m in joined.split(section).items()}


def best(section: Section, own: Sequence[Conversion] = (), prefer: str | None = None) -> Conversion:
    """The conversion that can say all that a resolved `model` section says, the one it came from first.

    Raises:
      UserError: none can, with what the nearest one would lose.
    """
    if own and own[0].family != section["name"]:
        raise UserError(f"--table is for model.name={own[0].family!r}, but this model is a {section['name']!r}.")
    candidates = [c for c in own or conversions() if c.family == section["name"]]
    candidates.sort(key=lambda c: c.architecture != prefer)
    losses = {c.architecture: _lost(c, section) for c in candidates}
    for candidate in candidates:
        if not losses[candidate.architecture]:
            return candidate
    if not losses:
        raise UserError(
            f"model.name={section['name']!r} has no class in transformers that is the same. A table of your own:"
            " --table=my_package.my_module:CONVERSION."
        )
    closest = min(losses, key=lambda name: len(losses[name]))
    none = (
        "The table given does not say all of this model"
        if own
        else "No class in transformers computes what this model computes"
    )
    raise UserError(f"{none}. The nearest, {closest}, cannot have:\n  " + "\n  ".join(losses[closest]))


def _lost(conversion: Conversion, section: Section) -> list[str]:
    """What does not come back from a journey there and back."""
    try:
        fields = Fields(conversion.write(section))
    except KeyError as error:
        return [f"a value of {error}"]
    back = {"name": section["name"], **conversion.read(fields)}
    defaults = {key: field.default for key, field in section_fields("model", back).items()}
    own = computes(section)
    try:
        again = computes({**defaults, **back})
    except UserError as error:  # the class has not the fields that would make these sizes fit
        return [str(error)]
    return [
        f"model.{key}={own[key]!r} (it has {again[key]!r})" for key in own if own[key] != again[key]
    ] + fields.problems

"""Bring a model in from Hugging Face's format as a run directory, or give a run's model back.

A run made this way is taken by evaluate, generate and checkpoint.init_from like any other. PyTorch is not needed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError

log = logging.getLogger(__name__)
EXAMPLES = """\
  python -m experiments.convert --from hf:models/gpt2 --to runs/gpt2
  python -m experiments.generate --run runs/gpt2 --prompt 'The meaning of life is'
  python -m experiments.convert --from runs/gpt2 --to hf:exported
  python -m experiments.convert --from hf:models/odd --to runs/odd --table=my_lab.convert:CONVERSION"""
ORIGIN = "origin.json"
MISSING = "missing"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--from", dest="source", required=True, help="hf:FOLDER, or a run directory")
    made.add_argument("--to", required=True, help="a new run directory, or hf:FOLDER")
    made.add_argument("--step", type=int, help="checkpoint to give back; the newest by default")
    cli.add_average(made)
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the tensors given back")
    made.add_argument("--table", help="a conversion of your own, package.module:NAME (see tfm_jax/convert/table.py)")
    made.add_argument("--ignore", action="append", default=[], help="a field of config.json that changes nothing")
    cli.add_overrides(made)
    flags, overrides = cli.parse(made, argv)
    cli.setup()
    inwards, outwards = flags.source.startswith("hf:"), flags.to.startswith("hf:")
    if inwards == outwards:
        raise UserError(f"--from={flags.source} --to={flags.to}: one of them must be hf:FOLDER, the other a run.")
    idle = ("step", "dtype", "average", "decay") if inwards else ("ignore",)
    if flag := cli.given(made, flags, idle):
        raise UserError(f"--{flag} has no meaning from {flags.source} to {flags.to}.")
    if inwards:
        record = bring_in(Path(flags.source[3:]), Path(flags.to), overrides, table=flags.table, ignore=flags.ignore)
    else:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]}: a model is given back as it was trained.")
        record = give_back(
            Path(flags.source),
            Path(flags.to[3:]),
            table=flags.table,
            step=flags.step,
            dtype=flags.dtype,
            **cli.averaged(flags),
        )
    print(cli.table([(key, str(value)) for key, value in record.items()]))
    if flags.json:
        cli.print_json(record)
    return 0


def bring_in(
    folder: Path,
    run: Path,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    table: str | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Make a run directory of a model folder."""
    import jax

    from tfm_jax.convert import huggingface, images, tokenizer
    from tfm_jax.convert.tensors import open_tensors
    from tfm_jax.convert.weights import names_in_file, read_parts
    from tfm_jax.files import write_atomic, write_status
    from tfm_jax.parallel import mesh
    from tfm_jax.paths import flatten
    from tfm_jax.sections import build_model, family, model_class
    from tfm_jax.train import rundir
    from tfm_jax.train.checkpoint import Checkpointer

    _must_be_new(run, "run directory")
    theirs = huggingface.open_folder(folder, _own_table(table), ignore)
    section, data = theirs.section, {**theirs.data}
    start = theirs.configs.get("", {}).get("decoder_start_token_id")
    if start is not None and "decoder_tokens" in inspect.signature(model_class(section["name"]).__call__).parameters:
        data["decoder_start"] = start
    if data.get("name") == "images":
        data |= images.read_settings(folder) | images.read_classes(theirs.configs[""])
    elif "source" not in data:
        names = images.read_classes(theirs.configs.get("", {})) if data.get("name") in ("examples", "tags") else {}
        data |= {"names": names["classes"]} if names else {}
        data = {"source": MISSING, "seq_len": min(section.get("max_len") or 512, 512), **data}
    config = configs.resolve(
        {
            "model": section,
            "task": theirs.task,
            "data": data,
            "train": {"steps": 1000},
            "evals": {"validation": {"split": "validation"}},
        },
        overrides,
    )
    model = build_model(config["model"])
    # Every device holds a part, so that what is larger than one of them can be read.
    layout = mesh.make(**{**config["mesh"], "data": 1, "fsdp": -1, "tensor": 1})
    layout = layout.with_rules(family(config["model"]["name"], "RULES", ()))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    placed = layout.place(shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
    sections = theirs.split(config["model"])
    tensors = {part: open_tensors(folder / part) for part in sections}
    params = read_parts(theirs.conversions, sections, abstract, tensors, where=str(folder))
    codec, vocab = None, config["model"].get("vocab_size")
    if vocab is not None:
        codec = next((found for part in sections if (found := tokenizer.read_tokenizer(folder / part))), None)
    if codec is not None and vocab < codec.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {codec.vocab_size} entries, but the model only {vocab}.")
    if codec is not None and 2 * codec.vocab_size < vocab:
        log.warning("The tokenizer has %d entries, the model %d: is it this model's?", codec.vocab_size, vocab)
    if codec is None and "tokenizer" in config["data"] and not any(key == "data.tokenizer" for key, _ in overrides):
        config["data"]["tokenizer"] = MISSING
    dtypes = {}
    for part, conversion in theirs.conversions.items():
        wanted = {row.theirs for row in conversion.table(sections[part])}
        names = names_in_file(conversion, tensors[part], wanted)
        dtypes[part] = {name: str(tensors[part].dtypes[names[name][0]]) for name in sorted(wanted & names.keys())}
    parts: dict[str, dict[str, Any]] = {
        part: {"architecture": conversion.architecture, "config": theirs.configs[part], "dtypes": dtypes[part]}
        for part, conversion in theirs.conversions.items()
    }
    with _made_whole(run) as made:
        if codec is not None:
            codec.save(made / "tokenizer")
        for part in parts:
            tokenizer.keep_files(folder, made, part)
        checkpoints = Checkpointer(made / "checkpoints", asynchronous=False)
        meta = {"data": None, "converted_from": str(folder.absolute()), "versions": rundir.versions()}
        checkpoints.save(0, {"step": jax.numpy.zeros((), jax.numpy.int32), "params": params}, meta)
        checkpoints.close()
        write_atomic(made / ORIGIN, configs.to_json({"folder": str(folder.absolute()), "table": table, "parts": parts}))
        write_atomic(made / "config.json", configs.to_json(config))
        write_status(made, "finished", f"converted from {folder}", step=0)
    count = sum(x.size for x in jax.tree.leaves(params))
    return {
        "architecture": ", ".join(part["architecture"] for part in parts.values()),
        "model": config["model"]["name"],
        "parameters": count,
        "arrays": len(flatten(params)),
        "dtype": ", ".join(sorted({dtype for found in dtypes.values() for dtype in found.values()})),
        "tokenizer": "none" if codec is None else f"{codec.vocab_size} entries",
        "run": str(run),
    }


def imported(folder: Path, run: Path) -> None:
    """Import a folder, if that run does not hold it already."""
    origin = read_origin(run)
    if origin is None:
        bring_in(folder, run)
    elif origin["folder"] != str(folder.absolute()):
        raise UserError(f"{run} holds another model, {origin['folder']}. Use another --workdir.")


def read_origin(run: Path) -> dict[str, Any] | None:
    """Where an imported run came from: `folder`, the `table` of the user's, and for each part its `architecture`, `config`
    and `dtypes`."""
    if not (run / ORIGIN).is_file():
        return None
    origin: dict[str, Any] = json.loads((run / ORIGIN).read_text())
    return origin


def give_back(
    run: Path,
    folder: Path,
    *,
    table: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    average: int = 1,
    decay: float = 1.0,
) -> dict[str, Any]:
    """Write a run's model as a model folder, or one with a folder for each part of the model."""
    from tfm_jax.convert import huggingface, images, tokenizer
    from tfm_jax.convert.tensors import write_tensors
    from tfm_jax.convert.weights import write_tensors_of
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import load_params

    _must_be_new(folder, "folder")
    config, origin = rundir.read_config(run), read_origin(run) or {"parts": {}}
    parts = origin["parts"]
    own = _own_table(table or origin.get("table"))
    conversions = huggingface.for_export(config["model"], own, parts.get("", {}).get("architecture"))
    params, found = load_params(run, step, average=average, decay=decay)
    count = 0
    with _made_whole(folder) as made:
        for part, (conversion, section) in conversions.items():
            came = parts.get(part, {"config": {}, "dtypes": {}})
            kept = {k: v for k, v in came["config"].items() if huggingface.HARMLESS.match(k)}
            name = dtype or kept.get("dtype") or kept.get("torch_dtype") or "float32"
            shapes, make = write_tensors_of(conversion, section, params)
            # A file's tensors go back in the type in which each came, whatever its config says.
            kinds = {tensor: _dtype(name if dtype else came["dtypes"].get(tensor, name)) for tensor in shapes}
            (made / part).mkdir(exist_ok=True)
            write_tensors(made / part, shapes, make, kinds)
            fields = conversion.write(section) | {
                "architectures": [conversion.architecture],
                "model_type": conversion.model_type,
                "dtype": name,
            }
            added = list[str]()
            if not kept:
                kept, added = _own_marks(run, config, fields)
                kept |= images.write_classes(config["data"])
            fields = {k: v for k, v in {**kept, **fields}.items() if k != "torch_dtype"}
            tokenizer.write_files(run, made / part, part, added=added)
            images.write_settings(config, made / part)
            (made / part / huggingface.CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            count += len(shapes)
    return {
        "architecture": ", ".join(conversion.architecture for conversion, _ in conversions.values()),
        "step": found,
        "tensors": count,
        "dtype": name,
        "folder": str(folder),
    }


def _own_marks(run: Path, config: configs.Config, fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The special ids of a run that was trained here, and the names of those that its objective has put behind the tokenizer's
    own.

    One mark begins and ends documents, and decoders begin with it.
    """
    from tfm_jax.convert.tokenizer import pad_id
    from tfm_jax.data import objectives
    from tfm_jax.data.tokenizers import load_tokenizer

    if not (run / "tokenizer").is_dir():
        return {}, []
    codec = load_tokenizer(run / "tokenizer")
    counted = fields.get("pad_token_id")
    if counted is not None and counted != codec.end_id and (text := codec.decode([counted])):
        log.warning(
            "%s counts positions without the token %d, which is %r in this run's tokenizer: behind one, transformers"
            " numbers positions differently from this run.",
            fields["architectures"][0],
            counted,
            text,
        )
    start = config["data"].get("decoder_start")
    marks = dict.fromkeys(("bos_token_id", "eos_token_id"), codec.end_id)
    marks |= {"pad_token_id": pad_id(codec), "decoder_start_token_id": codec.end_id if start is None else start}
    data = config["data"]
    if data["name"] != "tokens":
        return marks, []
    keys = ("mask_rate", "span_length", "decoder_start", "mask_unit", "shuffle_sentences")
    made = objectives.make(data["objective"], data["seq_len"], codec, **{key: data[key] for key in keys})
    return marks, objectives.marks(made)


def _dtype(name: str) -> Any:
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _must_be_new(path: Path, what: str) -> None:
    for there in (path, *path.parents):
        if there.exists() and not there.is_dir():
            raise UserError(f"{there} is a file: give a new {what}.")
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{path} is not empty: give a new {what}.")


@contextlib.contextmanager
def _made_whole(path: Path) -> Iterator[Path]:
    """A folder to write in, which takes its name only when all is written."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _own_table(path: str | None) -> list[Any]:
    """The user's own conversion by its dotted path; none for None."""
    from tfm_jax.convert.table import Conversion
    from tfm_jax.names import resolve

    if not path:
        return []
    _, _, attribute = path.partition(":")
    if not attribute:
        raise UserError(f"--table={path}: write package.module:NAME.")
    found = resolve(path, package="tfm_jax.convert", attribute=attribute, setting="--table")
    if not isinstance(found, Conversion):
        raise UserError(f"--table={path} is a {type(found).__name__}, not a tfm_jax.convert.table.Conversion.")
    return [found]


if __name__ == "__main__":
    cli.run(main, memory=cli.SPARING)

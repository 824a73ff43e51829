"""Bring a model in from Hugging Face's format as a run directory, or give a run's model back.

A run made this way is taken by evaluate, generate and checkpoint.init_from like any other. PyTorch is not needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.convert --from hf:models/gpt2 --to runs/gpt2
  python -m experiments.generate --run runs/gpt2 --prompt 'The meaning of life is'
  python -m experiments.convert --from runs/gpt2 --to hf:exported
  python -m experiments.convert --from hf:models/odd --to runs/odd --table=my_lab.convert:CONVERSION"""
ORIGIN = "origin.json"
NO_TOKENIZER = "missing"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--from", dest="source", required=True, help="hf:FOLDER, or a run directory")
    made.add_argument("--to", required=True, help="a new run directory, or hf:FOLDER")
    made.add_argument("--step", type=int, help="checkpoint to give back; the newest by default")
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the tensors given back")
    made.add_argument("--table", help="a conversion of your own, package.module:NAME (see tfm_jax/convert/table.py)")
    made.add_argument("--ignore", action="append", default=[], help="a field of config.json that changes nothing")
    made.add_argument("--config", help=cli.HIDDEN)
    flags, overrides = cli.parse(made, argv)
    cli.setup()
    inwards, outwards = flags.source.startswith("hf:"), flags.to.startswith("hf:")
    if inwards == outwards:
        raise UserError(f"--from={flags.source} --to={flags.to}: one of them must be hf:FOLDER, the other a run.")
    own = [_own_table(flags.table)] if flags.table else []
    idle = ("step", "dtype") if inwards else ("ignore",)
    for flag in idle:
        if getattr(flags, flag) not in (None, []):
            raise UserError(f"--{flag} has no meaning from {flags.source} to {flags.to}.")
    if inwards:
        record = bring_in(Path(flags.source[3:]), Path(flags.to), own, overrides, ignore=flags.ignore)
    else:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]}: a model is given back as it was trained.")
        record = give_back(Path(flags.source), Path(flags.to[3:]), own, step=flags.step, dtype=flags.dtype)
    print(cli.table([(key, str(value)) for key, value in record.items()]))
    if flags.json:
        cli.print_json(record)
    return 0


def bring_in(
    folder: Path, run: Path, own: Sequence[Any] = (), overrides: Sequence[tuple[str, str]] = (), *, ignore: Any = ()
) -> dict[str, Any]:
    """Make a run directory of a model folder."""
    import jax

    from tfm_jax.convert import huggingface, tokenizer
    from tfm_jax.convert.tensors import open_tensors
    from tfm_jax.convert.weights import read_params
    from tfm_jax.files import write_atomic
    from tfm_jax.parallel import mesh
    from tfm_jax.paths import flatten
    from tfm_jax.sections import build_model, family, model_class
    from tfm_jax.train import rundir
    from tfm_jax.train.checkpoint import Checkpointer

    theirs = huggingface.read_json(folder / "config.json")
    conversion = huggingface.find(theirs, own)
    section = huggingface.read_section(conversion, theirs, where=str(folder / "config.json"), ignore=ignore)
    start = theirs.get("decoder_start_token_id")
    if start is not None and "decoder_tokens" in inspect.signature(model_class(conversion.family).__call__).parameters:
        conversion = dataclasses.replace(conversion, data={**conversion.data, "decoder_start": start})
    text = {"source": "stdlib", "seq_len": min(section.get("max_len") or 512, 512)}
    config = configs.resolve(
        {
            "model": section,
            "task": conversion.task,
            "data": {**({} if "name" in conversion.data else text), **conversion.data},
            "train": {"steps": 1000},
            "evals": {"validation": {"split": "validation"}},
        },
        overrides,
    )
    _must_be_new(run, "run directory")
    model = build_model(config["model"])
    # Every device holds a part, so that what is larger than one of them can be read.
    layout = mesh.make(**{**config["mesh"], "data": 1, "fsdp": -1, "tensor": 1})
    layout = layout.with_rules(family(config["model"]["name"], "RULES", ()))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    placed = layout.place(shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)
    tensors = open_tensors(folder)
    params = read_params(conversion, config["model"], abstract, tensors, where=str(folder))
    codec = tokenizer.read_tokenizer(folder)
    if codec is not None and config["model"].get("vocab_size", 0) < codec.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {codec.vocab_size} entries, but the model only {config['model']['vocab_size']}."
        )
    if codec is None and "tokenizer" in config["data"] and not any(key == "data.tokenizer" for key, _ in overrides):
        config["data"]["tokenizer"] = NO_TOKENIZER
    dtypes = {row.theirs: str(tensors.dtypes.get(row.theirs, "float32")) for row in conversion.table(config["model"])}
    origin = {
        "architecture": conversion.architecture,
        "config": theirs,
        "dtypes": dtypes,
        "folder": str(folder.absolute()),
    }
    with _made_whole(run) as made:
        if codec is not None:
            codec.save(made / "tokenizer")
            tokenizer.keep_files(folder, made / "tokenizer")
        checkpoints = Checkpointer(made / "checkpoints", asynchronous=False)
        meta = {"data": None, "converted_from": origin["folder"], "versions": rundir.versions()}
        checkpoints.save(0, {"step": jax.numpy.zeros((), jax.numpy.int32), "params": params}, meta)
        checkpoints.close()
        write_atomic(made / ORIGIN, configs.to_json(origin))
        write_atomic(made / "config.json", configs.to_json(config))
        rundir.write_status(made, "finished", f"converted from {folder}", step=0)
    count = sum(x.size for x in jax.tree.leaves(params))
    return {
        "architecture": conversion.architecture,
        "model": config["model"]["name"],
        "parameters": count,
        "arrays": len(flatten(params)),
        "dtype": ", ".join(sorted(set(dtypes.values()))),
        "tokenizer": "none" if codec is None else f"{codec.vocab_size} entries",
        "run": str(run),
    }


def imported(folder: Path, run: Path) -> None:
    """Import a folder, if that run does not hold it already."""
    origin = run / ORIGIN
    if not origin.is_file():
        bring_in(folder, run)
    elif json.loads(origin.read_text())["folder"] != str(folder.absolute()):
        raise UserError(
            f"{run} holds another model, {json.loads(origin.read_text())['folder']}. Use another --workdir."
        )


def give_back(
    run: Path, folder: Path, own: Sequence[Any] = (), *, step: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Write a run's model as a model folder."""
    from tfm_jax.convert import huggingface, tokenizer
    from tfm_jax.convert.tensors import write_tensors
    from tfm_jax.convert.weights import write_tensors_of
    from tfm_jax.data.tokenizers import load_tokenizer
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import load_params

    section = rundir.read_config(run)["model"]
    origin = json.loads((run / ORIGIN).read_text()) if (run / ORIGIN).is_file() else {"config": {}}
    conversion = huggingface.for_export(section, own, origin.get("architecture"))
    _must_be_new(folder, "folder")
    params, found = load_params(run, step)
    kept = {k: v for k, v in origin["config"].items() if huggingface.HARMLESS.match(k)}
    name = dtype or kept.get("dtype") or kept.get("torch_dtype") or "float32"
    shapes, make = write_tensors_of(conversion, section, params)
    # A file's tensors go back in the type in which each came, whatever its config says.
    came = {} if dtype else origin.get("dtypes", {})
    kinds = {tensor: _dtype(came.get(tensor, name)) for tensor in shapes}
    with _made_whole(folder) as made:
        write_tensors(made, shapes, make, kinds)
        fields = {
            **kept,
            **conversion.write(section),
            "architectures": [conversion.architecture],
            "model_type": conversion.model_type,
            "dtype": name,
        }
        fields.pop("torch_dtype", None)
        if (run / "tokenizer").is_dir():
            tokenizer.write_files(run / "tokenizer", made)
            # Runs trained here begin and end documents with one mark, and decoders begin with it.
            end = load_tokenizer(run / "tokenizer").end_id
            marks = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end}
            fields = fields if kept else {**marks, **fields}
        (made / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return {
        "architecture": conversion.architecture,
        "step": found,
        "tensors": len(shapes),
        "dtype": name,
        "folder": str(folder),
    }


def _dtype(name: str) -> Any:
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _must_be_new(path: Path, what: str) -> None:
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


def _own_table(path: str) -> Any:
    from tfm_jax.convert.table import Conversion
    from tfm_jax.names import resolve

    _, _, attribute = path.partition(":")
    if not attribute:
        raise UserError(f"--table={path}: write package.module:NAME.")
    found = resolve(path, package="tfm_jax.convert", attribute=attribute, setting="--table")
    if not isinstance(found, Conversion):
        raise UserError(f"--table={path} is a {type(found).__name__}, not a tfm_jax.convert.table.Conversion.")
    return found


if __name__ == "__main__":
    cli.run(main)

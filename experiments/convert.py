"""Bring a model in from Hugging Face's format as a run directory, or give a run's model back.

A run made this way is taken by evaluate, generate and checkpoint.init_from like any other. PyTorch is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
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
    from tfm_jax.sections import build_model, family
    from tfm_jax.train import rundir
    from tfm_jax.train.checkpoint import Checkpointer

    theirs = huggingface.read_json(folder / "config.json")
    conversion = huggingface.find(theirs, own)
    section = huggingface.read_section(conversion, theirs, where=str(folder / "config.json"), ignore=ignore)
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
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty: give a new run directory.")
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
    if codec is not None:
        codec.save(run / "tokenizer")
        tokenizer.keep_files(folder, run / "tokenizer")
    checkpoints = Checkpointer(run / "checkpoints", asynchronous=False)
    meta = {"data": None, "converted_from": str(folder.absolute()), "versions": rundir.versions()}
    checkpoints.save(0, {"step": jax.numpy.zeros((), jax.numpy.int32), "params": params}, meta)
    checkpoints.close()
    dtypes = sorted({str(tensors[name].dtype) for name in list(tensors) if len(tensors.shapes[name]) == 2})
    write_atomic(run / ORIGIN, configs.to_json({"architecture": conversion.architecture, "config": theirs}))
    write_atomic(run / "config.json", configs.to_json(config))
    rundir.write_status(run, "finished", f"converted from {folder}", step=0)
    count = sum(x.size for x in jax.tree.leaves(params))
    return {
        "architecture": conversion.architecture,
        "model": config["model"]["name"],
        "parameters": count,
        "arrays": len(flatten(params)),
        "dtype": ", ".join(dtypes),
        "tokenizer": "none" if codec is None else f"{codec.vocab_size} entries",
        "run": str(run),
    }


def give_back(
    run: Path, folder: Path, own: Sequence[Any] = (), *, step: int | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Write a run's model as a model folder."""
    import ml_dtypes
    import numpy as np

    from tfm_jax.convert import huggingface, tokenizer
    from tfm_jax.convert.tensors import write_tensors
    from tfm_jax.convert.weights import write_tensors_of
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import load_params

    section = rundir.read_config(run)["model"]
    origin = json.loads((run / ORIGIN).read_text()) if (run / ORIGIN).is_file() else {"config": {}}
    conversion = huggingface.for_export(section, own, origin.get("architecture"))
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give a new folder.")
    params, found = load_params(run, step)
    kept = {k: v for k, v in origin["config"].items() if huggingface.HARMLESS.match(k)}
    name = dtype or kept.get("dtype") or kept.get("torch_dtype") or "float32"
    kind = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        shapes, make = write_tensors_of(conversion, section, params, kind)
        write_tensors(temporary, shapes, make, kind)
        fields = {
            **kept,
            **conversion.write(section),
            "architectures": [conversion.architecture],
            "model_type": conversion.model_type,
            "dtype": name,
        }
        fields.pop("torch_dtype", None)
        (temporary / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        if (run / "tokenizer").is_dir():
            tokenizer.write_files(run / "tokenizer", temporary)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {
        "architecture": conversion.architecture,
        "step": found,
        "tensors": len(shapes),
        "dtype": name,
        "folder": str(folder),
    }


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

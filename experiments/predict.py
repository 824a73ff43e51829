"""Write what a run predicts for each example of a split, in the data's own order.

A `.npy` has logits (N, C), which `data.predictions` of another run takes for a teacher's, with the names of the classes and a digest of
the texts in a `.about.json` beside it, or numbers (N,), in their own unit, which it does not take. A `.jsonl` has a line for each
example: the likeliest class as `label`, or a `number`; the translation or summary as `text`; the `answer` to a question; the `tags`
of a sentence's words, null for a word without a place in its row.
Texts are searched for as the run's own evaluator of that split does, so that what is written is what was scored, or as that of
another split, or as its defaults say where the run has none; a flag counts more.
`--config.KEY=VALUE` changes the run's config, for other data or another mesh: `--config.data.split=all` has every example of a
source without splits of its own in one, `--config.data.label=None` reads texts that have no labels. Sources, questions and words
need what training needs beside them, though no prediction looks at it: some target, an answer that is in its context, a known
tag for each word.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tfm_jax.evals.base import Context

EXAMPLES = """\
  python -m experiments.predict --run runs/minilm_sst2-0 --split train --to teacher.npy
  python -m experiments.predict --run runs/mt_multi30k-0 --split test --to german.jsonl --length_penalty 0.8
  python -m experiments.predict --run runs/reviews --to new.jsonl --config.data.source='jsonl:new/*.jsonl' --config.data.split=all \\
    --config.data.label=None"""

SEARCH = ("beams", "length_penalty", "max_new")
Lines = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", type=Path, required=True, help="run directory")
    made.add_argument("--step", type=int, help="checkpoint to use; the newest by default")
    cli.add_average(made)
    made.add_argument("--split", default="validation", help="of the data")
    made.add_argument("--to", type=Path, required=True, help="the file, ending in .npy or .jsonl")
    made.add_argument("--beams", type=int, help="of beam search")
    made.add_argument("--length_penalty", type=float, help="of beam search: above 0 favours longer texts")
    made.add_argument("--max_new", type=int, help="tokens that beam search makes at most")
    cli.add_overrides(made)
    flags, overrides = cli.parse(made, argv)
    if flags.to.suffix not in (".npy", ".jsonl"):
        raise UserError(f"--to={flags.to}: the file's name must end in .npy or .jsonl.")
    averaged = cli.averaged(flags)
    import jax

    cli.setup()
    from tfm_jax.evals.base import Context
    from tfm_jax.files import write_atomic
    from tfm_jax.parallel import multihost
    from tfm_jax.train import rundir
    from tfm_jax.train.build import build
    from tfm_jax.train.restore import restore_for_evaluation

    config = configs.resolve({**rundir.read_config(flags.run), "mesh": {}}, overrides)
    experiment = build(config, tokenizer_dir=flags.run / "tokenizer", for_training=False)
    data = experiment.data
    context = Context(experiment.task, experiment.model, experiment.layout, data, data.train.batch_size)
    dataset = data.evals(flags.split, context.rows(None))
    search = {name: value for name in SEARCH if (value := getattr(flags, name)) is not None}
    # Other data may have other names, in another order: what it fills in is of the run's own data alone.
    told = config if any(configs.is_below(key, ["data"]) for key, _ in overrides) else experiment.config
    predict = _predictor(context, dataset, told, flags.split, flags.to, search)
    with jax.set_mesh(experiment.layout.mesh):
        state, step = restore_for_evaluation(experiment, flags.run, flags.step, same_data=False, **averaged)
        cli.make_folder("--to", flags.to)
        found = predict(state)
    if multihost.is_main():
        write_atomic(flags.to, _content(found))
        if not isinstance(found, list):
            # For the student that learns from them, whose classes and examples may come in another order.
            beside, names = flags.to.with_suffix(".about.json"), _fitting(_names(told["data"], flags.split), found)
            about = {"names": names, "texts": data.texts(flags.split)} if names and data.texts else None
            write_atomic(beside, configs.to_json(about)) if about else beside.unlink(missing_ok=True)
        record = {"step": step, "split": flags.split, "examples": len(found)}
        record |= {} if isinstance(found, list) else {"shape": list(found.shape)}
        print(cli.table([(name, str(value)) for name, value in record.items()]))
        if flags.json:
            cli.print_json(record)
    return 0


def _predictor(
    context: Context, dataset: Any, config: Mapping[str, Any], split: str, to: Path, search: Mapping[str, Any]
) -> Callable[[Any], np.ndarray | Lines]:
    """What makes the content of a file from a training state, by what the data's passes have.

    Raises:
      UserError: the run predicts nothing for each example, or nothing that such a file takes.
    """
    from tfm_jax.evals import entities, generation, squad

    texts = hasattr(context.model, "init_caches") and hasattr(dataset, "references")
    if search and not texts:
        raise UserError(f"--{next(iter(search))} is of beam search, and this run makes no texts.")

    def lines(key: str, order: Sequence[int], makes: Callable[[Any], Sequence[Any]]) -> Callable[[Any], Lines]:
        if to.suffix == ".npy":
            raise UserError(f"--to={to}: this run predicts no class or number for each example. Name a .jsonl.")
        return lambda state: [{key: value} for _, value in sorted(zip(order, makes(state), strict=True))]

    if hasattr(dataset, "shown"):
        longest = _as_scored(config, "squad", split)["longest"]
        # They come in the order of the questions already, whatever the windows' is.
        questions = range(len(dataset.references))
        return lines("answer", questions, lambda state: squad.answers(context, state, dataset, longest))
    if hasattr(dataset, "tagged_words"):
        return lines("tags", dataset.places.order, lambda state: entities.tags(context, state, dataset, None))
    if texts:
        scored = _as_scored(config, "generation", split)
        how = {name: scored[name] for name in SEARCH} | dict(search)
        return lines("text", dataset.places.order, lambda state: generation.written(context, state, dataset, **how))
    if "predict" not in context.task.predict_fns or not hasattr(dataset, "places"):
        raise UserError(
            "This run predicts nothing for each example: that needs data.name=examples, pairs, questions or tags."
        )
    if to.suffix == ".npy":
        return lambda state: _rows(context, state, dataset)
    names = _names(config["data"], split)
    return lambda state: _named(_rows(context, state, dataset), names)


def _as_scored(config: Mapping[str, Any], name: str, split: str) -> Mapping[str, Any]:
    """The arguments of the run's evaluator of a name, that of the split if there is one; or the evaluator's defaults."""
    from tfm_jax.sections import eval_fields

    own = [section for section in config["evals"].values() if section["name"] == name]
    own.sort(key=lambda section: (section["split"] != split, section["data"] is not None))
    return own[0] if own else {key: field.default for key, field in eval_fields(name, {"name": name}).items()}


def _rows(context: Context, state: Any, dataset: Any) -> np.ndarray:
    """Logits (N, C) or numbers (N,), in the data's order."""
    import numpy as np

    from tfm_jax.evals.base import predictions

    found = [out["prediction"][batch["weights"] > 0] for batch, out in predictions(context, state, dataset, "predict")]
    rows = np.concatenate(found)
    ordered = np.empty_like(rows)
    ordered[dataset.places.order] = rows
    if not np.isfinite(ordered).all():
        place = int(np.argwhere(~np.isfinite(ordered))[0, 0])
        raise UserError(f"The run's prediction for example {place} is not finite: {ordered[place]}.")
    return ordered


def _names(section: Mapping[str, Any], split: str) -> Sequence[Any] | None:
    """The classes that the run knows, of its data or of the part of a mixture that a split such as `cola/test` is of."""
    part = section["parts"][split.partition("/")[0]] if "parts" in section else section
    found: Sequence[Any] | None = part.get("names")
    return found


def _named(rows: np.ndarray, names: Sequence[Any] | None) -> Lines:
    """The likeliest class of each row, by its name, or its number where not every class has one."""
    if rows.ndim == 1:
        return [{"number": float(row)} for row in rows]
    classes = _fitting(names, rows) or range(rows.shape[1])
    return [{"label": classes[i]} for i in rows.argmax(axis=1)]


def _fitting(names: Sequence[Any] | None, rows: np.ndarray) -> Sequence[Any] | None:
    """The names, if rows (N, C) are of as many classes."""
    return names if names is not None and rows.ndim == 2 and len(names) == rows.shape[1] else None


def _content(found: np.ndarray | Lines) -> bytes:
    if isinstance(found, list):
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found).encode(errors="replace")
    import numpy as np

    content = io.BytesIO()
    np.save(content, found)
    return content.getvalue()


if __name__ == "__main__":
    cli.run(main)

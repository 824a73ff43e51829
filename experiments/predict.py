"""Write what a run predicts for each example of a split, in the data's own order, as one `.npy`.

For `data.name=examples`: logits (N, C), which `data.predictions` of another run takes for a teacher's, or numbers (N,), in
their own unit, which it does not.
`--config.KEY=VALUE` changes the run's config, for other data or another mesh: `--config.data.split=all` has every example of a
source without splits of its own in one, `--config.data.label=None` reads texts that have no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.predict --run runs/minilm_sst2-0 --split train --to teacher.npy
  python -m experiments.predict --run runs/reviews --to new.npy --config.data.source='jsonl:new/*.jsonl' --config.data.split=all
  python -m experiments.predict --run runs/reviews --to new.npy --config.data.source='jsonl:new/*.jsonl' --config.data.split=all \\
    --config.data.label=None"""


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", type=Path, required=True, help="run directory")
    made.add_argument("--step", type=int, help="checkpoint to use; the newest by default")
    cli.add_average(made)
    made.add_argument("--split", default="validation", help="of the data")
    made.add_argument("--to", type=Path, required=True, help="the file, ending in .npy")
    # Only for `parse` to know that overrides are welcome: the config itself is the run's.
    made.add_argument("--config", help=cli.HIDDEN)
    flags, overrides = cli.parse(made, argv)
    if flags.to.suffix != ".npy":
        raise UserError(f"--to={flags.to}: the file's name must end in .npy.")
    averaged = cli.averaged(flags)
    import io

    import jax
    import numpy as np

    cli.setup()
    from tfm_jax.evals.base import Context, predictions
    from tfm_jax.files import write_atomic
    from tfm_jax.parallel import multihost
    from tfm_jax.train import rundir
    from tfm_jax.train.build import build
    from tfm_jax.train.restore import restore_for_evaluation

    config = configs.resolve({**rundir.read_config(flags.run), "mesh": {}}, overrides)
    experiment = build(config, tokenizer_dir=flags.run / "tokenizer", for_training=False)
    task, data = experiment.task, experiment.data
    context = Context(task, experiment.model, experiment.layout, data, data.train.batch_size)
    dataset = data.evals(flags.split, context.rows(None))
    if "predict" not in task.predict_fns or not hasattr(dataset, "places"):
        raise UserError("This run predicts no class or number for each example: it needs data.name=examples.")
    with jax.set_mesh(experiment.layout.mesh):
        state, step = restore_for_evaluation(experiment, flags.run, flags.step, same_data=False, **averaged)
        found = [
            out["prediction"][batch["weights"] > 0] for batch, out in predictions(context, state, dataset, "predict")
        ]
    rows = np.concatenate(found)
    ordered = np.empty_like(rows)
    ordered[dataset.places.order] = rows
    if multihost.is_main():
        content = io.BytesIO()
        np.save(content, ordered)
        write_atomic(flags.to, content.getvalue())
        record = {"step": step, "split": flags.split, "examples": len(rows), "shape": list(ordered.shape)}
        print(cli.table([(name, str(value)) for name, value in record.items()]))
        if flags.json:
            cli.print_json(record)
    return 0


if __name__ == "__main__":
    cli.run(main)

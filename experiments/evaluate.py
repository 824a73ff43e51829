"""Evaluate a checkpoint of a run with the evaluators of its config, on the devices that are here.

`--config.KEY=VALUE` changes the run's config, for other data or another mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from tfm_jax import config as configs

EXAMPLES = """\
  python -m experiments.evaluate --run runs/gpt_stdlib
  python -m experiments.evaluate --run runs/gpt_stdlib --step 400 --json
  JAX_NUM_CPU_DEVICES=8 python -m experiments.evaluate --run runs/gpt_stdlib --config.mesh.tensor=2"""


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", type=Path, required=True, help="run directory")
    made.add_argument("--step", type=int, help="checkpoint to evaluate; the newest by default")
    made.add_argument("--average", type=int, default=1, help="average this many checkpoints, the last of them that one")
    # Only for `parse` to know that overrides are welcome: the config itself is the run's.
    made.add_argument("--config", help=cli.HIDDEN)
    flags, overrides = cli.parse(made, argv)
    import jax

    cli.setup()
    from tfm_jax.files import write_atomic
    from tfm_jax.parallel import multihost
    from tfm_jax.train import rundir
    from tfm_jax.train.build import build
    from tfm_jax.train.restore import restore_for_evaluation

    # The mesh was the training machine's; here all devices share the batch unless an override says otherwise.
    config = configs.resolve({**rundir.read_config(flags.run), "mesh": {}}, overrides)
    experiment = build(config, tokenizer_dir=flags.run / "tokenizer", for_training=False)
    with jax.set_mesh(experiment.layout.mesh):
        state, step = restore_for_evaluation(
            experiment,
            flags.run,
            flags.step,
            same_data=not any(key.startswith("data.") for key, _ in overrides),
            average=flags.average,
        )
        results = {
            f"eval/{name}/{key}": value
            for name, evaluate in experiment.evaluators().items()
            for key, value in evaluate(state).items()
        }
    record = {"step": step, "average": flags.average, "overrides": dict(overrides), **results}
    if multihost.is_main():
        print(
            cli.table(
                [
                    (f"step {step}", ""),
                    *(
                        (name, f"{value:.6f}" if value % 1 else f"{value:.0f}")
                        for name, value in sorted(results.items())
                    ),
                ]
            )
        )
        write_atomic(
            flags.run / f"evaluation_{step}{f'_average_{flags.average}' if flags.average > 1 else ''}.json",
            configs.to_json(record),
        )
        if flags.json:
            cli.print_json(record)
    return 0


if __name__ == "__main__":
    cli.run(main)

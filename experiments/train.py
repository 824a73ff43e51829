"""Train an experiment from its config file, or go on with one that was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.train --config=configs/gpt_stdlib.py --workdir=runs/gpt_stdlib
  python -m experiments.train --config=configs/gpt_stdlib.py:smoke --config.optim.lr=3e-4 --workdir=runs/try
  python -m experiments.train --config=configs/gpt_chars.py '--config.data.source=text:books/*.txt' --workdir=runs/chars
  python -m experiments.train --config=configs/gpt_stdlib.py --print_config
  python -m experiments.train --config=configs/gpt_stdlib.py --config.mesh.fsdp=4 --print_sharding"""


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument(
        "--config", required=True, metavar="FILE[:ARGS]", help="config file; --config.KEY=VALUE changes a key"
    )
    made.add_argument("--workdir", type=Path, help="run directory; a run that is there goes on")
    made.add_argument("--print_config", action="store_true", help="show the resolved config and stop")
    made.add_argument("--print_sharding", action="store_true", help="show where every array of the state goes and stop")
    made.add_argument("--profile", metavar="STEP:COUNT", help="trace COUNT steps from STEP into WORKDIR/profile")
    flags, overrides = cli.parse(made, argv)
    config = configs.resolve(configs.load(flags.config), overrides)
    if flags.print_config:
        print(configs.to_json(config), end="")
        return 0
    profile = _window(flags.profile)
    cli.setup()
    if flags.print_sharding:
        from tfm_jax.parallel.sharding import format_table
        from tfm_jax.train.build import build

        experiment = build(config)
        print(format_table(experiment.layout.table(experiment.abstract_state())))
        return 0
    if flags.workdir is None:
        raise UserError("--workdir is not set: where should the run go? For instance --workdir=runs/first")
    from tfm_jax.parallel import multihost
    from tfm_jax.train.run import train

    outcome = train(config, flags.workdir, profile=profile)
    code = 0 if outcome.status == "finished" else cli.PREEMPTED
    if not multihost.is_main():
        return code
    if outcome.status == "finished":
        _summary(flags.workdir, outcome.result, profile is not None)
    if flags.json:
        cli.print_json({"status": outcome.status, **outcome.result})
    return code


def _window(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, count = text.partition(":")
    if not (first.isdigit() and count.isdigit() and int(count) > 0):
        raise UserError(f"--profile={text}: write STEP:COUNT, for instance 20:5.")
    return int(first), int(count)


def _summary(run: Path, result: dict[str, Any], profiled: bool) -> None:
    """The figures beside two compressors' on the same bytes, a sample, and how to go on."""
    import jax

    from experiments import generate

    print(f"\nFinished {result['step']} steps in {result['train_seconds']:.0f} s of training.")
    rows = [("on held-out data", "bits per byte")]
    for key in sorted(k for k in result if k.endswith("/bits_per_byte")):
        rows.append((f"this model ({key.split('/')[1]})", f"{result[key]:.3f}"))
    for key in sorted(k for k in result if k.startswith("reference/")):
        rows.append((key.partition("/")[2], f"{result[key]:.3f}"))
    if len(rows) > 1:
        print(cli.table(rows))
    # Reading a checkpoint takes all processes, and only this one is here.
    sample, asked = generate.sample(run) if jax.process_count() == 1 else (None, None)
    if sample is not None:
        print(f"\nA sample:\n{sample}")
    python = cli.python()
    print(f"\nPicture     {run / 'plots' / 'loss.png'}")
    print(f"Evaluate    {python} -m experiments.evaluate --run {run}")
    if asked is not None:
        print(f"Generate    {python} -m experiments.generate --run {run} {asked}")
    if profiled:
        print(f"Profile     tensorboard --logdir {run / 'profile'}   (pip install tensorboard-plugin-profile)")
    print(f"Watch       tensorboard --logdir {run}   (pip install tensorboard)")


if __name__ == "__main__":
    cli.run(main)

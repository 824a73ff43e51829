"""Save a run's adapters alone, or put saved ones on the model that they were trained on.

The second makes a run directory with the adapters merged, for evaluate, generate, convert and checkpoint.init_from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.adapters --run runs/minilm_sst2-lora-0 --to adapters/sst2
  python -m experiments.adapters --from adapters/sst2 --base runs/minilm --to runs/sst2"""


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", type=Path, help="run directory whose adapters are saved")
    made.add_argument("--step", type=int, help="its checkpoint; the newest by default")
    made.add_argument("--from", dest="source", type=Path, help="folder of saved adapters")
    made.add_argument("--base", type=Path, help="run directory of the model that they go on")
    made.add_argument("--to", type=Path, required=True, help="a new folder, or a new run directory")
    flags, _ = cli.parse(made, argv)
    if (flags.run is None) == (flags.source is None) or (flags.source is None) != (flags.base is None):
        raise UserError("Give --run RUN to save its adapters, or --from FOLDER and --base RUN to put them on.")
    if flags.step is not None and flags.run is None:
        raise UserError("--step is of the run whose adapters are saved: it goes with --run.")
    cli.setup()
    from tfm_jax.train import adapters

    if flags.run is not None:
        record = adapters.save(flags.run, flags.to, flags.step)
    else:
        record = adapters.put_on(flags.source, flags.base, flags.to)
    print(cli.table([(name, f"{x:.4%}" if isinstance(x, float) else str(x)) for name, x in record.items()]))
    if flags.json:
        cli.print_json(record)
    return 0


if __name__ == "__main__":
    cli.run(main)

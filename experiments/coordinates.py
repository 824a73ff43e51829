"""Coordinate check: do activations move as far in the first steps at every width, standard and by muP?

Trains the config a few steps at each width and compares what has changed (Yang et al. 2022, appendix D.1). `train.mup` of the
config says the base; without it that is the smallest width. The rate is the config's, without its warm-up: give one that trains
well at the base. Above it what a step has moved makes the next step larger, and sooner in a wide model: that is no longer the
parametrisation's slope. Writes `coordinates.json` and `coordinates.png`. Exits with 1 if something grows or shrinks with the width
under muP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.coordinates --config=configs/gpt_mup.py --to=runs/coordinates"""
# A slope within it is flat: the changes of widths 64 and 1,024 differ by a factor of at most 2.
FLAT = 0.25


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument(
        "--config", required=True, metavar="FILE[:ARGS]", help="config file; --config.KEY=VALUE changes a key"
    )
    made.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="values of model.width")
    made.add_argument("--steps", type=int, default=4, help="updates before the comparison")
    made.add_argument("--seeds", type=int, default=2, help="how many initialisations are averaged")
    made.add_argument(
        "--to", type=Path, required=True, help="folder for the figures; what is there is not measured again"
    )
    flags, overrides = cli.parse(made, argv)
    config = configs.resolve(configs.load(flags.config), overrides)
    for name, least in (("steps", 1), ("seeds", 1)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name}={getattr(flags, name)}: must be at least {least}.")
    if len(set(flags.widths)) < 2 or min(flags.widths) < 1:
        raise UserError(f"--widths {' '.join(map(str, flags.widths))}: give two or more, for instance 64 128 256.")
    cli.setup()
    figures = check(config, sorted(set(flags.widths)), flags.steps, flags.seeds, flags.to)
    for line in report(figures):
        print(line)
    if flags.json:
        cli.print_json(figures)
    return int(not figures["worst"]["mup"] <= FLAT)


def check(config: configs.Config, widths: Sequence[int], steps: int, seeds: int, folder: Path) -> dict[str, Any]:
    """Slopes of both parametrisations, with a picture; each measurement is kept in the folder."""
    from tfm_jax.files import write_atomic
    from tfm_jax.train import coordinates

    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, list[coordinates.Moves]]] = {}
    for name in coordinates.NAMES:
        for width in widths:
            for seed in range(seeds):
                one = coordinates.at_width(configs.changed(config, {"train.seed": seed}), width, name, min(widths))
                path = folder / f"{width}-{seed}-{steps}-{configs.digest(one)}.json"
                if not path.is_file():
                    write_atomic(path, json.dumps(coordinates.moves(one, steps=steps)) + "\n")
                    print(f"{name}, {width} wide, seed {seed}: measured", flush=True)
                found.setdefault(name, {}).setdefault(width, []).append(json.loads(path.read_text()))
    slopes = {name: coordinates.slopes(by_width) for name, by_width in found.items()}
    coordinates.draw(folder / "coordinates.png", found)
    worst = {name: max(map(abs, by_quantity.values())) for name, by_quantity in slopes.items()}
    figures = {"widths": list(widths), "steps": steps, "seeds": seeds, "slopes": slopes, "worst": worst, "flat": FLAT}
    write_atomic(folder / "coordinates.json", configs.to_json(figures))
    return figures


def report(figures: Mapping[str, Any]) -> list[str]:
    slopes, worst = figures["slopes"], figures["worst"]
    rows = [("power of the width", *slopes)]
    rows += [(quantity, *(f"{slopes[name][quantity]:+.2f}" for name in slopes)) for quantity in slopes["mup"]]
    flat = "flat" if worst["mup"] <= FLAT else "NOT flat"
    lines = [
        cli.table(rows),
        f"muP is {flat}: at most {worst['mup']:.2f} (limit {FLAT}); the standard parametrisation {worst['standard']:.2f}.",
    ]
    if not worst["mup"] <= FLAT:
        lines.append(
            "A few narrow widths and seeds differ by chance, and a rate that hardly trains has slopes of its own: before it is"
            " believed, try wider --widths, more --seeds and a lower optim.lr."
        )
    return lines


if __name__ == "__main__":
    cli.run(main)

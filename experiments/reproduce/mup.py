"""Learning rates carried over widths: the coordinate check from 64 to 1,024, and the best rate at 64 and at 512.

With `configs/gpt_mup.py`, standard and by muP. Writes `results/mup_coordinates.json` and `results/mup_rates.json`, each with its picture,
and fails where muP is not flat, or its best rates are further apart than one step of the grid, a factor of 2. What is in
`--workdir` is not done again.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, coordinates
from experiments.reproduce.record import RESULTS, origin, write_result
from tfm_jax import config as configs

EXAMPLES = """\
  python -m experiments.reproduce.mup
  python -m experiments.reproduce.mup --only rates"""
CONFIG = "configs/gpt_mup.py"
WIDTHS = (64, 512)
# Powers of 2, from too low to too high for both.
GRID = tuple(range(-12, -4))
METRIC = "eval/validation/loss"
# By width and learning rate.
Losses = dict[int, dict[float, float]]


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--only", choices=("coordinates", "rates"), help="one of the two; both by default")
    made.add_argument("--workdir", type=Path, default=Path("runs/mup"))
    # The rest is for trying it out: the figures are those of the defaults.
    made.add_argument("--config", default=CONFIG, help=cli.HIDDEN)
    made.add_argument("--widths", type=int, nargs=2, default=WIDTHS, help=cli.HIDDEN)
    made.add_argument("--checked", type=int, nargs="+", default=(64, 128, 256, 512, 1024), help=cli.HIDDEN)
    made.add_argument("--powers", type=int, nargs="+", default=GRID, help=cli.HIDDEN)
    made.add_argument("--results", type=Path, default=RESULTS, help=cli.HIDDEN)
    flags, overrides = cli.parse(made, argv)
    cli.setup()
    config = configs.resolve(configs.load(flags.config), overrides)
    flags.results.mkdir(parents=True, exist_ok=True)
    figures, wrong = {}, False
    if flags.only != "rates":
        figures["coordinates"] = checked = coordinates.check(config, flags.checked, 4, 2, flags.workdir / "coordinates")
        print("\n".join(coordinates.report(checked)), flush=True)
        shutil.copyfile(flags.workdir / "coordinates" / "coordinates.png", flags.results / "mup_coordinates.png")
        write_result("mup_coordinates", checked, config=flags.config, folder=flags.results)
        wrong |= not checked["worst"]["mup"] <= coordinates.FLAT
    if flags.only != "coordinates":
        losses = {name: sweep(config, flags.widths, flags.powers, name, flags.workdir) for name in ("standard", "mup")}
        draw(flags.results / "mup_rates.png", losses)
        figures["rates"] = found = rates(losses)
        rates_of = itertools.product(losses, flags.widths, (2.0**power for power in flags.powers))
        files = [run_of(flags.workdir, *one) / "result.json" for one in rates_of]
        runs = [json.loads(file.read_text()) for file in files if file.is_file()]
        said = origin(runs)
        write_result("mup_rates", found, config=flags.config, seed=0, folder=flags.results, **said)
        wrong |= not found["apart_in_factors_of_2"]["mup"] <= 1
    if flags.json:
        cli.print_json(figures)
    return int(wrong)


def rates(losses: Mapping[str, Losses]) -> dict[str, Any]:
    """The best rate of each width, and how far the widths' are apart."""
    best = {name: {width: min(by, key=by.__getitem__) for width, by in found.items()} for name, found in losses.items()}
    for name, found in losses.items():
        for width, by in found.items():
            rate = best[name][width]
            shown = f"2^{math.log2(rate):.0f} = {rate:.3g}, {by[rate]:.3f} nats a byte"
            print(f"{name:8s} {width:4d} wide: best at {shown}", flush=True)
    apart = {name: abs(math.log2(max(found.values()) / min(found.values()))) for name, found in best.items()}
    # JSON has no infinity: what diverged has no loss.
    known = {
        name: {width: {rate: y if math.isfinite(y) else None for rate, y in by.items()} for width, by in found.items()}
        for name, found in losses.items()
    }
    # Numbers as keys become text, which sorts.
    plain: dict[str, Any] = json.loads(json.dumps({"losses": known, "best": best, "apart_in_factors_of_2": apart}))
    return plain


def sweep(config: configs.Config, widths: Sequence[int], powers: Sequence[int], name: str, folder: Path) -> Losses:
    """The final loss at each width and rate; one that diverged has lost."""
    from tfm_jax.train.coordinates import at_width

    found: Losses = {}
    for width in widths:
        one = at_width(config, width, name, min(widths))
        for rate in (2.0**power for power in powers):
            # At the base width both are one.
            run = run_of(folder, "mup" if one["train"]["mup"] else "standard", width, rate)
            found.setdefault(width, {})[rate] = loss(configs.changed(one, {"optim.lr": rate}), run)
    return found


def run_of(folder: Path, name: str, width: int, rate: float) -> Path:
    return folder / f"{name}-{width}-{rate:.6f}"


def loss(config: configs.Config, run: Path) -> float:
    from tfm_jax.errors import UserError
    from tfm_jax.sweep import trials
    from tfm_jax.train.run import train
    from tfm_jax.train.rundir import check_config

    check_config(run, config)
    if METRIC not in trials.result(run):
        try:
            train(config, run)
        except UserError as error:
            # A rate that is too high is an answer, anything else is a mistake.
            if "not finite" not in str(error):
                raise
            return math.inf
    found = trials.result(run)[METRIC]
    return found if math.isfinite(found) else math.inf


def draw(path: Path, losses: Mapping[str, Losses]) -> None:
    """Loss over the learning rate, a line for each width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tfm_jax.train.coordinates import NAMES

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, losses.items(), strict=True):
        for width, by in found.items():
            points = [(rate, y) for rate, y in by.items() if math.isfinite(y)]
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{width} wide")
            rate, least = min(points, key=lambda point: point[1])
            axes.plot([rate], [least], marker="*", markersize=13, color=line.get_color())
        axes.set(title=NAMES[name], xlabel="learning rate", xscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation loss (nats a byte)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main)

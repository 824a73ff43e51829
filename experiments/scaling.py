"""Scaling law of finished runs: loss against parameters and tokens, with its uncertainty, and the best size for a budget.

Fits L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3) to each run's last loss, N being all parameters and D the
tokens trained on. Writes `scaling.json` and `scaling.png`. The runs should each have their learning rate's whole decay behind
them: a loss from the middle of one is higher than that of a run of this length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax import config as configs
from tfm_jax.errors import UserError, nearest
from tfm_jax.units import counted, short

EXAMPLES = """\
  python -m experiments.scaling 'sweeps/sizes/*' --metric=eval/validation/loss --budget=1e13 --to=runs/law"""


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("runs", nargs="+", metavar="RUN", help="finished runs, or patterns of them")
    made.add_argument("--metric", required=True, help="a loss of result.json, for instance eval/validation/loss")
    made.add_argument("--budget", type=float, required=True, help="FLOPs to spend, for instance 1e18")
    made.add_argument("--to", type=Path, required=True, help="folder for the figures")
    made.add_argument("--resamples", type=int, default=100, help="fits of resampled runs, for the uncertainty")
    flags, _ = cli.parse(made, argv)
    if not flags.budget > 0:
        raise UserError(f"--budget={flags.budget}: must be above 0.")
    if flags.resamples < 10:
        raise UserError(f"--resamples={flags.resamples}: at least 10, or there is no interval.")
    from tfm_jax.files import write_atomic
    from tfm_jax.sweep import scaling

    read = [_read(path, flags.metric) for path in cli.targets(flags.runs)]
    runs = [run for run, _ in read]
    found = scaling.fit(runs, resamples=flags.resamples)
    best, intervals, without = scaling.best(found, runs, flags.budget)
    of_runs = sorted(flops / run.parameters for run, flops in read if flops is not None)
    figures = {
        "metric": flags.metric,
        "runs": [run._asdict() for run in runs],
        "law": {name: {"value": v, "low": low, "high": high} for name, (v, low, high) in scaling.constants(found).items()},
        "residual": found.residual,
        "budget": flags.budget,
        "optimum": {name: {"value": v, "low": intervals[name][0], "high": intervals[name][1]} for name, v in best._asdict().items()},
        "resamples_without_optimum": without,
        "flops_per_parameter_and_token": {"used": scaling.FLOPS, "of_the_runs": of_runs and [of_runs[0], of_runs[-1]]},
    }  # fmt: skip
    flags.to.mkdir(parents=True, exist_ok=True)
    write_atomic(flags.to / "scaling.json", configs.to_json(figures))
    scaling.draw(flags.to / "scaling.png", runs, found, flags.budget, best)
    rows = [("constant", "value", "90 % of resampled fits")]
    for name, (value, low, high) in scaling.constants(found).items():
        rows.append((name, f"{value:.4g}", f"{low:.4g} to {high:.4g}"))
    print(cli.table(rows))
    print(f"{counted(len(runs), 'run')}, {100 * found.residual:.2f} % away from it (root mean square).")
    least, most = (short(x) for x in intervals["parameters"])
    print(
        f"Best for {flags.budget:.3g} FLOPs: {short(best.parameters)} parameters ({least} to {most}) on"
        f" {short(best.tokens)} tokens, loss {best.loss:.4g} ({intervals['loss'][0]:.4g} to {intervals['loss'][1]:.4g})."
    )
    if without:
        print(
            f"{without} of {flags.resamples} resampled fits have no best size: the loss does not fall in them. The others' is meant."
        )
    for line in _doubts(runs, flags.budget, best, of_runs):
        print(line)
    if flags.json:
        cli.print_json(figures)
    return 0


def _doubts(runs: Sequence[Any], budget: float, best: Any, of_runs: Sequence[float]) -> list[str]:
    from tfm_jax.sweep import scaling

    spent = [scaling.FLOPS * run.parameters * run.tokens for run in runs]
    lines = []
    if budget > 10 * max(spent):
        lines.append(f"That is {budget / max(spent):.0f} times the largest run: far outside of what was measured.")
    if budget < min(spent) / 10:
        lines.append(f"That is {budget / min(spent):.2g} times the smallest run: far outside of what was measured.")
    for name in ("parameters", "tokens"):
        value, most = getattr(best, name), max(getattr(run, name) for run in runs)
        if value > 3 * most:
            lines.append(f"{short(value)} {name} are {value / most:.0f} times the most of these runs.")
    if of_runs and of_runs[-1] > 1.5 * scaling.FLOPS:
        lines.append(
            f"Counted are 6 FLOPs a parameter and token; these runs have {of_runs[0]:.1f} to {of_runs[-1]:.1f} by the model's own"
            " count, as small models with long sequences do."
        )
    return lines


def _read(run: Path, metric: str) -> tuple[Any, float | None]:
    """A finished run, and its model's FLOPs a token where it says so."""
    from tfm_jax.files import read_status
    from tfm_jax.sections import build_model
    from tfm_jax.sweep import scaling
    from tfm_jax.train.rundir import read_config

    config = read_config(run)
    if not (run / "result.json").is_file():
        state = read_status(run).get("state", "unknown")
        raise UserError(f"{run} is not finished ({state}): it has no result.json. Finish it, or leave it out.")
    result = json.loads((run / "result.json").read_text())
    if not isinstance(result.get(metric), int | float):
        losses = [name for name, value in result.items() if name.endswith("/loss") and isinstance(value, int | float)]
        raise UserError(f"{run} has no --metric={metric}.{nearest(metric, losses)}")
    data = config["data"]
    if data.get("seq_len") is None or data.get("batch_size") is None:
        raise UserError(f"{run}: its data.name={data['name']!r} has no fixed number of tokens a step (data.seq_len).")
    tokens = float(result["step"]) * data["batch_size"] * data["seq_len"]
    flops = getattr(build_model(config["model"]), "train_flops_per_token", None)
    each = None if flops is None else float(flops(data["seq_len"]))
    return scaling.Run(run.as_posix(), float(result["parameters"]), tokens, float(result[metric])), each


if __name__ == "__main__":
    cli.run(main)

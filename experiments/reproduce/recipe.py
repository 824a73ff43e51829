"""Train a config once for each seed and write the figure that it is for: `results/NAME.json`.

A run that is finished is not trained again, and one that was cut goes on. Further `--config.SECTION.KEY=VALUE` are for
every run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reproduce.record import RESULTS, write_result
from tfm_jax.errors import UserError, nearest

EXAMPLES = """\
  python -m experiments.reproduce.recipe --config=configs/minilm_sst2.py --metric=eval/test/accuracy --at-least=0.9 \\
    --config.data.manual_dir=path/to/data --seeds 0 1 2"""


# Where files lie is this machine's matter.
LOCAL = ("data.manual_dir", "data.cache_dir")


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:ARGUMENTS")
    made.add_argument("--metric", required=True, help="of a run's result.json, for instance eval/test/accuracy")
    made.add_argument("--at-least", type=float, help="the figure that the recipe must reach")
    made.add_argument("--published", default="", help="a figure to stand beside it, and where it is from")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--workdir", type=Path, default=Path("runs"), help="folder of the runs")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of NAME.json")
    flags, overrides = cli.parse(made, argv)
    path, _, arguments = flags.config.partition(":")
    name = "-".join(part for part in (Path(path).stem, arguments) if part)
    found: dict[int, dict[str, Any]] = {}
    for seed in flags.seeds:
        found[seed] = _trained(flags.config, seed, flags.workdir / f"{name}-{seed}", overrides)
        if flags.metric not in found[seed]:
            raise UserError(f"--metric={flags.metric}: the run has none.{nearest(flags.metric, sorted(found[seed]))}")
        # Written as they come: what is done is not lost with what is not.
        figures = _figures(found, flags)
        settings = {key: value for key, value in overrides if key not in LOCAL}
        write_result(name, figures, config={"file": flags.config, "overrides": settings}, folder=flags.results)
    spread = f" (+- {figures['deviation']:.4f} over {len(found)} seeds)" if len(found) > 1 else ""
    wanted = "" if flags.at_least is None else f", at least {flags.at_least} was asked for"
    print(f"{name}: {flags.metric} {figures['mean']:.4f}{spread}{wanted}")
    if flags.json:
        cli.print_json(figures)
    return 0 if flags.at_least is None or figures["mean"] >= flags.at_least else 1


def _trained(config: str, seed: int, run: Path, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={run}", f"--config.train.seed={seed}",
        f"--config.data.seed={seed}", *(f"--config.{key}={value}" for key, value in overrides),
    ]  # fmt: skip
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(code)
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def _figures(found: dict[int, dict[str, Any]], flags: Any) -> dict[str, Any]:
    values = [result[flags.metric] for result in found.values()]
    return {
        "metric": flags.metric,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "by_seed": {str(seed): result[flags.metric] for seed, result in found.items()},
        "asked": flags.at_least,
        "published": flags.published,
        "train_seconds": statistics.fmean(result["train_seconds"] for result in found.values()),
    }


if __name__ == "__main__":
    cli.run(main)

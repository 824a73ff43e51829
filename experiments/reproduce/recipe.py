"""Train a config once for each seed and write the figure that it is for: `results/NAME.json`.

What a config's figure is, and what it should be, stands beside it in its file, `RECIPES` by arguments. A run that is finished is
not trained again, and one that was cut goes on. Further `--config.SECTION.KEY=VALUE` are for every run; where they may change a
recipe's figure, its runs and figures go to other folders, `--workdir` and `--results`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from experiments import cli
from experiments.convert import read_origin
from experiments.reproduce.goals import Goal, check
from experiments.reproduce.record import RESULTS, origin, write_result
from tfm_jax import config as configs
from tfm_jax.errors import UserError, nearest
from tfm_jax.train import rundir

EXAMPLES = """\
  python -m experiments.reproduce.recipe --config=configs/minilm_sst2.py --model=path/to/all-MiniLM-L6-v2 --data=path/to/data
  python -m experiments.reproduce.recipe --config=configs/minilm_sst2.py:lora --data=path/to/data --seeds 0 1 2"""


class Recipe(TypedDict, total=False):
    """What a config is for.

    Attributes:
      title: what is measured, in a line of a table.
      metrics: of a run's `result.json`; the first is the figure.
      goals: what the figures should be.
      published: a figure to stand beside it, where it is from and under which protocol.
      tried: other settings and their figures, above all where it falls short.
      model: the run directory that an imported model goes to (`--model`).
      needs: runs of other recipes that it starts from.
      picture: the picture among a run's `plots/` that stands beside the figure, of the first seed.
    """

    title: str
    metrics: Sequence[str]
    goals: Sequence[Goal]
    published: str
    tried: str
    model: str
    needs: Sequence[str]
    picture: str


# Where files lie is this machine's matter.
LOCAL = ("data.manual_dir", "data.cache_dir")
# What changes no figure.
FREE = (*LOCAL, *(key for key in configs.FREE_KEYS if key != "evals"))


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--config", required=True, help="configs/NAME.py or configs/NAME.py:ARGUMENTS")
    made.add_argument("--model", type=Path, help="folder of the model that the recipe starts from")
    made.add_argument("--data", type=Path, help="folder of the data set's files: data.manual_dir")
    made.add_argument("--metric", nargs="+", help="other metrics than the recipe's, of which it asks nothing")
    made.add_argument("--at-least", type=float, help="of the first metric: another goal than the recipe's")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--workdir", type=Path, help="folder of the runs (runs)")
    made.add_argument("--results", type=Path, help=f"folder of NAME.json ({RESULTS})")
    flags, overrides = cli.parse(made, argv)
    module, arguments = configs.load_module(flags.config)
    known = getattr(module, "RECIPES", {})
    recipe = dict(known.get(arguments, {}))
    changed = [f"--config.{key}={value}" for key, value in overrides if not configs.is_below(key, FREE)]
    changed += [flag for flag in ("--metric", "--at-least") if getattr(flags, flag[2:].replace("-", "_")) is not None]
    if recipe and changed and None in (flags.results, flags.workdir):
        raise UserError(
            f"{changed[0]}: runs/ and {RESULTS}/ are the recipe's as it is. Name folders for others: --workdir=FOLDER --results=FOLDER."
        )
    results, workdir = flags.results or RESULTS, flags.workdir or Path("runs")
    # What the recipe asks is asked of its own metrics.
    recipe |= {"metrics": flags.metric, "goals": []} if flags.metric else {}
    recipe |= {} if flags.at_least is None else {"goals": [{"least": flags.at_least}]}
    if "metrics" not in recipe:
        file = flags.config.partition(":")[0]
        names = ", ".join(f"{file}:{name}" if name else file for name in known)
        others = f" Its recipes are {names}." if names else ""
        raise UserError(f"--config={flags.config} says no figure in RECIPES.{others} Or give --metric.")
    if flags.data is not None:
        cli.need_folder("--data", flags.data)
        overrides = [*overrides, ("data.manual_dir", str(flags.data.absolute()))]
    values = [str(value) for value in configs.flat(configs.resolve(configs.load(flags.config), overrides)).values()]
    for run in map(Path, recipe.get("needs", ())):
        # Overrides may name another one.
        if (str(run) in values or f"run:{run}" in values) and not (run / "result.json").is_file():
            first, seed = run.name.rpartition("-")[::2]
            raise UserError(f"{flags.config} starts from {run}: finish `make reproduce-{first}` (seed {seed}) first.")
    if "model" in recipe:
        _imported(Path(recipe["model"]), flags.model)
    elif flags.model is not None:
        raise UserError(f"--model={flags.model}: {flags.config} starts from no imported model.")
    name = "-".join(part for part in (Path(flags.config.partition(":")[0]).stem, arguments) if part)
    found: dict[int, dict[str, Any]] = {}
    for seed in flags.seeds:
        found[seed] = _trained(flags.config, seed, workdir / f"{name}-{seed}", overrides)
        for metric in recipe["metrics"]:
            if metric not in found[seed]:
                run = workdir / f"{name}-{seed}"
                raise UserError(
                    f"{run} has no {metric}.{nearest(metric, sorted(found[seed]))} If it is older than the recipe, move it away."
                )
        # Written as they come: what is done is not lost with what is not.
        figures = _figures(found, recipe)
        settings = {key: value for key, value in overrides if key not in LOCAL}
        write_result(
            name,
            figures,
            config={"file": flags.config, "overrides": settings},
            folder=results,
            **origin(found.values()),
        )
        if "picture" in recipe and seed == flags.seeds[0]:
            shutil.copyfile(workdir / f"{name}-{seed}" / "plots" / recipe["picture"], results / f"{name}.png")
    spread = f" (+- {figures['deviation']:.4f} over {len(found)} seeds)" if len(found) > 1 else ""
    print(f"{name}: {figures['metric']} {figures['mean']:.4f}{spread}")
    checked = [check(goal, figures, results) for goal in figures["goals"]]
    for words, met in checked:
        print(f"  asked: {words}{'' if met is None else ': met' if met else ': missed'}")
    if flags.json:
        cli.print_json(figures)
    return int(any(met is False for _, met in checked))


def _imported(run: Path, model: Path | None) -> None:
    """The run that a recipe starts from, made from a model's folder if it is not there."""
    if (run / "config.json").is_file():
        found = (read_origin(run) or {}).get("folder", "no imported model")
        if model is not None and Path(found).resolve() != model.resolve():
            raise UserError(f"--model={model}, but {run} is {found}: move that away first.")
        return
    if model is None:
        raise UserError(f"This recipe starts from a model. Name its folder: --model=FOLDER; it is imported to {run}.")
    command = [sys.executable, "-m", "experiments.convert", "--from", f"hf:{model}", "--to", str(run)]
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)


def _trained(config: str, seed: int, run: Path, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    if (run / "result.json").is_file():
        # A run may go on with other evaluators, but what has finished has its figures by those it had.
        asked = configs.resolve(configs.load(config), overrides)["evals"]
        try:
            before = configs.resolve(rundir.read_config(run))["evals"]
        except UserError as error:
            raise UserError(f"{run} is older than the code: move it away, or name another --workdir. {error}") from None
        # What the run's evaluators did not have yet is as it is by default.
        had, now = (configs.flat(evals) for evals in (before, asked))
        if differ := sorted(key for key in had | now if had.get(key) != now.get(key)):
            raise UserError(
                f"{run} has finished with evals.{differ[0]}={had.get(differ[0])!r}, and now it is {now.get(differ[0])!r}: move the"
                " run away, or name another --workdir."
            )
    command = [
        sys.executable, "-m", "experiments.train", f"--config={config}", f"--workdir={run}", f"--config.train.seed={seed}",
        f"--config.data.seed={seed}", *(f"--config.{key}={value}" for key, value in overrides),
    ]  # fmt: skip
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(code)
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def _figures(found: Mapping[int, Mapping[str, Any]], recipe: Mapping[str, Any]) -> dict[str, Any]:
    first, *others = recipe["metrics"]
    values = [result[first] for result in found.values()]
    return {
        "title": recipe.get("title", ""),
        "metric": first,
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "by_seed": {str(seed): result[first] for seed, result in found.items()},
        "also": {metric: statistics.fmean(result[metric] for result in found.values()) for metric in others},
        "goals": list(recipe.get("goals", ())),
        "published": recipe.get("published", ""),
        "tried": recipe.get("tried", ""),
        "train_seconds": statistics.fmean(result["train_seconds"] for result in found.values()),
    }


if __name__ == "__main__":
    cli.run(main)

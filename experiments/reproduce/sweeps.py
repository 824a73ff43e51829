"""Sweeps on Tiny Shakespeare at nanoGPT's CPU setting, 500 steps a trial: three comparisons, each with its own results file.

`vectorise`: 8 learning rates with 2 seeds each, as 2 processes at a time and as 8 members, 4 of one program in each of 2
processes; wall time from start to end, each with an empty compile cache, and the losses. `asha`: a study of 24 trials beside
that grid: its best loss, and its steps. `kills`: a study whose launcher is killed with SIGKILL 10 times beside an undisturbed
one: trials that are missing, are there twice, or were begun again after their end. What is finished is not done again; a timed
sweep that was interrupted starts anew. Writes `results/sweep_NAME.json`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reproduce.record import origin, write_result
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import write_atomic
from tfm_jax.sweep import trials
from tfm_jax.train.log import read_metrics

EXAMPLES = """\
  python -m experiments.reproduce.sweeps --data path/to/input.txt
  python -m experiments.reproduce.sweeps --data path/to/input.txt --only kills"""
METRIC = "eval/validation/loss"
# Whose runs each part's figures are of.
READ = {
    "vectorise": ("parallel", "vectorised"),
    "asha": ("vectorised", "asha"),
    "kills": ("kills_quiet", "kills_killed"),
}
TOGETHER = ("--vectorise=4", "--parallel=2")


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--data", type=Path, required=True, help="Tiny Shakespeare's input.txt, or .gz")
    made.add_argument("--only", nargs="+", metavar="NAME", default=list(PARTS), help="vectorise, asha, kills")
    made.add_argument("--steps", type=int, default=500, help="of a trial")
    made.add_argument("--kills", type=int, default=10)
    made.add_argument("--workdir", type=Path, default=Path("runs/sweeps"))
    flags, _ = cli.parse(made, argv)
    if not flags.data.is_file():
        raise UserError(f"--data={flags.data}: there is no such file.")
    for name in flags.only:
        if name not in PARTS:
            raise UserError(f"--only {name}: there is no such part.{nearest(name, PARTS)}")
    found = {}
    for name in flags.only:
        found[name] = PARTS[name](flags)
        config = " ".join(_short(flags) if name == "kills" else _base(flags)).replace(str(flags.data), "DATA")
        runs = [
            json.loads(path.read_text()) for of in READ[name] for path in (flags.workdir / of).glob("*/result.json")
        ]
        write_result(
            f"sweep_{name}",
            found[name],
            config=config,
            seed=0,
            **origin(runs),
        )
        print(f"{name}: {found[name]}", flush=True)
    if flags.json:
        cli.print_json(found)
    return 0


def _base(flags: Any, steps: int | None = None) -> list[str]:
    steps = steps or flags.steps
    return [
        "--config=configs/gpt_chars.py", f"--config.data.source=text:{flags.data}", f"--config.train.steps={steps}",
        f"--config.optim.warmup_steps={steps // 20}", "--config.evals.validation.max_batches=40",
        "--config.log.tensorboard=False",
    ]  # fmt: skip


def _short(flags: Any) -> list[str]:
    """Trials that are killed: a fifth of the steps, many checkpoints."""
    return [*_base(flags, max(flags.steps // 5, 20)), "--config.checkpoint.every=10"]


def _sweep(folder: Path, sweep: str, base: Sequence[str], *more: str) -> list[str]:
    command = [sys.executable, "-m", "experiments.sweep", f"--sweep=configs/sweeps/{sweep}.py", f"--workdir={folder}"]
    return [*command, *base, *more]


def _timed(flags: Any, name: str, *more: str) -> float:
    """Seconds of a grid from start to end, measured once."""
    folder, note = flags.workdir / name, flags.workdir / f"{name}.json"
    if not note.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(cache := flags.workdir / f"{name}_cache", ignore_errors=True)
        _tokens(flags)
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache.absolute())}
        began = time.perf_counter()
        subprocess.run(_sweep(folder, "lr", _base(flags), *more), check=True, env=env)
        write_atomic(note, json.dumps({"seconds": time.perf_counter() - began}))
    return float(json.loads(note.read_text())["seconds"])


def _tokens(flags: Any) -> None:
    """The text as tokens, which are made once for all."""
    flags.workdir.mkdir(parents=True, exist_ok=True)
    run = flags.workdir / "tokens"
    command = [sys.executable, "-m", "experiments.train", *_base(flags), f"--workdir={run}"]
    subprocess.run(
        [*command, "--config.train.steps=1", "--config.optim.warmup_steps=0"], check=True, stdout=subprocess.DEVNULL
    )
    shutil.rmtree(run)


def _vectorise(flags: Any) -> dict[str, Any]:
    apart, together = _timed(flags, "parallel", "--parallel=2"), _timed(flags, "vectorised", *TOGETHER)
    losses = [_losses(flags.workdir / name) for name in ("parallel", "vectorised")]
    return {
        "trials": len(losses[0]),
        "steps": flags.steps,
        "parallel_seconds": apart,
        "vectorised_seconds": together,
        "ratio": together / apart,
        # Where a rate is so high that rounding grows from step to step, later ones are further apart.
        "relative_difference_of_losses_at_step_10": _apart(flags, 10),
        "relative_difference_of_last_losses": {
            rate: max(abs(losses[1][name] / x - 1) for name, x in losses[0].items() if f"lr={rate}," in name)
            for rate in sorted({name.split(",")[0].removeprefix("lr=") for name in losses[0]}, key=float)
        },
        "best": min(losses[1], key=lambda name: losses[1][name]),
    }


def _apart(flags: Any, step: int) -> float:
    """The largest relative difference between the two grids' training losses at a step."""
    first, second = (_trained(flags.workdir / name, step) for name in ("parallel", "vectorised"))
    return max(abs(second[name] / x - 1) for name, x in first.items())


def _trained(folder: Path, step: int) -> dict[str, float]:
    found = trials.read_folder(folder)[1]
    return {t.name: trials.values(read_metrics(folder / t.name), "train/loss")[step] for t in found}


def _losses(folder: Path) -> dict[str, float]:
    """Final losses of a sweep's finished trials."""
    found = {trial.name: trials.result(folder / trial.name) for trial in trials.read_folder(folder)[1]}
    return {name: result[METRIC] for name, result in found.items() if METRIC in result}


def _asha(flags: Any) -> dict[str, Any]:
    _timed(flags, "vectorised", *TOGETHER)
    folder = flags.workdir / "asha"
    subprocess.run(_sweep(folder, "asha", _base(flags), "--vectorise=2"), check=True)
    grid, found = _losses(flags.workdir / "vectorised"), _losses(folder)
    states = [trials.state(folder / trial.name) for trial in trials.read_folder(folder)[1]]
    steps, of_grid = sum(state.step for state in states), len(grid) * flags.steps
    best, of_study = min(grid.values()), min(found.values())
    return {
        "trials": len(states),
        "stopped": sum(state.word == trials.PRUNED for state in states),
        "grid_best": best,
        "study_best": of_study,
        "behind": of_study / best - 1,
        "grid_steps": of_grid,
        "study_steps": steps,
        "share_of_steps": steps / of_grid,
    }


def _kills(flags: Any) -> dict[str, Any]:
    """One trial at a time, so that what is drawn and stopped depends on nothing but the study."""
    base = _short(flags)
    quiet, killed = flags.workdir / "kills_quiet", flags.workdir / "kills_killed"
    subprocess.run(_sweep(quiet, "asha", base, "--vectorise=1"), check=True)
    shutil.rmtree(killed, ignore_errors=True)
    chance, total = random.Random(0), sum(_steps(quiet).values())
    command, logged = _sweep(killed, "asha", base, "--vectorise=1"), dict[str, int]()
    for number in range(flags.kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        # Spread over the study; the last kill is well before its end.
        goal = total * (number + chance.random()) / (flags.kills + 1)
        while sum(_steps(killed).values()) < goal and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.random())
        if process.poll() is not None:
            raise UserError(f"The study ended before kill {number + 1}: raise --steps.")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name, (word, _) in _ended(killed).items():
            if word in trials.ENDED:
                logged.setdefault(name, _log_size(killed / name))
        print(f"kill {number + 1}/{flags.kills} at step {sum(_steps(killed).values())} of {total}", flush=True)
    subprocess.run(command, check=True)
    a, b = _ended(quiet), _ended(killed)
    return {
        "kills": flags.kills,
        "trials": len(b),
        "lost": len(a.keys() - b.keys()),
        "more": len(b.keys() - a.keys()),
        "doubled": _doubled(killed) - _doubled(quiet),
        "ended_and_begun_again": sum(_log_size(killed / name) != size for name, size in logged.items()),
        "same_result": a == b,
    }


def _steps(folder: Path) -> dict[str, int]:
    return {path.parent.name: trials.state(path.parent).step for path in folder.glob("*/trial.json")}


def _doubled(folder: Path) -> int:
    """Trials that have the number or the overrides of another one before them."""
    found = trials.read_folder(folder)[1]
    numbers, drawn = {trial.name.partition(",")[0] for trial in found}, {repr(trial.overrides) for trial in found}
    return len(found) - min(len(numbers), len(drawn))


def _log_size(run: Path) -> int:
    """Bytes of what a trial has printed: each start adds to them."""
    log = run / "train.log"
    return log.stat().st_size if log.is_file() else 0


def _ended(folder: Path) -> dict[str, tuple[str, float | None]]:
    """How each trial has ended, and with which loss."""
    losses = _losses(folder)
    names = [trial.name for trial in trials.read_folder(folder)[1]]
    return {name: (trials.said(folder / name)[0], losses.get(name)) for name in names}


PARTS = {"vectorise": _vectorise, "asha": _asha, "kills": _kills}


if __name__ == "__main__":
    cli.run(main)

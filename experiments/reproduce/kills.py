"""Kill a training run with SIGKILL at random moments, restart it, and compare with a run that nobody disturbed.

At least half of the kills fall into a save. The final parameters must be equal bit for bit, and no checkpoint may be
lost but the one being written. Writes `results/kills.json`.
"""

from __future__ import annotations

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

import numpy as np

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError

EXAMPLES = """\
  python -m experiments.reproduce.kills
  python -m experiments.reproduce.kills --kills 40 --seed 3"""
STEPS, EVERY = 600, 5


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--kills", type=int, default=20)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workdir", type=Path, default=Path("runs/kills"))
    flags, _ = cli.parse(made, argv)
    shutil.rmtree(flags.workdir, ignore_errors=True)
    quiet, killed = flags.workdir / "undisturbed", flags.workdir / "killed"
    began = time.perf_counter()
    subprocess.run(_command(quiet), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    print(f"The undisturbed run took {time.perf_counter() - began:.0f} s.", flush=True)
    chance = random.Random(flags.seed)
    during_save = lost = 0
    for number in range(flags.kills):
        want_save = number % 2 == 0
        before, saving, finished = _kill_once(killed, chance, want_save, number, flags.kills)
        if finished:
            raise UserError(f"The run ended before kill {number + 1}; raise STEPS or kill sooner.")
        after = finished_steps(killed)
        # What was whole when the signal was sent must still be there, but for what `keep` had dropped meanwhile.
        newest = max(before, default=0)
        lost += newest > max(after, default=0)
        during_save += saving
        where = "during a save" if saving else "between saves"
        print(
            f"kill {number + 1}/{flags.kills} {where}: newest checkpoint {newest} -> {max(after, default=0)}",
            flush=True,
        )
    subprocess.run(_command(killed), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    equal, arrays = same_state(quiet, killed)
    result = {
        "kills": flags.kills,
        "during_save": during_save,
        "checkpoints_lost": lost,
        "arrays": arrays,
        "bit_identical": equal,
    }
    write_result("kills", result, seed=flags.seed, config=" ".join(_command(killed)[1:]))
    print(
        f"{flags.kills} kills, {during_save} of them during a save:"
        f" parameters equal: {equal}; checkpoints lost: {lost}."
    )
    if flags.json:
        cli.print_json(result)
    return 0 if equal and not lost else 1


def _command(run: Path) -> list[str]:
    # Small steps and saves that follow each other closely, so that kills fall everywhere.
    return [
        sys.executable, "-m", "experiments.train", "--config=configs/gpt_stdlib.py:smoke", f"--workdir={run}",
        f"--config.train.steps={STEPS}", "--config.train.eval_every=0", f"--config.checkpoint.every={EVERY}",
        "--config.model.dropout=0.1", "--config.log.tensorboard=False", "--config.train.ema=0.99",
    ]  # fmt: skip


def _kill_once(
    run: Path, chance: random.Random, want_save: bool, number: int, total: int
) -> tuple[list[int], bool, bool]:
    """Start, wait for training to get going, kill; returns (whole checkpoints before, in a save, ended by itself)."""
    process = subprocess.Popen(
        _command(run), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    start = max(finished_steps(run), default=0)
    # Get a little further each time, so that the kills are spread over the run.
    goal = start + EVERY * chance.randint(1, max(1, (STEPS - start) // (EVERY * (total - number + 1))))
    deadline = time.perf_counter() + 120
    while process.poll() is None and max(finished_steps(run), default=0) < goal:
        if time.perf_counter() > deadline:
            raise UserError(f"No checkpoint of step {goal} within two minutes.")
        time.sleep(0.001)
    if want_save:
        while process.poll() is None and not _saving(run) and time.perf_counter() < deadline:
            time.sleep(0.0002)
    else:
        time.sleep(chance.random() * 0.3)
    before, saving = finished_steps(run), _saving(run)
    finished = process.poll() is not None
    if not finished:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return before, saving, finished


def finished_steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _saving(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())


def same_state(a: Path, b: Path) -> tuple[bool, int]:
    """Whether the final states of two runs are equal bit for bit, and of how many arrays."""
    import jax

    from tfm_jax.paths import flatten
    from tfm_jax.train.restore import open_checkpoint

    trees: list[dict[str, Any]] = []
    for run in (a, b):
        checkpoints, step = open_checkpoint(run)
        shapes = checkpoints.shapes(step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)  # noqa: B023
        trees.append(flatten(checkpoints.restore(step, abstract).state))
        checkpoints.close()
    same = [np.array_equal(trees[0][path], trees[1][path], equal_nan=True) for path in trees[0]]
    return trees[0].keys() == trees[1].keys() and all(same), len(same)


if __name__ == "__main__":
    cli.run(main)

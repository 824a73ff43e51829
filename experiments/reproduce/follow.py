"""What following a live run costs it: `evaluate --steps=all --follow` on other cores beside a training run.

Trains the same config alone and followed, one after the other, several times. Training has the first half of the cores, the
evaluating process the rest. What is compared is the median of the steps' rates that the runs have logged, so neither
start nor compilation counts. Writes `results/follow.json`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError
from tfm_jax.train.evaluation import recorded
from tfm_jax.train.log import read_metrics
from tfm_jax.train.rundir import checkpoint_steps

EXAMPLES = """\
  python -m experiments.reproduce.follow
  python -m experiments.reproduce.follow --config_file configs/gpt_stdlib.py:smoke --pairs 1"""
CONFIG = "configs/gpt_stdlib.py"
# Of a run's evaluations, which otherwise outlast a short run.
BATCHES = "--config.evals.validation.max_batches=8"


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--config_file", default=CONFIG, metavar="FILE", help="of the run that is followed")
    made.add_argument("--pairs", type=int, default=2, help="times that it runs alone and followed")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--checkpoints", type=int, default=6, help="of a run, each of which is evaluated")
    made.add_argument("--workdir", type=Path, default=Path("runs/follow"))
    flags, _ = cli.parse(made, argv)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError("Following is measured on other cores than training has, and there is one here.")
    half = len(cores) // 2
    shutil.rmtree(flags.workdir, ignore_errors=True)
    rates: dict[bool, list[float]] = {False: [], True: []}
    evaluated = 0
    for pair in range(flags.pairs):
        # In turn, so that what drifts on the machine meets both.
        for followed in (False, True) if pair % 2 == 0 else (True, False):
            run = flags.workdir / f"{'followed' if followed else 'alone'}-{pair}"
            rates[followed].append(_rate(run, flags, cores[:half], cores[half:] if followed else None))
            print(f"{run.name}: {rates[followed][-1]:.3f} steps/s", flush=True)
            if followed:
                evaluated = len(recorded(run))
                if evaluated != len(checkpoint_steps(run)):
                    raise UserError(
                        f"{run} has {len(checkpoint_steps(run))} checkpoints, of which {evaluated} were evaluated."
                    )
    alone, beside = statistics.median(rates[False]), statistics.median(rates[True])
    figures = {
        "step_ms_alone": round(1000 / alone, 3),
        "step_ms_followed": round(1000 / beside, 3),
        "ratio": round(alone / beside, 4),
        "evaluations_a_run": evaluated,
        "cores_training": half,
        "cores_following": len(cores) - half,
    }
    config = {"file": flags.config_file, "steps": flags.steps, "pairs": flags.pairs}
    write_result("follow", figures, config=config)
    print(f"A step takes {figures['ratio']:.4f} times as long with a follower ({evaluated} evaluations).")
    if flags.json:
        cli.print_json(figures)
    return 0


def _rate(run: Path, flags: Any, training: Sequence[int], following: Sequence[int] | None) -> float:
    """The median of a run's logged steps a second."""
    every = max(1, flags.steps // flags.checkpoints)
    train = [
        "experiments.train", f"--config={flags.config_file}", f"--workdir={run}", BATCHES,
        f"--config.train.steps={flags.steps}", "--config.train.eval_every=0", f"--config.checkpoint.every={every}",
        f"--config.checkpoint.keep={flags.checkpoints + 1}", "--config.log.every=10", "--config.log.tensorboard=False",
    ]  # fmt: skip
    started = _start(train, training)
    follower = None
    try:
        if following is not None:
            while not (run / "config.json").is_file() and started.poll() is None:
                try:
                    started.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            follower = _start(["experiments.evaluate", f"--run={run}", "--steps=all", "--follow", BATCHES], following)
        for name, process in (("train", started), ("evaluate", follower)):
            if process is not None and process.wait() != 0:
                raise UserError(f"{name} of {run} ended with exit code {process.returncode}.")
    finally:
        for process in (started, follower):
            if process is not None and process.poll() is None:
                process.terminate()
    return statistics.median(line["perf/steps_per_sec"] for line in read_metrics(run) if "perf/steps_per_sec" in line)


def _start(arguments: Sequence[str], cores: Sequence[int]) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=quiet, stderr=quiet)
    # Before it starts a thread, whose cores are then the same.
    os.sched_setaffinity(process.pid, set(cores))
    return process


if __name__ == "__main__":
    cli.run(main)

"""A job of two tasks on a real Slurm of one node: told to stop by `scancel --signal=TERM`, requeued, finished.

It must stop at a step of its own with a checkpoint, go on from there in the same job, and end with the parameters of a run
that nobody disturbed, bit for bit. Needs root, and Debian's `slurm-wlm` and `munge`. Writes `results/slurm.json`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.reproduce import slurm_cluster
from experiments.reproduce.kills import finished_steps, same_state
from experiments.reproduce.record import write_result
from tfm_jax.errors import UserError
from tfm_jax.files import read_status
from tfm_jax.train.log import read_metrics

EXAMPLES = """\
  python -m experiments.reproduce.slurm"""
CONFIG = [
    "--config=configs/gpt_stdlib.py:smoke", "--config.train.steps=200", "--config.train.eval_every=0",
    "--config.checkpoint.every=10", "--config.model.dropout=0.1", "--config.log.every=1", "--config.log.tensorboard=False",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--workdir", type=Path, default=Path("runs/slurm"))
    flags, _ = cli.parse(made, argv)
    if why := slurm_cluster.missing():
        raise UserError(f"There can be no Slurm here: {why}.")
    shutil.rmtree(flags.workdir, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, slurm_cluster.cluster(Path(folder)) as variables:
        quiet, told = flags.workdir / "undisturbed", flags.workdir / "told_to_stop"
        wait_for_end(quiet, submit(quiet, CONFIG, variables), variables)
        result = tell_to_stop(told, CONFIG, variables, step=10)
    equal, arrays = same_state(quiet, told)
    result |= {"arrays": arrays, "bit_identical": equal}
    write_result("slurm", result, config=" ".join(CONFIG), seed=0)
    print(result)
    if flags.json:
        cli.print_json(result)
    return 0 if equal and result["requeued"] and result["checkpoint_at_stop"] else 1


def submit(run: Path, config: Sequence[str], variables: Mapping[str, str]) -> str:
    """Submit a run as one job of two tasks of two simulated devices; returns the job's number."""
    command = [
        sys.executable,
        "-m",
        "experiments.launch",
        "--backend=slurm",
        "--tasks=2",
        "--",
        *config,
        f"--workdir={run}",
    ]
    env = os.environ | variables | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr)
    return done.stdout.partition(",")[0].removeprefix("Job ")


def tell_to_stop(run: Path, config: Sequence[str], variables: Mapping[str, str], step: int) -> dict[str, Any]:
    """Submit a run, signal it when it has logged a step, and wait until it has been requeued and has finished."""
    job, env = submit(run, config, variables), os.environ | variables
    wait_for(lambda: any(line.get("train/loss") and line["step"] >= step for line in read_metrics(run)), run)
    subprocess.run(["scancel", "--signal=TERM", job], env=env, check=True)
    wait_for(lambda: status(run) in ("preempted", "finished"), run)
    stopped = read_status(run).get("step")
    saved = stopped in finished_steps(run)

    def pending() -> bool:
        shown = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True).stdout
        return "JobState=PENDING" in shown and "Restarts=1" in shown

    wait_for(pending, run)
    # Slurm lets a job that was requeued wait for two minutes; in the same second its node would not take it.
    subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now+5seconds"], env=env, check=True)
    wait_for_end(run, job, variables)
    text = (run / f"slurm-{job}.log").read_text()
    return {
        "stopped_at_step": stopped,
        "checkpoint_at_stop": saved,
        "requeued": f"continued at step {stopped}." in text,
    }


def wait_for_end(run: Path, job: str, variables: Mapping[str, str]) -> None:
    """Until the job has left the queue, with its run finished."""

    def gone() -> bool:
        command = ["squeue", "--noheader", "--format=%i"]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
        return job not in done.stdout.split()

    wait_for(gone, run)
    if status(run) != "finished":
        raise UserError(f"Job {job} has ended before its run:\n{_logs(run)}")


def status(run: Path) -> str | None:
    return read_status(run).get("state")


def wait_for(true: Callable[[], bool], run: Path, seconds: float = 1800) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise UserError(f"{run} does not get on:\n{_logs(run)}")
        time.sleep(0.2)


def _logs(run: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in run.glob("slurm-*.log"))


if __name__ == "__main__":
    cli.run(main)

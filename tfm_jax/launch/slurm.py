"""A batch file for Slurm, written into the run directory and submitted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic
from tfm_jax.launch.job import MISTAKE, PREEMPTED, Job, at_least

NUMBER = "slurm_job"


def launch(
    job: Job,
    *,
    nodes: int = 1,
    tasks: int = 1,
    elastic: int | None = None,
    partition: str | None = None,
    account: str | None = None,
    time: str | None = None,
    notice: int = 120,
    restarts: int = 3,
    host_timeout: float = 30.0,
    sbatch: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Write `RUN/job.sbatch` and submit it; its number is in `RUN/slurm_job`.

    `notice` seconds before the end of its time, when preempted, or after `scancel --signal=TERM`, all tasks save and stop
    at the same step, and the job is put into the queue again. So is it when a node dies. When only a task dies, the
    others stop too, and all start again in the same job. JAX finds the other tasks by Slurm's variables.

    Args:
      nodes: hosts.
      tasks: processes on each; with GPUs, one for each GPU.
      elastic: start with fewer nodes where there are no more, but not with fewer than this.
      partition: as the cluster names it.
      account: as the cluster names it.
      time: limit of one stay in the queue, as Slurm writes it: `24:00:00`.
      notice: seconds before that limit at which to save and stop. Before a run's first step there is nothing to save, and it ends
        as any process that is told to.
      restarts: how often to start again in the same job after a failure.
      host_timeout: seconds after which a host that is silent counts as gone.
      sbatch: more options of sbatch, for instance `--gpus-per-node=8`.
      dry_run: write and print the file; submit nothing.

    Raises:
      UserError: numbers that do not fit each other; Slurm is not here.
    """
    at_least(1, nodes=nodes, tasks=tasks, elastic=elastic, notice=notice)
    at_least(0, restarts=restarts)
    if elastic is not None and elastic > nodes:
        raise UserError(f"--elastic={elastic} is more than --nodes={nodes}.")
    run = job.run.absolute()
    options = {
        "job-name": run.name,
        "nodes": str(nodes) if elastic is None else f"{elastic}-{nodes}",
        "ntasks-per-node": str(tasks),
        "chdir": os.getcwd(),
        "output": f"{run}/slurm-%j.log",
        "open-mode": "append",
        # Without B: it goes to the tasks, which save, and not to this script.
        "signal": f"TERM@{notice}",
    } | {key: value for key, value in (("partition", partition), ("account", account), ("time", time)) if value}
    for option in sbatch:
        if not option.startswith("--"):
            raise UserError(f"--sbatch={option}: an option of sbatch begins with --, for instance --gpus-per-node=8.")
    lines = [f"#SBATCH --{key}={shlex.quote(value)}" for key, value in options.items()]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in sbatch)]
    # The others of a task that died are stopped by their watchdogs, which say why; srun is only the last resort.
    last_resort = int(host_timeout + 60)
    command = f"srun --kill-on-bad-exit=0 --wait={last_resort} {shlex.join(job.command(sys.executable))}"
    text = _SCRIPT.format(
        options="\n".join(lines), timeout=f"{host_timeout:g}", command=command, restarts=restarts, mistake=MISTAKE,
        preempted=PREEMPTED,
    )  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    path = run / "job.sbatch"
    write_atomic(path, text)
    if dry_run:
        print(text, end="")
        print(f"{path} is written; nothing is submitted.", file=sys.stderr)
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            f"There is no sbatch here; Slurm's client programs have it (slurm-client on Debian). {path} is written:"
            " submit it where there is one."
        )
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch did not take {path}: {done.stderr.strip()}")
    number = done.stdout.partition(";")[0].strip()
    write_atomic(run / NUMBER, number)
    print(f"Job {done.stdout.strip()}, log {run}/slurm-{number}.log")
    return 0


_SCRIPT = """\
#!/bin/bash
{options}
export TFM_JAX_HOST_TIMEOUT={timeout}
code=1
for attempt in $(seq 0 {restarts}); do
  {command}
  code=$?
  case $code in
    0 | {mistake}) exit $code ;;
    {preempted}) echo "Told to stop, and saved: back into the queue."; exec scontrol requeue $SLURM_JOB_ID ;;
  esac
  echo "Attempt $attempt ended with exit code $code."
done
exit $code
"""

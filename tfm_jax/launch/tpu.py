"""A Cloud TPU's own launcher: the same command on all hosts of a slice, by ssh."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time

from tfm_jax.errors import UserError
from tfm_jax.launch.job import FAILED, FINISHED, MISTAKE, PREEMPTED, Ended, Job, at_least, supervise


def launch(
    job: Job,
    *,
    name: str,
    zone: str,
    project: str | None = None,
    folder: str = "tfm_jax",
    python: str = ".venv/bin/python",
    restarts: int = 3,
    pause: float = 30.0,
    host_timeout: float = 30.0,
    dry_run: bool = False,
) -> int:
    """Run the job on all hosts of a TPU VM through `gcloud compute tpus tpu-vm ssh`, and again when it fails.

    JAX finds the other hosts by the TPU's own variables. The run directory must be one that all hosts see: a bucket or a
    disk that is mounted on each.

    Args:
      name: of the TPU VM.
      zone: where it is, for instance `us-east5-a`.
      project: of Google Cloud; gcloud's own by default.
      folder: of this repository on each host.
      python: the interpreter there, from that folder.
      restarts: how often to start again after a failure.
      pause: seconds before that; a host under maintenance needs a while.
      host_timeout: seconds after which a host that is silent counts as gone.
      dry_run: print the command and stop.

    Raises:
      UserError: gcloud is not here.
    """
    at_least(0, restarts=restarts)
    remote = f"cd {shlex.quote(folder)} && TFM_JAX_HOST_TIMEOUT={host_timeout:g} {shlex.join(job.command(python))}"
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, f"--zone={zone}"]
    command += [f"--project={project}"] if project else []
    command += ["--worker=all", f"--command={remote}"]
    if dry_run:
        print(shlex.join(command))
        return 0
    if shutil.which("gcloud") is None:
        raise UserError(
            "There is no gcloud here: install the Google Cloud CLI (cloud.google.com/sdk/docs/install), or run what"
            " --dry_run prints where there is one."
        )

    def attempt(last: Ended | None) -> Ended:
        try:
            time.sleep(pause if last is not None else 0)
            code = subprocess.run(command).returncode
        except KeyboardInterrupt:
            return Ended(PREEMPTED, "stopped here; the hosts were told by ssh.", True)
        known = {
            FINISHED: "finished.",
            PREEMPTED: "told to stop, and saved.",
            MISTAKE: "stopped by a mistake; see above.",
        }
        return Ended(code if code in known else FAILED, known.get(code, f"gcloud ended with exit code {code}."), False)

    return supervise(job.run, attempt, restarts)

"""A JobSet for Kubernetes, written to a file and applied."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic
from tfm_jax.launch.job import MISTAKE, Job, at_least

_PORT = 12355


def launch(
    job: Job,
    *,
    image: str,
    volume: str,
    hosts: int = 1,
    slices: int = 1,
    gpus: int = 0,
    tpu: str | None = None,
    topology: str | None = None,
    chips: int = 4,
    name: str | None = None,
    namespace: str = "default",
    notice: int = 120,
    restarts: int = 10,
    host_timeout: float = 30.0,
    output: Path = Path("jobset.yaml"),
    dry_run: bool = False,
) -> int:
    """Write a JobSet (jobset.x-k8s.io/v1alpha2) and hand it to `kubectl apply`.

    One pod a host. When a pod fails all are started again, from the newest checkpoint; a user's mistake ends the JobSet. A
    pod that is told to stop makes all save and stop at the same step.

    Args:
      image: container image with this repository as its working directory, and its Python first on the path.
      volume: `CLAIM:/path` of a persistent volume that all pods see; the run directory is on it.
      hosts: pods, of each slice; with a TPU, those of its topology.
      slices: TPU slices, joined by the data-centre network.
      gpus: of each pod.
      tpu: GKE's name of the accelerator, for instance `tpu-v5p-slice`; JAX then finds the other pods by itself.
      topology: of a TPU slice, for instance `4x4x4`.
      chips: of a TPU host.
      name: of the JobSet; by default that of the run directory.
      namespace: where.
      notice: seconds between the notice to stop and the kill.
      restarts: how often to start again, after notices to stop too.
      host_timeout: seconds after which a host that is silent counts as gone.
      output: where the manifest is written, on this machine.
      dry_run: write and print the manifest; apply nothing.

    Raises:
      UserError: settings that do not fit each other; kubectl is not here.
    """
    at_least(1, hosts=hosts, slices=slices, chips=chips, notice=notice)
    at_least(0, gpus=gpus, restarts=restarts)
    name = name or re.sub(r"[^a-z0-9-]+", "-", job.run.name.lower()).strip("-")
    # A pod's name is NAME-worker-SLICE-HOST-XXXXX, and a name is a label of at most 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name={name}: small letters, digits and dashes, at most 40, beginning with a letter, for instance gpt-7b."
        )
    claim, _, mount = volume.partition(":")
    if not claim or not mount.startswith("/"):
        raise UserError(f"--volume={volume}: write CLAIM:/path, for instance runs:/runs.")
    if not job.run.is_relative_to(mount):
        raise UserError(
            f"--workdir={job.run} is not on the volume; write for instance --workdir={mount}/{job.run.name}."
        )
    if (tpu is None) != (topology is None):
        raise UserError("--tpu and --topology belong together: give both or none.")
    if tpu is not None and gpus:
        raise UserError(f"--tpu={tpu} and --gpus={gpus} exclude each other: a pod has one or the other.")
    if tpu is None and slices > 1:
        raise UserError(f"--slices={slices} is of a TPU: give --tpu and --topology, or more --hosts.")
    if topology is not None:
        _check_topology(topology, hosts, chips)
    manifest = _manifest(job, name, image, (claim, mount), hosts, slices, notice, restarts)
    manifest["metadata"]["namespace"] = namespace
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container, variables = pod["containers"][0], {"TFM_JAX_HOST_TIMEOUT": f"{host_timeout:g}"}
    if tpu is not None:
        # A slice is a node pool, and a job has it for itself.
        manifest["metadata"]["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": tpu,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        container["resources"] = {"limits": {"google.com/tpu": chips}}
    elif hosts > 1:
        variables |= {"JAX_COORDINATOR_ADDRESS": f"{name}-worker-0-0.{name}:{_PORT}", "JAX_NUM_PROCESSES": str(hosts)}
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    container["env"] = [{"name": key, "value": value} for key, value in variables.items()]
    if "JAX_NUM_PROCESSES" in variables:
        index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        container["env"].append({"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": index}})
    text = yaml.safe_dump(manifest, sort_keys=False)
    write_atomic(output, text)
    if dry_run:
        print(text, end="")
        print(f"{output} is written; nothing is applied.", file=sys.stderr)
        return 0
    if shutil.which("kubectl") is None:
        raise UserError(
            f"There is no kubectl here: install it (kubernetes.io/docs/tasks/tools). {output} is written; apply it where"
            " there is one."
        )
    return subprocess.run(["kubectl", "apply", "-f", str(output)]).returncode


def _manifest(
    job: Job, name: str, image: str, volume: tuple[str, str], hosts: int, slices: int, notice: int, restarts: int
) -> dict[str, Any]:
    claim, mount = volume
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": notice,
        "containers": [
            {
                "name": "train",
                "image": image,
                "command": job.command("python"),
                "volumeMounts": [{"name": "runs", "mountPath": mount}],
            }
        ],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
    }
    each = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        # A pod does not start again alone: its peers are in the middle of something.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [MISTAKE]}}],
        },
        "template": {"spec": pod},
    }
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": restarts, "rules": [mistake]},
            "replicatedJobs": [{"name": "worker", "replicas": slices, "template": {"spec": each}}],
        },
    }


def _check_topology(topology: str, hosts: int, chips: int) -> None:
    if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
        raise UserError(f"--topology={topology}: write the chips along each axis, for instance 4x4x4.")
    there = math.prod(map(int, topology.split("x")))
    if there != hosts * chips:
        needed = f"give --hosts={there // chips}" if there % chips == 0 else f"{chips} does not divide it"
        raise UserError(
            f"--topology={topology} has {there} chips, but --hosts={hosts} of --chips={chips} have {hosts * chips}: {needed}."
        )

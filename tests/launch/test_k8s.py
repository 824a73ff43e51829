"""The manifest against the types that Kubeflow publishes, which are made from JobSet's and Kubernetes' own schema."""

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from tfm_jax.launch import k8s
from tfm_jax.launch.job import job


@pytest.fixture
def launch(tmp_path):
    """The manifest of `/runs/GPT_7b` with some settings."""

    def make(**settings):
        output = tmp_path / "jobset.yaml"
        given = dict(image="me/tfm_jax:1", volume="runs:/runs", output=output, dry_run=True)
        assert k8s.launch(job(["--config=c.py", "--workdir=/runs/GPT_7b"]), **(given | settings)) == 0
        return yaml.safe_load(output.read_text())

    return make


def pod(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(hosts=4, gpus=8, namespace="ml", name="big"),
        dict(hosts=16, slices=2, tpu="tpu-v5p-slice", topology="4x4x4"),
    ],
)
def test_the_manifest_passes_the_published_schema(launch, settings, capsys):
    manifest = launch(**settings)
    assert yaml.safe_load(capsys.readouterr().out) == manifest
    # What the types do not know does not come back.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_the_schema_finds_mistakes(launch):
    manifest = launch()
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest
    manifest["spec"]["failurePolicy"] = {"maxRestarts": "often"}
    with pytest.raises(ValueError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(manifest)


def test_pods_find_each_other(launch):
    manifest = launch(hosts=4, gpus=8, host_timeout=20)
    name = manifest["metadata"]["name"]
    assert name == "gpt-7b" and manifest["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": name}
    container = pod(manifest)["containers"][0]
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert container["env"] == [
        {"name": "TFM_JAX_HOST_TIMEOUT", "value": "20"},
        {"name": "JAX_COORDINATOR_ADDRESS", "value": "gpt-7b-worker-0-0.gpt-7b:12355"},
        {"name": "JAX_NUM_PROCESSES", "value": "4"},
        {"name": "JAX_PROCESS_ID", "valueFrom": index},
    ]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["command"] == ["python", "-m", "experiments.train", "--config=c.py", "--workdir=/runs/GPT_7b"]
    each = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (each["completionMode"], each["completions"], each["parallelism"], each["backoffLimit"]) == (
        "Indexed",
        4,
        4,
        0,
    )


def test_tpus_are_found_by_jax(launch):
    manifest = launch(hosts=16, slices=2, tpu="tpu-v5p-slice", topology="4x4x4", restarts=7)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert [variable["name"] for variable in pod(manifest)["containers"][0]["env"]] == ["TFM_JAX_HOST_TIMEOUT"]
    assert pod(manifest)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(volume="runs"), "--volume=runs: write CLAIM:/path, for instance runs:/runs."),
        (
            dict(volume="runs:/data"),
            "--workdir=/runs/GPT_7b is not on the volume; write for instance --workdir=/data/GPT_7b.",
        ),
        (dict(tpu="tpu-v5p-slice"), "--tpu and --topology belong together: give both or none."),
        (dict(slices=2), "--slices=2 is of a TPU: give --tpu and --topology, or more --hosts."),
        (
            dict(tpu="t", topology="4x4", gpus=1, hosts=4),
            "--tpu=t and --gpus=1 exclude each other: a pod has one or the other.",
        ),
        (
            dict(tpu="t", topology="4x4x4", hosts=8),
            "--topology=4x4x4 has 64 chips, but --hosts=8 of --chips=4 have 32: give --hosts=16.",
        ),
        (
            dict(tpu="t", topology="2x3", hosts=2),
            "--topology=2x3 has 6 chips, but --hosts=2 of --chips=4 have 8: 4 does not divide it.",
        ),
        (dict(tpu="t", topology="many"), "--topology=many: write the chips along each axis, for instance 4x4x4."),
        (
            dict(name="7b"),
            "--name=7b: small letters, digits and dashes, at most 40, beginning with a letter, for instance gpt-7b.",
        ),
    ],
)
def test_settings_that_do_not_fit(launch, says, settings, text):
    with says(text):
        launch(**settings)


def test_applying(launch, fake, says, tmp_path):
    with says(
        "There is no kubectl here: install it (kubernetes.io/docs/tasks/tools)."
        f" {tmp_path}/jobset.yaml is written; apply it where there is one."
    ):
        launch(dry_run=False)
    fake("kubectl", f'[ "$*" = "apply -f {tmp_path}/jobset.yaml" ]')
    launch(dry_run=False)

"""The batch file by itself, with programs that stand for Slurm's, and on a real cluster of one node."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from experiments.reproduce import slurm_cluster
from experiments.reproduce.slurm import tell_to_stop
from tfm_jax.launch import slurm
from tfm_jax.train.log import read_metrics
from tfm_jax.train.run import train


def test_the_batch_file(a_job, capsys, tmp_path):
    settings = dict(nodes=4, tasks=8, elastic=2, partition="gpu", account="us", time="24:00:00", notice=300)
    assert slurm.launch(a_job, **settings, sbatch=["--gpus-per-node=8"], dry_run=True) == 0
    text = (a_job.run / "job.sbatch").read_text()
    assert capsys.readouterr().out == text
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for option in (
        "job-name=run", "nodes=2-4", "ntasks-per-node=8", f"output={a_job.run}/slurm-%j.log", "open-mode=append",
        "signal=TERM@300", "partition=gpu", "account=us", "time=24:00:00", "requeue", "gpus-per-node=8",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert subprocess.run(["bash", "-n", a_job.run / "job.sbatch"]).returncode == 0


@pytest.mark.parametrize(
    ("codes", "tries", "code", "requeued"),
    [
        ("0", 1, 0, False),
        ("2 0", 1, 2, False),
        ("137 1 0", 3, 0, False),
        ("137 137 137", 3, 137, False),
        ("137 75", 2, 0, True),  # scontrol's own exit code
    ],
)
def test_what_the_batch_file_does_when_tasks_end(a_job, fake, tmp_path, codes, tries, code, requeued):
    count = tmp_path / "count"
    fake(
        "srun",
        f'set -- {codes}; echo x >> {count}; n=0; while read -r _; do n=$((n + 1)); done < {count}; exit "${{!n}}"',
    )
    fake("scontrol", f'[ "$1 $2" = "requeue 17" ] && echo yes > {tmp_path}/requeued')
    slurm.launch(a_job, restarts=2, dry_run=True)
    done = subprocess.run(["bash", a_job.run / "job.sbatch"], env={"PATH": str(tmp_path / "bin"), "SLURM_JOB_ID": "17"})
    assert (done.returncode, len(count.read_text().split())) == (code, tries)
    assert (tmp_path / "requeued").exists() == requeued


def test_submitting(a_job, fake, says, capsys):
    path = a_job.run / "job.sbatch"
    with says(
        f"There is no sbatch here; Slurm's client programs have it (slurm-client on Debian). {path} is written:"
        " submit it where there is one."
    ):
        slurm.launch(a_job)
    fake("sbatch", f'[ "$1 $2" = "--parsable {path}" ] && echo "41;cluster"')
    assert slurm.launch(a_job) == 0
    assert capsys.readouterr().out == f"Job 41;cluster, log {a_job.run}/slurm-41.log\n"
    fake("sbatch", 'echo "invalid partition" >&2; exit 1')
    with says(f"sbatch did not take {path}: invalid partition"):
        slurm.launch(a_job)


def test_numbers_that_cannot_be(a_job, says):
    with says("--elastic=3 is more than --nodes=2."):
        slurm.launch(a_job, nodes=2, elastic=3)
    with says("--tasks=0: must be at least 1."):
        slurm.launch(a_job, tasks=0)
    with says("--sbatch=gpus=8: an option of sbatch begins with --, for instance --gpus-per-node=8."):
        slurm.launch(a_job, sbatch=["gpus=8"])


@pytest.mark.journey
@pytest.mark.timeout(900)  # four process starts, which a busy machine stretches
@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"there can be no Slurm: {slurm_cluster.missing()}")
def test_a_real_job_is_told_to_stop_requeued_and_ends_as_if_nothing_had_happened(
    config_file, make_config, command_env, tmp_path, monkeypatch
):
    env = command_env(path=tmp_path)
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=1 ", "")
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    changes = {
        "train.steps": 100,
        "train.eval_every": 0,
    }  # with its saves long enough: JAX hears of a signal once a second
    config = [f"--config={config_file}", *(f"--config.{key}={value}" for key, value in changes.items())]
    run, quiet = tmp_path / "run", tmp_path / "quiet"
    # Slurm's sockets have names of at most 108 characters.
    with tempfile.TemporaryDirectory() as short, slurm_cluster.cluster(Path(short)) as variables:
        told = tell_to_stop(run, config, variables, step=5)
    assert told["checkpoint_at_stop"] and told["requeued"] and 5 <= told["stopped_at_step"] < 100
    train(make_config(changes | {"checkpoint.every": 0}), quiet)
    losses, wanted = (
        [(r["step"], r["train/loss"]) for r in read_metrics(r) if "train/loss" in r] for r in (run, quiet)
    )
    assert [step for step, _ in losses] == [step for step, _ in wanted] == list(range(1, 101))
    np.testing.assert_allclose([x for _, x in losses], [x for _, x in wanted], rtol=1e-5)

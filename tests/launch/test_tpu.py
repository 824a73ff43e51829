import shlex

from tfm_jax.launch import tpu


def test_the_command_for_all_hosts(a_job, fake, capsys, tmp_path):
    assert tpu.launch(a_job, name="pod", zone="us-east5-a", project="mine", host_timeout=20, dry_run=True) == 0
    printed = shlex.split(capsys.readouterr().out)
    assert printed == [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-east5-a", "--project=mine", "--worker=all",
        "--command=cd tfm_jax && TFM_JAX_HOST_TIMEOUT=20 .venv/bin/python -m experiments.train"
        f" --config=configs/gpt_stdlib.py --workdir={a_job.run}",
    ]  # fmt: skip
    fake("gcloud", f'echo "$#" >> {tmp_path}/calls; printf "%s\\n" "$@" > {tmp_path}/given')
    assert tpu.launch(a_job, name="pod", zone="us-east5-a", project="mine", host_timeout=20) == 0
    assert (tmp_path / "given").read_text().splitlines() == printed[1:]


def test_it_is_started_again(a_job, fake, capsys, tmp_path):
    fake("gcloud", f"echo x >> {tmp_path}/calls; [ -s {tmp_path}/once ] || {{ echo x > {tmp_path}/once; exit 255; }}")
    assert tpu.launch(a_job, name="pod", zone="z", pause=0) == 0
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    assert capsys.readouterr().err == (
        "launch: gcloud ended with exit code 255.\nlaunch: starting again from the beginning; 2 restarts are left.\n"
    )


def test_without_gcloud(a_job, fake, says):
    with says(
        "There is no gcloud here: install the Google Cloud CLI (cloud.google.com/sdk/docs/install), or run what --dry_run"
        " prints where there is one."
    ):
        tpu.launch(a_job, name="pod", zone="z")

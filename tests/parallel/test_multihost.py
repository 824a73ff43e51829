"""Several real processes on this machine: they train the same run, and stop together when they disagree."""

import json
import os
import re
import shutil
import socket
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from tfm_jax.errors import UserError
from tfm_jax.parallel import multihost
from tfm_jax.train import rundir
from tfm_jax.train.log import read_metrics

TIMEOUT = 150


@pytest.fixture
def start_together(start_command, command_env, config_file):
    """Start one run in several processes of one device each."""

    def start(run, count, each=None, config_file=config_file):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for index in range(count):
            env = command_env(
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(index)
            )
            more = (each or {}).get(index, ())
            children.append(start_command("train", f"--config={config_file}", f"--workdir={run}", *more, env=env))
        return children

    return start


def finish(children):
    """Standard error of each, after they have ended."""
    return [child.communicate(timeout=TIMEOUT)[1] for child in children]


def losses(run):
    return [(r["step"], r["train/loss"]) for r in read_metrics(run) if "train/loss" in r]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, make_config):
    """The same run in one process, on one device of the mesh's 8 in effect: the mesh does not matter."""
    from tfm_jax.train.run import train

    run = tmp_path_factory.mktemp("alone") / "run"
    train(make_config(), run)
    return run


@pytest.mark.journey
def test_processes_write_the_same_texts(start_together, tmp_path):
    """Beam search of the evaluation, whose rows the model splits over the processes."""
    pytest.importorskip("sacrebleu")
    from tfm_jax import config as configs
    from tfm_jax.train.run import train

    for name in ("train", "valid"):
        rows = [{"source": f"{i} is {i * i}", "target": f"{i * i} of {i}"} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = {
        "width": 16,
        "heads": 2,
        "mlp_width": 24,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "max_len": 32,
        "init_std": 0.5,
    }
    config = {
        "model": {"name": "encdec", **size},
        "data": {
            "name": "pairs",
            "source": f"jsonl:{tmp_path}/*.jsonl",
            "tokenizer": "bytes",
            "seq_len": 16,
            "batch_size": 8,
        },
        "train": {"steps": 80, "eval_every": 0},
        "optim": {"lr": 1e-2, "warmup_steps": 5},
        "evals": {"made": {"name": "generation", "metrics": ("chrf",), "beams": 2, "max_new": 8}},
        "log": {"tensorboard": False},
    }
    file, run = tmp_path / "pairs.py", tmp_path / "run"
    file.write_text(f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({config!r})\n")
    children = start_together(run, 2, config_file=file)
    errors = finish(children)
    assert [child.returncode for child in children] == [0, 0], errors
    result = json.loads((run / "result.json").read_text())
    # Of as many devices, so that sums are in one order.
    alone = train(configs.resolve(config), tmp_path / "one", devices=jax.devices()[:2]).result
    assert result["eval/made/sentences"] == 40 and alone["eval/made/chrf"] > 1
    assert result["eval/made/chrf"] == pytest.approx(alone["eval/made/chrf"], rel=1e-6)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.journey)])
def test_processes_train_the_same_run(start_together, start_command, config_file, alone, tmp_path, count):
    run = tmp_path / "run"
    children = start_together(run, count)
    errors = finish(children)
    assert [child.returncode for child in children] == [0] * count, errors
    got, want = losses(run), losses(alone)
    assert [s for s, _ in got] == [s for s, _ in want] == list(range(1, 9))
    np.testing.assert_allclose([x for _, x in got], [x for _, x in want], rtol=1e-5)
    ours, theirs = (json.loads((r / "result.json").read_text()) for r in (run, alone))
    assert ours["eval/validation/loss"] == pytest.approx(theirs["eval/validation/loss"], rel=1e-5)
    if count == 2:
        # One process takes the last checkpoint away and goes on from the one before, which both wrote.
        shutil.rmtree(run / "checkpoints" / "8")
        child = start_command("train", f"--config={config_file}", f"--workdir={run}")
        _, error = child.communicate(timeout=TIMEOUT)
        assert child.returncode == 0 and "continued at step 4." in error, error
        np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in want], rtol=1e-5)
        assert [s for s, _ in losses(run)] == list(range(1, 9))


def test_processes_with_different_configs_all_stop(start_together, tmp_path):
    children = start_together(tmp_path / "run", 2, {1: ["--config.optim.lr=0.5"]})
    for child, error in zip(children, finish(children), strict=True):
        assert child.returncode == 2, error
        assert re.search(
            r"error: Process 1 \(\S+ pid \d+\) has optim\.lr 0\.5, but process 0 \(\S+ pid \d+\) has 0\.01\."
            r" All processes must run the same code, config and data\.",
            error,
        ), error
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_stops_one_process_stops_all(start_together, tmp_path):
    """Here the run directory, which only process 0 claims."""
    run = tmp_path / "run"
    with rundir.claim(run):
        children = start_together(run, 2)
        errors = finish(children)
    assert [child.returncode for child in children] == [2, 2], errors
    said = f"Another process (pid {os.getpid()}) is training in {run}. Wait for it, stop it, or use another --workdir."
    for error in errors:
        assert re.search(r"error: Process 0 \(\S+ pid \d+\) cannot start: " + re.escape(said), error), error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["JAX_PROCESS_ID"],
            "JAX_PROCESS_ID is set, but JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not: set all three or none.",
        ),
        (
            ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"],
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is set, but JAX_PROCESS_ID is not: set all three or none.",
        ),
    ],
)
def test_only_some_of_the_variables(monkeypatch, given, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        multihost.initialise()


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(multihost, "_gather_text", lambda _: pytest.fail("a collective"))
    multihost.agree({"config": "x"})
    assert multihost.is_main()


@pytest.mark.parametrize(("gke", "gce", "hosts"), [(None, None, 1), (4, None, 4), (None, 16, 16), (8, 16, 8)])
def test_hosts_of_a_tpu_pod(monkeypatch, gke, gce, hosts):
    """As JAX's own detection says; nobody is asked where there is no TPU."""
    for name, count in (("GkeTpuCluster", gke), ("GceTpuCluster", gce)):
        found = SimpleNamespace(is_env_present=lambda c=count: c is not None, get_process_count=lambda c=count: c)
        monkeypatch.setattr(cloud_tpu_cluster, name, found)
    assert multihost._tpu_hosts() == hosts

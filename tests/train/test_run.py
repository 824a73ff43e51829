"""The loop as a whole: what a run leaves behind, how it goes on, and when it refuses."""

import json
import logging
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from experiments import evaluate
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.train import plots
from tfm_jax.train.log import read_metrics
from tfm_jax.train.restore import load_params
from tfm_jax.train.run import train

LOOP_TAGS = {
    "train/loss", "train/accuracy", "train/grad_norm", "train/skipped_steps", "optim/lr", "perf/steps_per_sec",
    "perf/tokens_per_sec", "perf/tokens_per_sec_per_device", "perf/mfu", "perf/data_wait_frac", "perf/compile_s",
}  # fmt: skip


def read(run, name):
    return json.loads((run / name).read_text())


def parameters(run, step=None):
    return {path: np.asarray(x) for path, x in flatten(load_params(run, step)[0]).items()}


def assert_same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_config):
    """A whole run on 8 devices, with events and a trace of steps 2 and 3."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    changes = {"log.tensorboard": True, "train.eval_every": 4, "checkpoint.every": 4}
    outcome = train(make_config(changes), run, profile=(2, 2))
    return run, outcome


def test_what_a_run_leaves_behind(finished):
    run, outcome = finished
    assert outcome.status == "finished"
    assert read(run, "config.json")["model"]["vocab_size"] == 257
    assert read(run, "status.json")["state"] == "finished" and read(run, "status.json")["step"] == 8
    result = read(run, "result.json")
    assert result == outcome.result
    assert result["step"] == 8 and result["train_seconds"] > 0
    loss, bits = result["eval/validation/loss"], result["eval/validation/bits_per_byte"]
    assert 0 < loss < np.log(257)
    text_bytes = 17 * 30  # about: the validation file
    assert bits == pytest.approx(loss / np.log(2) * result["eval/validation/tokens"] / (result["eval/validation/tokens"] - 1),
                                 rel=1e-3) and result["eval/validation/tokens"] > text_bytes  # fmt: skip
    assert {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()} == {"4", "8"}
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "tokenizer").is_dir() and list(run.glob("events.out.tfevents*"))
    assert [p for p in (run / "profile").rglob("*") if p.is_file()]
    assert not [p for p in run.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_metrics(finished):
    records = read_metrics(finished[0])
    lines = {r["step"]: r for r in records if "train/loss" in r}
    assert list(lines) == list(range(1, 9))
    assert all(set(r) == LOOP_TAGS | {"step"} for r in lines.values())
    evaluated = {r["step"]: r for r in records if "eval/validation/loss" in r}
    assert list(evaluated) == [4, 8]
    assert set(evaluated[4]) == {"step"} | {
        f"eval/validation/{name}" for name in ("loss", "accuracy", "perplexity", "tokens", "bits_per_byte")
    }
    assert [r["step"] for r in records if "ckpt/blocking_s" in r] == [4, 8]
    # The learning rate is the one that the step used: a warm-up of 2 to 0.01, then down a cosine to a tenth.
    cosine = [0.01 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * i / 6))) for i in range(6)]
    np.testing.assert_allclose([r["optim/lr"] for r in lines.values()], [0.005, 0.01, *cosine], rtol=1e-5)
    assert (
        lines[1]["train/loss"] == pytest.approx(np.log(257), abs=0.1)
        and lines[8]["train/loss"] < lines[1]["train/loss"]
    )


def test_a_finished_run_started_again_stays_as_it_is(finished, make_config):
    run, outcome = finished
    before = {name: (run / name).read_text() for name in ("metrics.jsonl", "result.json")}
    again = train(make_config({"log.tensorboard": False, "train.eval_every": 4}), run)
    assert again.status == "finished" and again.result == outcome.result
    assert {name: (run / name).read_text() for name in before} == before


def test_another_config_is_refused_and_the_run_left_alone(finished, make_config):
    run, _ = finished
    before = (run / "status.json").read_text()
    with pytest.raises(UserError, match=re.escape("optim.lr: 0.01 -> 0.5")):
        train(make_config({"optim.lr": 0.5}), run)
    assert (run / "status.json").read_text() == before


@pytest.mark.parametrize("devices", [1, 8])
def test_evaluate_gives_the_logged_loss(finished, start_command, command_env, capsys, devices):
    run, _ = finished
    logged = read(run, "result.json")["eval/validation/loss"]
    if devices == 8:
        assert evaluate.main(["--run", str(run), "--json", "--again"]) == 0
        out = capsys.readouterr().out
    else:
        out, errors = start_command("evaluate", "--run", run, "--json", "--again", env=command_env(1)).communicate(
            timeout=120
        )
        assert "Error" not in errors
    found = json.loads(out.splitlines()[-1])
    assert found["step"] == 8 and found["eval/validation/loss"] == pytest.approx(logged, rel=1e-6)
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["results"].items() <= found.items()


def test_going_on_is_the_same_as_never_stopping(finished, make_config, tmp_path, monkeypatch):
    """A crash at step 6 of 8: parameters bit for bit, and each line of the log once."""
    from tfm_jax.train import run as run_module

    def crash(self, step):
        if step == 6:
            self.checkpoints.wait()
            raise KeyboardInterrupt("the plug was pulled")
        return False

    with monkeypatch.context() as patch:
        patch.setattr(run_module._Loop, "_told_to_stop", crash)
        with pytest.raises(KeyboardInterrupt):
            train(make_config({"train.eval_every": 4}), tmp_path / "run")
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["reason"]) == ("failed", "KeyboardInterrupt: the plug was pulled")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as out:
        out.write('{"step": 7, "train/lo')
    outcome = train(make_config({"train.eval_every": 4}), tmp_path / "run")
    assert outcome.status == "finished"
    assert_same_parameters(tmp_path / "run", finished[0])
    records, whole = read_metrics(tmp_path / "run"), read_metrics(finished[0])
    assert [(r["step"], r.get("train/loss"), r.get("eval/validation/loss")) for r in records] == [
        (r["step"], r.get("train/loss"), r.get("eval/validation/loss")) for r in whole
    ]


def wait_for_step(run, step, child, seconds=120):
    """Until the log of a run in another process has a step."""
    until = time.monotonic() + seconds
    while not any(r["step"] >= step and "train/loss" in r for r in read_metrics(run)):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.02)


LONG = ["--config.train.steps=250", "--config.checkpoint.every=20", "--config.log.every=5", "--config.data.seq_len=16"]


def test_sigterm_and_sigkill(config_file, start_command, command_env, tmp_path):
    """One run is preempted, killed and finished; its parameters are those of an undisturbed one, bit for bit."""
    disturbed, whole = tmp_path / "disturbed", tmp_path / "whole"
    command = ["train", f"--config={config_file}", *LONG]
    first = start_command(*command, f"--workdir={disturbed}")
    wait_for_step(disturbed, 5, first)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
    status = read(disturbed, "status.json")
    stopped = status["step"]
    assert status["state"] == "preempted" and status["reason"] == f"stopped by SIGTERM after step {stopped}"
    assert 5 <= stopped < 250 and (disturbed / "checkpoints" / str(stopped)).is_dir()
    killed = start_command(*command, f"--workdir={disturbed}")
    wait_for_step(disturbed, min(stopped + 25, 245), killed)
    killed.kill()
    killed.communicate()
    last = start_command(*command, f"--workdir={disturbed}")
    undisturbed = start_command(*command, f"--workdir={whole}")
    for child in (last, undisturbed):
        _, errors = child.communicate(timeout=200)
        assert child.returncode == 0, errors
    assert_same_parameters(disturbed, whole)

    def losses(run):
        return [(r["step"], r["train/loss"]) for r in read_metrics(run) if "train/loss" in r]

    steps = [step for step, _ in losses(disturbed)]
    assert steps == list(range(5, 251, 5))
    assert losses(disturbed)[-1] == losses(whole)[-1]


def test_a_run_that_is_not_finite_stops_with_the_reason(make_config, tmp_path):
    config = make_config({"optim.lr": 1e38, "train.max_bad_steps": 3, "optim.clip_norm": "None", "train.steps": 20})
    with pytest.raises(UserError) as found:
        train(config, tmp_path / "run")
    message = str(found.value)
    assert re.fullmatch(
        r"3 updates in a row, up to step \d+, had a loss or gradient that was not finite\. None of them changed the"
        r" parameters\. Lower optim\.lr, warm up for longer, or clip harder \(optim\.clip_norm\); train\.max_bad_steps sets"
        r" how many are allowed\.",
        message,
    )
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["reason"]) == ("failed", f"UserError: {message}")


def test_changed_data_is_refused(make_config, corpus, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in corpus.glob("*.txt"):
        (data / path.name).write_text(path.read_text())
    changes = {"data.source": f"text:{data}/*.txt", "train.steps": 3, "checkpoint.every": 2}
    train(make_config(changes), tmp_path / "run")
    fingerprint = read_meta(tmp_path / "run", 3)["data"]
    with open(data / "train_a.txt", "a") as out:
        out.write("One more line.\n")
    with pytest.raises(UserError) as found:
        train(make_config(changes), tmp_path / "run")
    assert re.fullmatch(
        rf"The data has changed since this run's checkpoint was written \(fingerprint {fingerprint} then, [0-9a-f]+ now\),"
        r" so going on would not be the same run\. Restore the data, or start another run with checkpoint\.init_from\.",
        str(found.value),
    )


def read_meta(run, step):
    (path,) = (run / "checkpoints" / str(step) / "meta").glob("metadata")
    return json.loads(path.read_text())


def test_the_metadata_of_a_checkpoint(finished):
    meta = read_meta(finished[0], 8)
    assert (
        meta["skipped_steps"] == 0
        and meta["examples"] == 64
        and meta["layer_loop"] == "loop"
        and meta["versions"]["jax"] == jax.__version__
    )
    assert set(meta) == {
        "config",
        "revision",
        "data",
        "told",
        "examples",
        "train_seconds",
        "skipped_steps",
        "layer_loop",
        "versions",
    }


def test_starting_from_another_run(finished, make_config, tmp_path, caplog):
    """`init_from` starts from its parameters at step 0, `resume` from its state at step 8."""
    donor, _ = finished
    scanned = {"checkpoint.init_from": str(donor), "model.layer_loop": "scan", "train.steps": 1, "optim.lr": 1e-30}
    with caplog.at_level(logging.WARNING):
        train(make_config(scanned | {"optim.warmup_steps": 0}), tmp_path / "tuned")
    assert any("parameters taken" in r.getMessage() for r in caplog.records)
    found, want = parameters(tmp_path / "tuned"), parameters(donor)
    np.testing.assert_array_equal(found["stack/blocks/mlp/up/kernel"][0], want["stack/block_0/mlp/up/kernel"])
    np.testing.assert_array_equal(found["token_embedding/embedding"], want["token_embedding/embedding"])
    resumed = {"checkpoint.resume": str(donor / "checkpoints" / "4"), "train.eval_every": 4}
    train(make_config(resumed), tmp_path / "resumed")
    assert_same_parameters(tmp_path / "resumed", donor)
    assert [r["step"] for r in read_metrics(tmp_path / "resumed") if "train/loss" in r] == [5, 6, 7, 8]
    assert not [message for message in caplog.messages if "config differs" in message]
    with caplog.at_level(logging.WARNING):
        train(make_config(resumed | {"train.steps": 9}), tmp_path / "longer")
    assert [message for message in caplog.messages if "config differs" in message] == [
        f"resume {donor}/checkpoints/4: its config differs (its own -> here):\n  train.steps: 8 -> 9"
    ]


def test_resuming_from_a_damaged_checkpoint(finished, make_config, tmp_path):
    shutil.copytree(finished[0], donor := tmp_path / "donor")
    next(path for path in (donor / "checkpoints" / "8" / "state").rglob("*") if path.is_file()).write_bytes(b"")
    with pytest.raises(UserError, match=rf"^Checkpoint 8 of {donor} is damaged: .* Valid: 4\.$"):
        train(make_config({"checkpoint.resume": str(donor)}), tmp_path / "run")


def test_the_picture_of_a_cut_off_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0, "optim/lr": 0.1}\n{"step": 2, "tr')
    assert plots.loss_picture(tmp_path, {"gzip": 1.5}).stat().st_size > 5000


def test_speed_is_of_all_the_time_there_was(make_config, tmp_path):
    """Units over units a second, line by line, add up to the seconds of training: no second is in two lines or none."""
    outcome = train(make_config({"train.steps": 40, "checkpoint.every": 0, "data.batch_size": 64}), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "perf/steps_per_sec" in line]
    assert len(lines) == 40
    seconds = sum(1 / line["perf/steps_per_sec"] for line in lines)
    assert seconds == pytest.approx(outcome.result["train_seconds"], rel=0.1)
    assert max(line["perf/data_wait_frac"] for line in lines) <= 1


def test_speed_of_a_device_is_that_of_the_mesh(make_config, tmp_path):
    """As where trials share the devices of a process."""
    config = make_config({"train.steps": 2, "optim.warmup_steps": 0})
    found = train(config, tmp_path / "run", devices=jax.devices()[:2]).result
    assert found["perf/tokens_per_sec"] == pytest.approx(2 * found["perf/tokens_per_sec_per_device"])


def test_a_start_that_failed_can_be_corrected(make_config, tmp_path):
    run = tmp_path / "run"
    # A donor that was stopped before its first checkpoint is only found out when its parameters are read.
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "config.json").write_text('{"model": {}}')
    (tmp_path / "donor").mkdir()
    (tmp_path / "donor" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^There is no run .*/doner\. Did you mean '.*/donor'\?$"):
        train(make_config({"checkpoint.resume": str(tmp_path / "doner")}), run)
    with pytest.raises(UserError, match="has no checkpoints"):
        train(make_config({"checkpoint.init_from": str(tmp_path / "nothing"), "data.tokenizer": "chars"}), run)
    assert read(run, "status.json")["state"] == "failed"
    assert train(make_config({"train.steps": 2, "optim.warmup_steps": 0}), run).status == "finished"
    assert read(run, "config.json")["data"]["tokenizer"] == "bytes"
    assert read(run, "config.json")["model"]["vocab_size"] == 257


def test_a_donor_that_computes_something_else_is_named(finished, make_config, tmp_path, caplog):
    changes = {
        "checkpoint.init_from": str(finished[0]),
        "model.activation": "relu",
        "model.dropout": 0.1,
        "train.steps": 1,
    }
    with caplog.at_level(logging.WARNING):
        train(make_config({**changes, "optim.warmup_steps": 0}), tmp_path / "run")
    said = [m for m in caplog.messages if "made for something else" in m]
    assert said == [
        "init_from: the donor was made for something else:\n  model.activation: 'gelu_tanh' there, 'relu' here"
    ]

"""What becomes of failed trials, and of files that are damaged."""

import pytest

from tests.sweep.test_runner import LISTED, starter, states
from tfm_jax.files import write_status
from tfm_jax.sweep import runner, trials
from tfm_jax.train import rundir


def test_what_is_to_be_tried_again_waits_with_its_reason(tmp_path):
    """Whoever takes it up, and however late: the launcher that was told to may die before it does."""
    runner.Listed(LISTED, tmp_path)
    write_status(tmp_path / "lr=0.1", "failed", "by chance")
    runner.Listed(LISTED, tmp_path, retry=True)
    assert trials.state(tmp_path / "lr=0.1") == ("waiting", "it has failed before: by chance", 0)
    runner.run(runner.Listed(LISTED, tmp_path), tmp_path, starter(), wait=0.01, say=lambda line: None)
    assert set(states(tmp_path).values()) == {"finished"}


@pytest.mark.parametrize("metrics", [None, '{"step": 1}\n', "[1]\n{}\n"])
def test_metrics_that_were_damaged_and_are_gone_or_mended(tmp_path, metrics):
    """What can be read stays where it is."""
    run = tmp_path / "a"
    run.mkdir()
    (run / "failed").write_text("metrics.jsonl is damaged: ValueError: so it was")
    if metrics:
        (run / "metrics.jsonl").write_text(metrics)
    trials.forget_failure(tmp_path, "a")
    assert trials.state(run).word == "waiting" and not (run / "damaged_metrics.jsonl").exists()
    assert (run / "metrics.jsonl").is_file() == bool(metrics)


def test_damaged_metrics_are_put_aside(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    trials.forget_failure(tmp_path, "a")
    assert trials.state(run).word == "waiting" and (run / "damaged_metrics.jsonl").read_bytes() == b"\xff\n"


@pytest.mark.parametrize("verdict", ["failed", "pruned"])
def test_damaged_verdicts(tmp_path, verdict):
    (tmp_path / verdict).write_bytes(b"\xff\xfe no text")
    assert trials.state(tmp_path) == (verdict, "\ufffd\ufffd no text", 0)


def test_a_run_without_a_process(tmp_path):
    """One that is killed leaves `running` behind; one that somebody works on is left alone, with or without a launcher."""
    trials.open_folder(tmp_path, {})
    trials.list_trials(tmp_path, LISTED)
    for trial in LISTED[:4]:
        write_status(tmp_path / trial.name, "finished" if trial is LISTED[3] else "running")
    with trials.held(tmp_path, LISTED[1].name), rundir.claim(tmp_path / LISTED[2].name):
        trials.tell_stopped(tmp_path)
    assert list(states(tmp_path).values()) == ["preempted", "running", "running", "finished", "waiting"]

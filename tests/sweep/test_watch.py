"""The live table, on a terminal of its own."""

import io
import json
import os

from rich.console import Console

from experiments import report
from tests.errors import says
from tests.sweep.runs import write_sweep
from tfm_jax.files import write_status
from tfm_jax.sweep import results, trials, watch
from tfm_jax.sweep.space import Trial


def drawn(folder, now, **settings):
    out = io.StringIO()
    Console(file=out, width=200).print(watch.table(results.read_all([folder]), None, None, now, **settings))
    return [line.strip(" \n│┃┏┓") for line in out.getvalue().splitlines()]


def test_table(tmp_path):
    folder = write_sweep(tmp_path / "rates", rates=3, seeds=1)
    lines = drawn(folder, now=0.0)
    assert lines[0] == "3 finished"
    assert [part.strip() for part in lines[2].split("┃")][:5] == ["run", "lr", "state", "step", "eval/validation/loss"]
    # The best first.
    assert [line.split()[0] for line in lines[4:7]] == [f"lr={rate},seed=0" for rate in (0.004, 0.002, 0.001)]
    # One is still at it, has lost a line to a crash, and is silent; another one has failed.
    slow = folder / "lr=0.001,seed=0"
    write_status(slow, "running")
    with (slow / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 50, "eval/validation/loss": 1.0}) + '\n{"step": 60, "eval')
    os.utime(slow / "metrics.jsonl", (1000, 1000))
    write_status(folder / "lr=0.002,seed=0", "failed", "out of memory")
    lines = drawn(folder, now=1000.0 + 300)
    assert lines[0] == "1 failed, 1 finished, 1 running"
    (first, *_, last) = lines[4:7]
    assert first.startswith("lr=0.001,seed=0") and "50" in first and "1.0000" in first and "5 min ago" in first
    assert last.startswith("lr=0.002,seed=0") and "failed" in last and "ago" not in last


def test_trials_that_wait(tmp_path):
    """They have the settings of their overrides and what the others share; right after a sweep's start they are all."""
    folder = tmp_path / "rates"
    trials.open_folder(folder, {"metric": None})
    with says(f"{folder} is a sweep that has no trial yet."):
        results.find([folder])
    trials.list_trials(folder, [Trial("a", {"optim.lr": 0.008}), Trial("b", {"optim.lr": 0.016})])
    assert results.differing(results.read_all([folder])) == ["optim.lr"]
    lines = drawn(folder, now=0.0)
    assert lines[0] == "2 waiting" and [line.split("│")[1].strip() for line in lines[4:6]] == ["0.008", "0.016"]
    write_sweep(folder, rates=2, seeds=1)
    runs = results.read_all([folder])
    assert results.differing(runs) == ["optim.lr"]
    assert {run.name: run.state for run in runs}["a"] == "waiting"
    assert {run.config["train.steps"] for run in runs} == {40}
    assert "2 finished, 2 waiting" in drawn(folder, now=0.0)


def test_a_study_is_ordered_by_its_own_metric(tmp_path):
    folder = write_sweep(tmp_path / "study", rates=3, seeds=1)
    trials.open_folder(folder, {"metric": "eval/validation/loss", "direction": "maximize"})
    assert [line.split()[0] for line in drawn(folder, now=0.0)[4:7]] == [
        f"lr={rate},seed=0" for rate in (0.001, 0.002, 0.004)
    ]


def test_without_a_terminal_it_is_printed_once(tmp_path, capsys):
    folder = write_sweep(tmp_path / "rates", rates=2, seeds=1)
    assert report.main([str(folder), "--watch"]) == 0
    assert "2 finished" in capsys.readouterr().out
    for more in ("--to=x", "--run=x", "--heads=0.0"):
        with says("--watch writes no page: it goes with --metric, --goal and --every alone."):
            report.main([str(folder), "--watch", more])
    with says("--every=5 is for --watch: give both."):
        report.main([str(folder), "--every=5"])
    with says("--heads 0.0 0.1 look at a text: give it with --attend TEXT."):
        report.main([str(folder), "--heads", "0.0", "0.1"])
    with says("--run=lr is the one of samples and attention: give --prompt TEXT or --attend TEXT."):
        report.main([str(folder), "--run=lr"])
    with says("--every=0.0: seconds, more than 0."):
        report.main([str(folder), "--watch", "--every=0"])

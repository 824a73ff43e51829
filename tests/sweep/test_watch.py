"""The live table, on a terminal of its own."""

import io
import json
import os

from rich.console import Console
from rich.text import Text

from experiments import report
from tests.errors import says
from tests.sweep.runs import write_sweep
from tfm_jax.files import write_status
from tfm_jax.sweep import results, trials, watch
from tfm_jax.sweep.space import Trial


def drawn(folder, now, metric=None, goal=None, width=200):
    out = io.StringIO()
    Console(file=out, width=width).print(watch.table(results.read_all([folder]), metric, goal, now, width))
    assert max(map(len, out.getvalue().splitlines())) <= width
    return [line.strip(" \n│┃┏┓") for line in out.getvalue().splitlines()]


def cells(lines):
    """The last line of the head, and then each run's."""
    begin = next(i for i, line in enumerate(lines) if line.startswith("┡"))
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    head = [part.strip() for part in lines[begin - 1].split("┃")]
    return head, [[part.strip() for part in line.split("│")] for line in lines[begin + 1 : end]]


def test_table(tmp_path):
    folder = write_sweep(tmp_path / "rates", rates=3, seeds=1)
    lines = drawn(folder, now=0.0)
    assert lines[0] == "3 finished"
    head, rows = cells(lines)
    assert head == ["run", "state", "step", "loss", "lr", "loss", "tokens_per_sec"]
    # The best first.
    assert [row[0] for row in rows] == [f"lr={rate},seed=0" for rate in (0.004, 0.002, 0.001)]
    # One is still at it, has lost a line to a crash, and is silent; another one has failed: behind what has finished.
    slow = folder / "lr=0.001,seed=0"
    write_status(slow, "running")
    with (slow / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 50, "eval/validation/loss": 1.0}) + '\n{"step": 60, "eval')
    os.utime(slow / "metrics.jsonl", (1000, 1000))
    write_status(folder / "lr=0.002,seed=0", "failed", "out of memory")
    lines = drawn(folder, now=1000.0 + 300)
    assert lines[0] == "1 failed, 1 finished, 1 running"
    finished, first, last = cells(lines)[1]
    assert finished[0] == "lr=0.004,seed=0" and first[:5] == [
        "lr=0.001,seed=0",
        "running",
        "50/40",
        "1.0000",
        "5 min ago",
    ]
    assert last[:5] == ["lr=0.002,seed=0", "failed", "40/40", "2.1235", ""]


def test_a_narrow_terminal(tmp_path):
    """Names are cut last, and what has no room is said."""
    folder = write_sweep(tmp_path / "rates", rates=3, seeds=2)
    write_status(folder / "lr=0.001,seed=0", "running")
    os.utime(folder / "lr=0.001,seed=0" / "metrics.jsonl", (1000, 1000))
    lines = drawn(folder, now=1000.0 + 3000, width=80)
    head, rows = cells(lines)
    assert head == ["run", "state", "step", "loss", "last line", "seed", "lr"]
    assert rows[3] == ["lr=0.002,seed=1", "finished", "40/40", "2.1335", "", "1", "0.002"]
    assert lines[-1] == "Too narrow for train/loss, perf/tokens_per_sec."
    # Of one long name the end goes.
    (folder / "lr=0.002,seed=1").rename(folder / ("lr=0.002,seed=1" + 40 * "x"))
    head, rows = cells(drawn(folder, now=1000.0 + 3000, width=54))
    assert head == ["run", "state", "step", "loss"]
    assert rows[3][0].startswith("lr=0.002,seed=") and rows[3][0].endswith("…")
    assert rows[3][1:] == ["finished", "40/40", "2.1335"]


def test_a_metric_that_nobody_has(tmp_path):
    """Before anything of its kind is there, the loss decides, by its own direction; then it is an error."""
    folder = write_sweep(tmp_path / "rates", rates=2, seeds=1)
    for run in folder.iterdir():
        write_status(run, "running")
        lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "eval/" not in line]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    lines = drawn(folder, now=0.0, metric="eval/validation/accuracy", goal="higher")
    assert lines[-1] == "Nobody has logged eval/validation/accuracy yet: by train/loss meanwhile."
    assert [row[0] for row in cells(lines)[1]] == ["lr=0.002,seed=0", "lr=0.001,seed=0"]
    with (folder / "lr=0.001,seed=0" / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 40, "eval/validation/loss": 3.0}) + "\n")
    message = "No run has logged eval/validation/los; --metric names another. Did you mean 'eval/validation/loss'?"
    with says(message):
        report.main([str(folder), "--watch", "--metric=eval/validation/los"])


def test_trials_that_wait(tmp_path):
    """They have the settings of their overrides and what the others share; right after a sweep's start they are all."""
    folder = tmp_path / "rates"
    trials.open_folder(folder, {"metric": None})
    with says(f"{folder} is a sweep that has no trial yet."):
        results.find([folder])
    trials.list_trials(folder, [Trial("a", {"optim.lr": 0.008}), Trial("b", {"optim.lr": 0.016})])
    assert results.differing(results.read_all([folder])) == ["optim.lr"]
    lines = drawn(folder, now=0.0)
    assert lines[0] == "2 waiting" and [row[4] for row in cells(lines)[1]] == ["0.008", "0.016"]
    write_sweep(folder, rates=2, seeds=1)
    runs = results.read_all([folder])
    assert results.differing(runs) == ["optim.lr"]
    assert {run.name: run.state for run in runs}["a"] == "waiting"
    assert {run.config["train.steps"] for run in runs} == {40}
    assert "2 finished, 2 waiting" in drawn(folder, now=0.0)


def test_a_study_is_ordered_by_its_own_metric(tmp_path):
    folder = write_sweep(tmp_path / "study", rates=3, seeds=1)
    trials.open_folder(folder, {"metric": "eval/validation/loss", "direction": "maximize"})
    assert [row[0] for row in cells(drawn(folder, now=0.0))[1]] == [
        f"lr={rate},seed=0" for rate in (0.001, 0.002, 0.004)
    ]


def watched(monkeypatch, folder, *changes):
    """Watch a folder to which between looks something happens, and then Ctrl-C."""
    left = iter([*changes, None])

    def sleep(seconds):
        if (change := next(left)) is None:
            raise KeyboardInterrupt
        change()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert report.main([str(folder), "--watch"]) == 0


def test_without_a_terminal_it_is_printed_at_each_change(tmp_path, monkeypatch, capsys):
    """Whole, however long the names are."""
    folder = write_sweep(tmp_path / "rates", rates=2, seeds=1)
    (folder / "lr=0.001,seed=0").rename(folder / ("x" * 100))
    at_looks = []

    def nothing():
        at_looks.append(capsys.readouterr().out)

    def fails():
        nothing()
        write_status(folder / ("x" * 100), "failed")

    watched(monkeypatch, folder, fails, nothing, nothing)
    assert [out.split("\n")[0].strip() for out in at_looks] == ["2 finished", "1 failed, 1 finished", ""]
    assert "x" * 100 in at_looks[0] and "tokens_per_sec" in at_looks[0] and "\x1b" not in at_looks[0]


def test_a_terminal_that_cannot_draw_anew(tmp_path, monkeypatch, capsys):
    """One of an editor, for instance: Live would say nothing before its end."""
    folder = write_sweep(tmp_path / "rates", rates=2, seeds=1)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")
    looks = []
    watched(monkeypatch, folder, lambda: looks.append(capsys.readouterr().out))
    assert "2 finished" in looks[0]


def test_a_short_terminal(tmp_path, monkeypatch):
    """Those that run are shown before the best, and how many are left out; at the end all."""
    folder = write_sweep(tmp_path / "rates", rates=8, seeds=1)
    worst = "lr=0.128,seed=0"
    write_status(folder / worst, "running")
    out, at_look = io.StringIO(), []
    made = {"file": out, "width": 120, "height": 12, "force_terminal": True}
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(watch, "Console", lambda: Console(**made))
    watched(monkeypatch, folder, lambda: at_look.append(out.getvalue()))
    first = [Text.from_ansi(line).plain for line in at_look[0].splitlines()]
    assert len(first) == 12 and first[-1].strip() == "Too short for 4 more runs."
    assert [row.split()[1] for row in first if row.startswith("│")] == [
        *(f"lr={rate},seed=0" for rate in (0.004, 0.002, 0.008)),
        worst,
    ]
    last = out.getvalue().rpartition("1 running")[2]
    assert last.count("seed=0") == 8 and "Too short" not in last


def test_what_does_not_go_with_watching(tmp_path):
    folder = write_sweep(tmp_path / "rates", rates=2, seeds=1)
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

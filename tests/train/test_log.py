"""Where numbers go: the file, TensorBoard, a terminal, and a pipe."""

import io
import json
import sys
import types

from tfm_jax.train.log import Progress, Writers, read_metrics

METRICS = {"train/loss": 1.23456, "perf/tokens_per_sec": 12345.6}


def writers(run, start=0, **more):
    return Writers(run, **{"start": start, "tensorboard": False, "wandb": None, "config": {}} | more)


def test_a_line_a_step(tmp_path):
    out = writers(tmp_path)
    out.write(1, {"a": 0.5})
    # Whole lines are on disk at once: a kill loses none.
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 0.5}\n'
    out.write(2, {"a": 0.25, "b": 1.0})
    out.close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25, "b": 1.0}]


def test_what_was_written_after_the_checkpoint_is_dropped(tmp_path):
    lines = [json.dumps({"step": step, "a": 0}) for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "a"')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    out = writers(tmp_path, start=4)
    out.write(5, {"a": 1})
    out.close()
    assert [(r["step"], r["a"]) for r in read_metrics(tmp_path)] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1)]
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_files_are_written(tmp_path):
    out = writers(tmp_path, tensorboard=True)
    for step in range(50):
        out.write(step, {"train/loss": 1.0})
    out.close()
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert events.stat().st_size > 50 * 30 and b"train/loss" in events.read_bytes()


def test_runs_of_weights_and_biases(tmp_path, monkeypatch):
    """Equal names in two sweeps are two runs, also in one process; what goes on in a folder, by whatever path, is one."""
    asked = []
    wandb = types.SimpleNamespace(init=lambda **options: asked.append(options) or types.SimpleNamespace(finish=int))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for sweep in ("a", "b", "link"):
        (tmp_path / sweep / "lr=0.1").mkdir(parents=True, exist_ok=True)
        writers(tmp_path / sweep / "lr=0.1", wandb="us/project").close()
    assert {(one["name"], one["entity"], one["project"]) for one in asked} == {("lr=0.1", "us", "project")}
    first, second, again = (one["id"] for one in asked)
    assert first != second and first == again
    assert {(one["reinit"], one["resume"]) for one in asked} == {("create_new", "allow")}


def test_plain_lines_in_a_pipe():
    out = io.StringIO()
    with Progress(start=0, total=100, shown=True, out=out) as progress:
        progress.advance()
        progress.report(10, METRICS, 75.4)
        progress.report(20, METRICS | {"perf/mfu": 0.256}, 7384)
        progress.say("hello")
    assert out.getvalue().splitlines() == [
        "step 10/100  loss 1.2346  12,346 tokens/s  ETA 1:15",
        "step 20/100  loss 1.2346  12,346 tokens/s  MFU 26%  ETA 2:03:04",
        "hello",
    ]


def test_nothing_from_the_other_processes():
    out = io.StringIO()
    with Progress(start=0, total=100, shown=False, out=out) as progress:
        progress.advance()
        progress.report(10, METRICS, 1)
        progress.say("hello")
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal():
    out = Terminal()
    with Progress(start=40, total=100, shown=True, out=out) as progress:
        for _ in range(10):
            progress.advance()
        progress.report(50, METRICS, 75)
        progress.say("an evaluation")
    text = out.getvalue()
    assert "\r" in text and "50/100" in text and "loss 1.2346" in text and "12,346 tokens/s" in text
    assert "an evaluation\n" in text and "ETA" not in text

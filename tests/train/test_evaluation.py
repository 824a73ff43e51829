"""Checkpoints evaluated one after the other: one compilation, nothing twice, and none missed while a run goes on."""

import contextlib
import csv
import json
import logging
import shutil
import threading

import jax
import pytest

from experiments import evaluate
from tests.errors import says
from tfm_jax.files import write_status
from tfm_jax.train import rundir
from tfm_jax.train.evaluation import Evaluations, following, recorded
from tfm_jax.train.log import read_metrics
from tfm_jax.train.restore import latest
from tfm_jax.train.run import train


@pytest.fixture(scope="module")
def sweep(make_config, tmp_path_factory):
    """Two runs of one shape, with a checkpoint and an evaluation at each second of 8 steps."""
    folder = tmp_path_factory.mktemp("evaluations")
    for rate in (0.01, 0.03):
        changes = {"optim.lr": rate, "train.eval_every": 2, "checkpoint.every": 2, "checkpoint.keep": 4}
        train(make_config(changes), folder / f"lr={rate}")
    return folder


@pytest.fixture
def compiled():
    """Programs that are compiled from here on."""
    found = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def logged(run):
    return {line["step"]: line["eval/validation/loss"] for line in read_metrics(run) if "eval/validation/loss" in line}


def test_one_compilation_for_all_steps_and_runs_alike(sweep, compiled):
    evaluations = Evaluations([("evals.validation.batch_size", "16")])
    first, second = sweep / "lr=0.01", sweep / "lr=0.03"
    found = {2: evaluations.of(first, 2)["eval/validation/loss"]}
    assert compiled
    compiled.clear()
    found |= {step: evaluations.of(first, step)["eval/validation/loss"] for step in (4, 6, 8)}
    other = evaluations.of(second, 8)["eval/validation/loss"]
    assert compiled == []
    assert found == pytest.approx(logged(first), rel=1e-5) and other == pytest.approx(logged(second)[8], rel=1e-5)


def test_nothing_twice(sweep, capsys, tmp_path, monkeypatch):
    run, calls = tmp_path / "run", []
    shutil.copytree(sweep / "lr=0.01", run)
    (run / "evaluations.jsonl").unlink(missing_ok=True)
    from tfm_jax.train import evaluation

    whole = evaluation.restore_for_evaluation
    monkeypatch.setattr(evaluation, "restore_for_evaluation", lambda *a, **k: calls.append(a[2]) or whole(*a, **k))

    def go(*flags):
        calls.clear()
        assert evaluate.main([f"--run={run}", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    every = go("--steps=all")["evaluations"]
    assert calls == [2, 4, 6, 8] and [one["step"] for one in every] == [2, 4, 6, 8]
    # A line cut off by a crash is no result.
    with (run / "evaluations.jsonl").open("a") as out:
        out.write('{"work": "1')
    assert go("--steps=all")["evaluations"] == every and calls == []
    # A second evaluator is new, the first one is known, and so is another mesh.
    more = go("--config.evals.train.name=loss", "--config.evals.train.split=train", "--config.mesh.fsdp=2")
    assert calls == [8] and len(recorded(run)) == 5
    assert more["eval/validation/loss"] == every[-1]["eval/validation/loss"]
    # Other rows of the same evaluator, an average, and weights that have been trained anew are other work.
    go("--config.evals.validation.max_batches=2")
    assert calls == [8]
    assert [one["step"] for one in go("--steps=all", "--average=3")["evaluations"]] == [6, 8] and calls == [6, 8]
    # So are rows of another length, and where the split is cut short, more of them; or as many as another mesh makes of them.
    short = go("--config.data.seq_len=4")
    assert calls == [8] and short["eval/validation/loss"] != every[-1]["eval/validation/loss"]
    few = ["--config.evals.validation.max_batches=2", "--config.data.batch_size=4"]
    tokens = [go(*few, mesh)["eval/validation/tokens"] for mesh in ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")]
    assert tokens == [128, 64] and calls == [8]
    # Where the data lies is not.
    go(f"--config.data.cache_dir={tmp_path}/cache", "--config.data.workers=1")
    assert calls == []
    go("--again")
    assert calls == [8]


def test_a_pattern_and_one_table(sweep, capsys, tmp_path):
    table = tmp_path / "all.csv"
    (sweep / "report").mkdir(exist_ok=True)
    assert evaluate.main(["--run", f"{sweep}/*", f"{sweep}/lr=0.01/checkpoints/4", f"--table={table}"]) == 0
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["run"].rpartition("/")[2], row["step"]) for row in rows] == [
        ("lr=0.01", "8"),
        ("lr=0.03", "8"),
        ("lr=0.01", "4"),
    ]
    want = [logged(sweep / name)[step] for name, step in (("lr=0.01", 8), ("lr=0.03", 8), ("lr=0.01", 4))]
    assert [float(row["eval/validation/loss"]) for row in rows] == pytest.approx(want, rel=1e-5)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert evaluate.main([f"--run={sweep}/lr=0.01", "--average=2"]) == 0
    step, how, *figures = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (step, how) == (["step", "8"], ["with", "average=2, decay=1.0"]) and dict(figures)["eval/validation/loss"]


def test_what_is_wrong_with_one_run_keeps_no_other(sweep, capsys, caplog, tmp_path):
    """One without a checkpoint, one whose config is damaged and one that lost it, beside a good one; alone, each is an error."""
    folder, table = tmp_path / "runs", tmp_path / "all.csv"
    for name in ("a", "b", "c", "d"):
        shutil.copytree(sweep / "lr=0.01", folder / name)
    shutil.rmtree(folder / "a" / "checkpoints")
    (folder / "b" / "config.json").write_text('{"model": ')
    (folder / "d" / "config.json").unlink()
    (folder / "d" / "status.json").unlink()
    assert evaluate.main([f"--run={folder}/*", f"--table={table}", "--json"]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {one["run"] for one in said["evaluations"]} == {f"{folder}/c"}
    assert said["failed"].keys() == {f"{folder}/a", f"{folder}/b", f"{folder}/d"}
    assert f"{folder}/a has no checkpoints" in caplog.text and f"{folder}/b/config.json is damaged" in caplog.text
    with table.open() as lines:
        assert {row["run"] for row in csv.DictReader(lines)} == {f"{folder}/c"}
    with says(f"{folder}/a has no checkpoints: give a run folder, or RUN/checkpoints/STEP."):
        evaluate.main([f"--run={folder}/a"])


def test_following_a_run(sweep, tmp_path):
    """Checkpoints come while others are evaluated, the last one together with the end."""
    run, done = tmp_path / "run", []

    def wait():
        write_status(run, "running") if run.is_dir() else run.mkdir()
        for step in {0: [], 1: [2], 2: [4, 6], 3: [8]}[len(waits)]:
            shutil.copytree(sweep / "lr=0.01" / "checkpoints" / str(step), run / "checkpoints" / str(step))
        waits.append(1)
        if len(waits) == 4:
            write_status(run, "finished")

    waits = []
    for _, step in following([run], wait):
        done.append(step)
    assert done == [2, 4, 6, 8] and len(waits) == 4


def test_following_what_is_not_there(sweep, tmp_path, caplog, monkeypatch):
    """It may begin yet; that it is waited for is said once, with what may be meant."""
    good = tmp_path / "good"
    shutil.copytree(sweep / "lr=0.01", good)
    (tmp_path / "next").mkdir()
    rounds = []

    def wait(seconds):
        rounds.append(seconds)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.time, "sleep", wait)
    with caplog.at_level(logging.INFO):
        evaluate.main(["--run", str(good), f"{tmp_path}/goood", f"{tmp_path}/next/one", "--steps=all", "--follow"])
    assert [record.getMessage() for record in caplog.records if "Waiting" in record.getMessage()] == [
        f"Waiting for {tmp_path}/goood, which has not begun. Did you mean {str(good)!r}?",
        f"Waiting for {tmp_path}/next/one, which has not begun.",
    ]


def test_following_a_run_that_is_preempted_and_killed(sweep, tmp_path):
    """It goes on half a minute later, and is killed: what it says of itself is wrong at both times."""
    run, now, process = tmp_path / "run", [0.0], contextlib.ExitStack()
    shutil.copytree(sweep / "lr=0.01" / "checkpoints" / "2", run / "checkpoints" / "2")
    write_status(run, "preempted")

    def wait():
        now[0] += 10
        if now[0] == 30:
            process.enter_context(rundir.claim(run))
            write_status(run, "running")
        if now[0] == 200:
            shutil.copytree(sweep / "lr=0.01" / "checkpoints" / "4", run / "checkpoints" / "4")
            process.close()

    found = [(step, now[0]) for _, step in following([run], wait, grace=60, clock=lambda: now[0])]
    assert found == [(2, 0), (4, 200)] and now[0] == 260


def test_following_a_trial_that_is_to_be_tried_again(tmp_path):
    """It has not begun, however long a sweep leaves it waiting."""
    now = [0.0]
    write_status(tmp_path, "waiting", "it has failed before: by chance")

    def wait():
        now[0] += 1000
        if now[0] == 5000:
            write_status(tmp_path, "finished")

    assert list(following([tmp_path], wait, grace=60, clock=lambda: now[0])) == [] and now[0] == 5000


def test_checkpoints_that_are_deleted_while_they_are_averaged(sweep, tmp_path, capsys, caplog, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(sweep / "lr=0.01", run)

    def of(self, run, step):
        if step == 4:
            # As it is read it goes away, its folder last.
            threading.Timer(0.3, shutil.rmtree, [run / "checkpoints" / "2"]).start()
            raise FileNotFoundError("a parameter")
        latest(run, rundir.checkpoint_steps(run), step, 2)
        return {"step": step, "eval/validation/loss": 1.5}

    monkeypatch.setattr(Evaluations, "of", of)
    monkeypatch.setattr(evaluate, "LOOK_S", 0.3)
    with caplog.at_level(logging.WARNING), rundir.claim(run):
        assert evaluate.main([f"--run={run}", "--steps=all", "--average=2", "--json"]) == 0
    assert [one["step"] for one in json.loads(capsys.readouterr().out.splitlines()[-1])["evaluations"]] == [6, 8]
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        f"{run}, step 2 is left out: of --average=2 checkpoints there are [2].",
        f"{run}, step 4 is left out: the run has deleted a checkpoint of it meanwhile.",
    ]


def test_mistakes(sweep):
    run = sweep / "lr=0.01"
    with says("--follow waits for the checkpoints of --steps=all: give both."):
        evaluate.main([f"--run={run}", "--follow"])
    with says(f"{run}/checkpoints/4 is the checkpoint of step 4, and asked for is step 8: give {run}."):
        evaluate.main([f"--run={run}/checkpoints/4", "--steps=8"])
    with says(
        f"--config.data.tokenizer=chars: {run} reads by its own tokenizer, whose ids its parameters are for. Leave it out."
    ):
        evaluate.main([f"--run={run}", "--config.data.tokenizer=chars"])
    with says("--steps=4;6: write `all`, or numbers with commas: 100,200."):
        evaluate.main([f"--run={run}", "--steps=4;6"])
    with says(f"{sweep}/x*: no run is called like this."):
        evaluate.main([f"--run={sweep}/x*"])
    with says("--decay=0.0: in (0, 1]; 1 for the mean."):
        evaluate.main([f"--run={run}", "--decay=0"])
    with says("--decay=0.8 weighs the checkpoints of --average=N: give both."):
        evaluate.main([f"--run={run}", "--decay=0.8"])
    with says("--average=0: must be at least 1."):
        evaluate.main([f"--run={run}", "--average=0"])
    with says("--config=x.py: the config is the run's or the model's own; change it with --config.KEY=VALUE."):
        evaluate.main([f"--run={run}", "--config=x.py"])

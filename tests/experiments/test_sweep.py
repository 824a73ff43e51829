"""The command: trials in processes of their own, one of which fails; costs; and what is refused before anything starts."""

import json

import numpy as np
import pytest

from experiments import cli, sweep
from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.files import write_status
from tfm_jax.sweep import trials
from tfm_jax.sweep.space import Trial, grid, named


@pytest.fixture
def arguments(config_file, tmp_path):
    """`arguments("return [...]")`: the command's for a sweep of that body."""

    def make(body, *more):
        path = tmp_path / "sweep.py"
        path.write_text(f"from tfm_jax.sweep.space import *\n\n\ndef sweep():\n    {body}\n")
        return [f"--config={config_file}", f"--sweep={path}", f"--workdir={tmp_path}/out", *more]

    return make


def test_a_sweep(arguments, start_command, tmp_path):
    body = "return grid({'optim.lr': [1e-2, 1e30]})"
    more = ["--config.train.max_bad_steps=2", "--config.optim.clip_norm=None", "--parallel=2", "--json"]
    child = start_command("sweep", *arguments(body, *more))
    out, error = child.communicate(timeout=280)
    assert child.returncode == 1, error
    lines = out.splitlines()
    assert "lr=0.01: finished at step 8." in lines and lines[-2] == "1 failed; --retry_failed tries again."
    good, bad = json.loads(lines[-1])["trials"]
    assert (good["state"], good["step"], bad["state"]) == ("finished", 8, "failed")
    assert good["metrics"]["eval/validation/loss"] < 6 and "was not finite" in bad["reason"]
    assert f"lr=1e+30: failed: {bad['reason']}" in lines
    assert json.loads((tmp_path / "out" / "lr=0.01" / "config.json").read_text())["optim"]["lr"] == 0.01


@pytest.mark.journey
def test_processes_with_members(arguments, start_command, tmp_path):
    """Two processes of two members each: every trial is done once, and as by itself."""
    body = "return product(grid({'optim.lr': [1e-3, 1e-2]}), seeds(2))"
    child = start_command("sweep", *arguments(body, "--parallel=2", "--vectorise=2", "--json"))
    out, error = child.communicate(timeout=280)
    assert child.returncode == 0, error
    rows = json.loads(out.splitlines()[-1])["trials"]
    assert [row["state"] for row in rows] == ["finished"] * 4
    assert sum(line.endswith(": finished at step 8.") for line in out.splitlines()) == 4
    assert out.count("\ntrial ") == 1
    assert sweep.main([*arguments(body), f"--workdir={tmp_path}/alone"]) == 0
    for row in sweep.table(tmp_path / "alone"):
        (same,) = (one for one in rows if one["trial"] == row["trial"])
        key = "eval/validation/loss"
        assert same["metrics"][key] == pytest.approx(row["metrics"][key], rel=1e-5)


def test_one_that_is_interrupted_says_how_it_goes_on(arguments, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.runner, "run", interrupted)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    assert sweep.main(arguments("return grid({'optim.lr': [1e-2, 1e-1]})")) == cli.INTERRUPTED
    assert capsys.readouterr().err == "stopped: 0 of 2 trials ended; the same command goes on.\n"


def test_one_that_is_interrupted_before_its_first_step(arguments, capsys, monkeypatch, tmp_path):
    """What was stopped before it could say so runs no more; of a study's trials those that are not drawn yet count too."""
    pytest.importorskip("optuna", reason="studies need the extra sweep")

    def interrupted(source, folder, *args, **options):
        write_status(folder / source.draw().name, "running")
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.runner, "run", interrupted)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    assert sweep.main(arguments(STUDY % ("validation", "none"))) == cli.INTERRUPTED
    assert capsys.readouterr().err == "stopped: 0 of 2 trials ended; the same command goes on.\n"
    assert [row["state"] for row in sweep.table(tmp_path / "out")] == ["preempted"]
    # Nor does what a launcher that was killed has left; the next one may have other trials to run first.
    write_status(tmp_path / "out" / sweep.table(tmp_path / "out")[0]["trial"], "running")
    monkeypatch.setattr(sweep.runner, "run", lambda *args, **options: None)
    assert sweep.main(arguments(STUDY % ("validation", "none"))) == 0
    assert [row["state"] for row in sweep.table(tmp_path / "out")] == ["preempted"]


@pytest.mark.parametrize("body", ["return grid({'optim.lr': [1e-2, 1e-1]})", "STUDY"])
def test_a_config_that_has_changed_meanwhile(arguments, capsys, config_file, monkeypatch, tmp_path, body):
    """What a run would be refused for, the sweep is too, whether the trial has ended or not; before it forgets a failure."""
    if body == "STUDY":
        pytest.importorskip("optuna", reason="studies need the extra sweep")
        body = STUDY % ("validation", "none")
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep.runner, "run", lambda source, *args, **options: source.draw())
    config = tmp_path / "config.py"
    config.write_text(config_file.read_text())
    given = [*arguments(body), f"--config={config}"]
    assert sweep.main(given) == 0
    (trial,) = trials.read_folder(tmp_path / "out")[1][:1]
    run = tmp_path / "out" / trial.name
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(sweep._resolved(str(config), {}, trial)))
    write_status(run, "failed", "by chance")
    config.write_text(config_file.read_text().replace("'every': 1", "'every': 2"))
    assert sweep.main([*given, "--config.log.tensorboard=True"]) == 1
    config.write_text(config_file.read_text().replace("'warmup_steps': 2", "'warmup_steps': 3"))
    with says(
        f"{run} belongs to another config. What differs (its own -> asked for):\n  optim.warmup_steps: 2 -> 3"
        "\nUse another --workdir, or delete this one."
    ):
        sweep.main([*given, "--retry_failed"])
    assert trials.state(run).word == "failed"
    config.write_text(config_file.read_text())
    given += ["--config.train.eval_every=2", "--config.evals.validation.batch_size=4"]
    if body.startswith("return grid"):
        assert sweep.main(given) == 1
        return
    with says(
        f"{run} is judged by evals.validation.batch_size=None, not 4, as all trials of its study. Use another --workdir."
    ):
        sweep.main(given)


@pytest.mark.parametrize(
    ("metric", "key", "free"),
    [("eval/validation/loss", "train.eval_every", "log.every"), ("train/loss", "log.every", "train.eval_every")],
)
def test_what_decides_a_pruners_rungs_stays(arguments, config_file, monkeypatch, tmp_path, metric, key, free):
    pytest.importorskip("optuna", reason="studies need the extra sweep")
    given = arguments((STUDY % ("validation", "asha")).replace("eval/validation/loss", metric))
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep.runner, "run", lambda source, *args, **options: source.draw())
    assert sweep.main([*given, f"--config.{key}=2", f"--config.{free}=2"]) == 0
    (trial,) = trials.read_folder(tmp_path / "out")[1]
    run = tmp_path / "out" / trial.name
    (run / "config.json").write_text(json.dumps(sweep._resolved(str(config_file), {key: "2", free: "2"}, trial)))
    (run / "checkpoints" / "4").mkdir(parents=True)
    assert sweep.main([*given, f"--config.{key}=2", f"--config.{free}=4"]) == 0
    with says(f"{run} is judged by {key}=2, not 4, as all trials of its study. Use another --workdir."):
        sweep.main([*given, f"--config.{key}=4", f"--config.{free}=2"])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("source", ["list", "study"])
def test_numbers_of_numpys(arguments, config_file, monkeypatch, tmp_path, source, old):
    """A sweep of them goes on, also one whose folder is older and has them as `repr` spells them."""
    body = "return grid(values)"
    if source == "study":
        pytest.importorskip("optuna", reason="studies need the extra sweep")
        space = "{key: choice(*options) for key, options in values.items()}"
        body = f"return Study({space}, metric='eval/validation/loss', trials=1, sampler='grid')"
    values = "{'model.layers': np.arange(1, 2), 'optim.lr': np.float32([0.1]), 'data.cache_dir': [Path('here')]}"
    body = f"values = {{key: list(options) for key, options in {values}.items()}}; {body}"
    given = arguments(f"import numpy as np; from pathlib import Path; {body}")
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep.runner, "run", lambda source, *args, **options: source.draw() or source.candidates())
    with monkeypatch.context() as before:
        if old:
            before.setattr(trials, "_plain", repr)
        assert sweep.main(given) == 0
    (record,) = (tmp_path / "out").glob("*/trial.json")
    assert ("np.int64(1)" in record.read_text()) == old
    plain = {"model.layers": 1, "optim.lr": np.float32(0.1).item(), "data.cache_dir": "here"}
    (record.parent / "config.json").write_text(json.dumps(sweep._resolved(str(config_file), {}, Trial("", plain))))
    (record.parent / "checkpoints" / "4").mkdir(parents=True)
    assert sweep.main(given) == 0
    assert json.loads(record.read_text())["overrides"] == plain


def test_an_older_folder_has_overrides_that_may_change(arguments, monkeypatch, tmp_path):
    """The command that it began with goes on, with or without them."""
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sweep.runner, "run", lambda *args, **options: None)
    given = arguments("return seeds(2)", "--config.optim.lr=0.1")
    assert sweep.main(given) == 0
    record = tmp_path / "out" / "sweep.json"
    record.write_text(record.read_text().replace('"overrides": {', '"overrides": {"log.tensorboard": "True", '))
    assert len(trials.read_folder(record.parent)[0]["overrides"]) == 2
    assert sweep.main(given) == sweep.main([*given, "--config.log.tensorboard=True"]) == 0
    with says(
        f"{record.parent} belongs to another sweep:\n  overrides: {{'optim.lr': '0.1'}} -> {{}}\nUse another --workdir."
    ):
        sweep.main(given[:-1])


def test_what_failed_is_taken_up_once_for_all_processes(arguments, monkeypatch):
    commands = []

    class Done:
        def wait(self):
            return 0

    monkeypatch.setattr(sweep.runner, "bound", lambda command, slot, parallel: commands.append(command) or Done())
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    given = arguments("return grid({'optim.lr': [1e-2, 1e-1]})", "--retry_failed", "--vectorise=2", "--parallel=2")
    assert sweep.main(given) == 0
    assert [("--retry_failed" in command, "--parallel=1" in command) for command in commands] == [(False, True)] * 2


def test_a_database_that_has_gone_away_is_said_in_the_end(arguments, monkeypatch, tmp_path):
    pytest.importorskip("optuna", reason="studies need the extra sweep")

    def away(source, *args, **options):
        source.lost = UserError("gone")

    monkeypatch.setattr(sweep.runner, "run", away)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    for more in ((), ("--one_of_several",)):
        with says("gone"):
            sweep.main(arguments(STUDY % ("validation", "none"), f"--storage=sqlite:///{tmp_path}/s.db", *more))


def test_costs(arguments, capsys, monkeypatch, tmp_path):
    """Twice the width costs more than twice as much; nothing is written."""
    monkeypatch.setattr(cli, "setup", lambda: None)
    body = "return chain(grid({'model.width': [16, 32]}), [{'model.width': 16, 'train.steps': 16}])"
    assert sweep.main(arguments(body, "--dry_run", "--json")) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:4]}
    one, wide, long = (rows[name] for name in ("width=16", "width=32", "width=16,steps=16"))
    assert one[0] == 8 and long[0] == 16 and long[1] == pytest.approx(2 * one[1], rel=0.01) and wide[1] > 2 * one[1]
    assert json.loads(lines[-1])["flops"] == pytest.approx(one[1] + wide[1] + long[1], rel=0.01)
    assert not (tmp_path / "out").exists()


def test_costs_of_a_study(arguments, capsys, monkeypatch):
    """From all trials as cheap as can be to all as dear, by the keys that change a cost; a rate is not among them."""
    monkeypatch.setattr(cli, "setup", lambda: None)
    space = "'optim.lr': log_uniform(1e-3, 1e-1), 'model.width': choice(32, 16), 'train.steps': uniform(8, 16)"
    body = f"return Study(space={{{space}}}, trials=5, metric='eval/validation/loss')"
    assert sweep.main(arguments(body, "--dry_run", "--json")) == 0
    head, *rows, total, said = capsys.readouterr().out.splitlines()
    flops = {row.split()[0]: float(row.split()[2]) for row in rows}
    assert head.split() == ["trial", "with", "steps", "FLOPs"] and len(rows) == 4
    least, most = flops["width=16,steps=8"], flops["width=32,steps=16"]
    assert most > 4 * least and total.endswith(" FLOPs in all, if none is stopped early.")
    found = json.loads(said)
    assert total.startswith(f"5 trials, {found['least_flops']:.3g} to {found['flops']:.3g} ")
    assert [found["least_flops"], found["flops"]] == pytest.approx([5 * least, 5 * most], rel=0.01)


def test_a_result_that_cannot_be_read(tmp_path):
    """The table says why it has no number of a trial that has finished."""
    record, listed = {"config": "a.py"}, named(grid({"optim.lr": [0.1, 0.2]}))
    trials.open_folder(tmp_path, record)
    trials.list_trials(tmp_path, listed)
    for trial, text in zip(listed, ('{"eval/v/loss": 2.5}', "[]"), strict=True):
        (tmp_path / trial.name / "result.json").write_text(text)
        write_status(tmp_path / trial.name, "finished")
    *_, good, bad, reason = sweep.shown(sweep.table(tmp_path), None, "minimize").splitlines()
    assert good.split() == ["lr=0.1", "finished", "0", "2.5000"] and bad.split() == ["lr=0.2", "finished", "0"]
    assert reason.startswith("lr=0.2: finished: result.json is damaged: ")


def test_the_table_ranks_as_reports_do():
    """A loss that is no number is behind all others, as is one of which there is none."""
    losses = {"a": 0.5, "b": float("nan"), "c": 0.1}
    rows = [
        {"trial": name, "state": "finished", "reason": "", "step": 8, "overrides": {}, "metrics": {"eval/v/loss": loss}}
        for name, loss in losses.items()
    ]
    rows = [{**rows[0], "trial": "d", "metrics": {}}, *rows]
    for direction, order in (("minimize", "cadb"), ("maximize", "acdb")):
        lines = sweep.shown(rows, "eval/v/loss", direction).splitlines()[1:]
        assert "".join(line.split()[0] for line in lines) == order


@pytest.mark.parametrize("metric", ["optim/lr", "perf/tokens_per_sec", "train/grad_norm"])
def test_metrics_of_all_kinds(arguments, capsys, monkeypatch, metric):
    monkeypatch.setattr(cli, "setup", lambda: None)
    body = f"return Study(space={{'optim.lr': log_uniform(1e-3, 1e-1)}}, trials=2, metric='{metric}')"
    assert sweep.main(arguments(body, "--dry_run")) == 0


STUDY = "return Study(space={'optim.lr': log_uniform(1e-3, 1e-1)}, trials=2, metric='eval/%s/loss', pruner=%r)"


@pytest.mark.parametrize(
    ("body", "more", "said"),
    [
        ("return grid({'optim.lrr': [1]})", (), "sweep(), trial only: --config.optim.lrr=1: unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        ("return []", (), "sweep: the space is empty."),
        (STUDY % ("validatoin", "none"), (), "sweep: metric='eval/validatoin/loss' is none that trials log. Did you mean 'eval/validation/loss'?"),
        ((STUDY % ("validation", "none")).replace("eval/", "evl/"), (), "sweep: metric='evl/validation/loss' is none that trials log. Did you mean 'eval/validation/loss'?"),
        (STUDY % ("validation", "asha"), (), "sweep: pruner='asha' judges evaluations on the way: set train.eval_every."),
        ("return None", (), "--sweep={sweep}: sweep() returns overrides (dicts in a list) or a Study, not None."),
        ("return [1]", (), "--sweep={sweep}: sweep() returns overrides (dicts in a list) or a Study, not 1."),
        ("return seeds(2)", ("--sweep={sweep}:x",), "--sweep={sweep}:x: sweep(): too many positional arguments."),
        ("return seeds(2)", ("--sweep={sweep}e.py",), "--sweep={sweep}e.py: there is no file {sweep}e.py. Did you mean '{sweep}'?"),
        ("return seeds(2)", ("--storage=mysql://me:word@x/db",), "--storage=mysql://me:***@x/db is for studies; the sweep() of {sweep} returns a list."),
        (STUDY % ("validation", "none"), ("--config.optim.lr=0.1",), "--config.optim.lr=0.1 overlaps with the sweep, which sets optim.lr. Leave one of them out."),
        ("return grid({'optim.options': [{}]})", ("--config.optim.options.b2=0.9",), "--config.optim.options.b2=0.9 overlaps with the sweep, which sets optim.options. Leave one of them out."),
        ("return seeds(2)", ("--parallel=0",), "--parallel=0: must be at least 1."),
        ("return seeds(2)", ("--backend=slurm", "--vectorise=2"), "--vectorise=2 is for --backend=local: submit this command itself as a job."),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, tmp_path, body, more, said):
    path = tmp_path / "sweep.py"
    with says(said.format(sweep=path)):
        sweep.main(arguments(body, *(flag.format(sweep=path) for flag in more)))
    assert not (tmp_path / "out").exists()

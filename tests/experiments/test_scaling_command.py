"""The command on run directories that are there."""

import json
import shutil

import pytest

from experiments import cli, scaling
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.sweep.scaling import Law
from tfm_jax.train import rundir

LAW = Law(E=1.2, A=40.0, B=90.0, alpha=0.3, beta=0.35)


@pytest.fixture
def runs(tmp_path, make_config):
    """Finished runs of four sizes and three lengths, their losses those of a law."""
    made = []
    for width in (16, 32, 64, 128):
        for steps in (100, 1000, 10000):
            run, parameters = tmp_path / f"{width}-{steps}", 24 * width**2 + 512 * width
            run.mkdir()
            config = make_config({"model.width": width, "train.steps": steps, "model.vocab_size": 257})
            (run / "config.json").write_text(configs.to_json(config))
            loss = float(LAW.loss(parameters, steps * 8 * 8))
            result = {
                "step": steps,
                "parameters": parameters,
                "eval/validation/loss": loss,
                "eval/validation/tokens": 9,
            }
            (run / "result.json").write_text(json.dumps(result))
            made.append(run)
    return made


def test_a_law_from_run_directories(runs, tmp_path, capsys):
    flags = ["--metric=eval/validation/loss", "--budget=1e12", f"--to={tmp_path}/law", "--resamples=10", "--json"]
    assert scaling.main([*map(str, runs), *flags]) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert found["law"]["alpha"]["value"] == pytest.approx(LAW.alpha, rel=0.02)
    best = LAW.optimum(1e12)
    assert found["optimum"]["parameters"]["value"] == pytest.approx(best.parameters, rel=0.05)
    assert found["runs"][0]["tokens"] == 100 * 8 * 8 and f"{len(runs)} runs" in said
    # Attention of one head size over 8 positions adds to 6 FLOPs a parameter; tables of positions have none.
    low, high = found["flops_per_parameter_and_token"]["of_the_runs"]
    assert 2 < low < high < 12
    assert (tmp_path / "law" / "scaling.png").stat().st_size > 10_000


def test_budgets_far_from_the_runs(runs, tmp_path, capsys):
    """Said where they may mislead, refused where nothing follows."""
    flags = [*map(str, runs), "--metric=eval/validation/loss", f"--to={tmp_path}/law", "--resamples=10"]
    for budget, said in (
        ("3e7", "That is 0.054 times the smallest run"),
        ("1e16", "times the largest run"),
        ("1e16", "times the most of these runs"),
    ):
        assert scaling.main([*flags, f"--budget={budget}"]) == 0
        assert said in capsys.readouterr().out
    with says("--budget=10: the smallest of these runs took 5.51e+08 FLOPs, and they say nothing of so few."):
        scaling.main([*flags, "--budget=10"])


def test_patterns(runs, tmp_path, capsys):
    """In quotes or by the shell; what lies beside the runs is named, whereas a run that is not there is an error."""
    (tmp_path / "report").mkdir()
    (tmp_path / "sweep.json").write_text("{}")
    for texts in ([f"{tmp_path}/*"], [str(path) for path in sorted(tmp_path.iterdir())]):
        assert cli.targets(texts) == sorted(runs)
        assert capsys.readouterr().err == f"Left out, no runs: {tmp_path}/report, {tmp_path}/sweep.json.\n"
    # A trial that waits, one that prepares its data, and a run without its config are no less there: a law without them is another.
    for name, file in (("waits", "trial.json"), ("broken", "checkpoints")):
        (tmp_path / name / file).mkdir(parents=True)
    with rundir.claim(tmp_path / "begins"):
        found = cli.targets([f"{tmp_path}/*"])
        assert {path.name for path in found} - {path.name for path in runs} == {"waits", "broken", "begins"}
    shutil.rmtree(tmp_path / "begins")
    flags = ["--metric=eval/validation/loss", "--budget=1e12", f"--to={tmp_path}/law"]
    with pytest.raises(UserError, match="broken is not a run directory"):
        scaling.main([f"{tmp_path}/*", *flags])
    with pytest.raises(UserError, match="report is not a run directory"):
        scaling.main([str(tmp_path / "report"), *flags])
    with pytest.raises(UserError, match="nine is not a run directory"):
        scaling.main([str(runs[0]), str(tmp_path / "nine"), *flags])


def test_what_is_no_finished_run_is_refused(runs, tmp_path):
    flags = ["--budget=1e12", f"--to={tmp_path}/law"]
    with pytest.raises(UserError, match=r"has no --metric=eval/valid/loss\. Did you mean 'eval/validation/loss'\?"):
        scaling.main([str(runs[0]), "--metric=eval/valid/loss", *flags])
    (runs[3] / "result.json").unlink()
    (runs[3] / "status.json").write_text('{"state": "preempted"}')
    with pytest.raises(UserError, match=r"32-100 is not finished \(preempted\): it has no result\.json"):
        scaling.main([*map(str, runs), "--metric=eval/validation/loss", *flags])
    with pytest.raises(UserError, match="is not a run directory"):
        scaling.main([str(tmp_path / "none"), "--metric=eval/validation/loss", *flags])
    with pytest.raises(UserError, match=r"--budget=-1\.0: must be above 0"):
        scaling.main([str(runs[0]), "--metric=x", "--budget=-1", f"--to={tmp_path}"])

"""Studies: what Optuna draws does not depend on how often a launcher dies; what is behind is stopped; errors."""

import contextlib
import json
import math
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.errors import says
from tests.sweep.test_runner import RUN
from tfm_jax.errors import UserError
from tfm_jax.files import write_atomic, write_status
from tfm_jax.sweep import runner, terms, trials
from tfm_jax.sweep.space import Study, choice, log_uniform, uniform
from tfm_jax.sweep.study import Drawn
from tfm_jax.train.log import read_metrics

pytest.importorskip("optuna", reason="studies need the extra sweep")

# The loss falls with the steps to how far the learning rate is from 0.01.
LOSS = RUN.replace("10.0 - step", "abs(float(sys.argv[4])) + 1.0 / step").replace(
    '"eval/v/loss": 5.0', '"eval/v/loss": 1.0'
)


def start(trial, run, lock, slot, pause=0.0):
    far = math.log10(trial.overrides["optim.lr"]) + 2
    command = [sys.executable, "-c", LOSS, str(run), "trains", str(pause), str(far)]
    with open(run / "train.log", "ab") as log:
        return runner.Process(subprocess.Popen(command, pass_fds=(lock,), stdout=log, stderr=log))


class Quick:
    """A run without a process: an evaluation at each look, and one more while it stops."""

    lasting = False

    def __init__(self, trial, run, lock, slot):
        self._path, self._code = run / "metrics.jsonl", None
        self._far = abs(math.log10(trial.overrides["optim.lr"]) + 2)

    def _evaluate(self):
        step = len(read_metrics(self._path.parent)) + 1
        if step <= 5:
            with self._path.open("a") as out:
                out.write(json.dumps({"step": step, "eval/v/loss": self._far + 1 / step}) + "\n")
        return step

    def poll(self):
        if self._code is None and self._evaluate() >= 5:
            write_status(self._path.parent, "finished")
            self._code = 0
        return self._code

    def stop(self):
        if self._code is None:
            self._evaluate()
            self._code = 75


def wanted(**changes):
    space = {"optim.lr": log_uniform(1e-4, 1.0), "model.layers": choice(1, 2)}
    return Study(**{"space": space, "metric": "eval/v/loss", "trials": 8, **changes})


def drawn(folder, study):
    folder.mkdir(exist_ok=True)
    return Drawn(study, folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    source = drawn(folder, wanted())
    runner.run(source, folder, start, wait=0.01, say=lambda line: None)
    return folder, source


LAUNCHER = """
import sys
from pathlib import Path
from tests.sweep.test_study import drawn, runner, start, wanted
folder = Path(sys.argv[1])
runner.run(drawn(folder, wanted()), folder, lambda *a: start(*a, pause=0.02), wait=0.01)
"""


@pytest.mark.journey
def test_killed_again_and_again(tmp_path, command_env, undisturbed):
    """SIGKILLs at whatever it does: no trial is lost or doubled, and the result is the undisturbed one."""
    _, quiet = undisturbed

    def launch():
        return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], env=command_env())

    kills, process = 0, launch()
    while process.poll() is None:
        time.sleep(0.25 + 0.05 * kills)
        if kills < 3 and process.poll() is None and (tmp_path / "study.log").is_file():
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, process = kills + 1, launch()
    assert process.returncode == 0 and kills == 3
    loud = drawn(tmp_path, wanted())
    assert loud.known() == quiet.known() and len(loud.known()) == 8 and loud.best() == quiet.best()
    for trial in loud.known():
        lines = [json.loads(x)["step"] for x in (tmp_path / trial.name / "metrics.jsonl").read_text().splitlines()]
        assert lines == [1, 2, 3, 4, 5] and trials.state(tmp_path / trial.name).word == "finished"


def test_the_best_is_the_nearest(undisturbed):
    _, source = undisturbed
    far = {trial.name: abs(math.log10(trial.overrides["optim.lr"]) + 2) for trial in source.known()}
    best, value = source.best()
    assert far[best.name] == min(far.values()) and value == pytest.approx(min(far.values()) + 1 / 5)
    assert {trial.overrides["model.layers"] for trial in source.known()} == {1, 2}


def test_what_is_behind_is_stopped(tmp_path):
    """ASHA by two: of those at a rung the better half goes on, and what was stopped has made fewer steps."""
    source = drawn(tmp_path, wanted(sampler="random", pruner="asha", reduction=2, trials=6))
    runner.run(source, tmp_path, lambda *a: start(*a, pause=0.05), wait=0.01, say=lambda line: None)
    found = {trial.name: trials.state(tmp_path / trial.name) for trial in source.known()}
    stopped = [state for state in found.values() if state.word == "pruned"]
    assert stopped and all(state.step < 5 for state in stopped) and len(found) == 6
    far = {t.name: abs(math.log10(t.overrides["optim.lr"]) + 2) for t in source.known()}
    assert found[min(far, key=far.get)].word == "finished" and found[max(far, key=far.get)].word == "pruned"


PRUNERS = {
    "asha": ("SuccessiveHalvingPruner", {"min_resource": 1, "reduction_factor": 2}),
    "hyperband": ("HyperbandPruner", {"min_resource": 1, "reduction_factor": 2}),
    "median": ("MedianPruner", {"n_warmup_steps": 1}),
}


@pytest.mark.parametrize("pruner", PRUNERS)
def test_pruners_are_optunas(tmp_path, pruner):
    """One trial after the other: stopped at the same evaluations as in Optuna's own loop."""
    import optuna

    folder = tmp_path / "s"  # its name decides on Hyperband's brackets
    source = drawn(folder, wanted(sampler="random", pruner=pruner, reduction=2, trials=14))
    runner.run(source, folder, Quick, wait=0.0, say=lambda line: None)
    name, settings = PRUNERS[pruner]
    loop = optuna.create_study(study_name=folder.name, pruner=getattr(optuna.pruners, name)(**settings))
    for trial in source.known():
        asked, far = loop.ask(), abs(math.log10(trial.overrides["optim.lr"]) + 2)
        for count in range(1, 6):
            asked.report(far + 1 / count, count)
            if asked.should_prune():
                loop.tell(asked, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            loop.tell(asked, far + 1 / 5)
    ours, theirs = ([(t.state.name, t.intermediate_values, t.value) for t in s.trials] for s in (source._study, loop))
    assert ours == theirs and {state for state, _, _ in ours} == {"PRUNED", "COMPLETE"}
    states = [trials.said(folder / trial.name)[0] for trial in source.known()]
    assert [state == "pruned" for state in states] == [state == "PRUNED" for state, _, _ in ours]


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_killed_between_any_two_writes(tmp_path, monkeypatch):
    """The study comes out the same, wherever between a judgement's first write and its last the launcher dies."""
    from optuna.storages.journal import JournalFileBackend

    small, left = wanted(sampler="random", pruner="asha", reduction=2, trials=4), [0]

    def until_killed(write):
        def counted(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return write(*arguments)

        return counted

    monkeypatch.setattr(JournalFileBackend, "append_logs", until_killed(JournalFileBackend.append_logs))
    monkeypatch.setattr("os.fsync", lambda file: None)  # thousands, each some milliseconds
    monkeypatch.setattr("tfm_jax.sweep.study.write_atomic", until_killed(write_atomic))

    def outcome(folder, *kills):
        for left[0] in (*kills, 0):
            with contextlib.suppress(Killed):
                source = drawn(folder, small)
                runner.run(source, folder, Quick, wait=0.0, say=lambda line: None)
        found = source._study.get_trials(deepcopy=False)
        return [(t.state.name, t.params, t.intermediate_values, t.values, t.system_attrs) for t in found]

    quiet = outcome(tmp_path / "quiet")
    writes = -left[0]
    assert {"PRUNED", "COMPLETE"} == {one[0] for one in quiet} and writes > 20
    for kill in range(1, writes + 1):
        assert outcome(tmp_path / str(kill), kill) == quiet, kill


def test_the_failed_are_tried_again_if_asked(tmp_path):
    """A trial that fails counts once, and its second try is the study's."""

    def failing(trial, run, lock, slot):
        (run / "status.json").write_text(json.dumps({"state": "failed", "reason": "by chance"}))
        return runner.Process(subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"]))

    study, said = wanted(sampler="random", trials=2), []
    runner.run(drawn(tmp_path, study), tmp_path, failing, wait=0.01, say=said.append)
    assert len(said) == 2 and all(": failed at step 0: by chance" in line for line in said)
    runner.run(drawn(tmp_path, study), tmp_path, start, wait=0.01)
    assert drawn(tmp_path, study).best() is None
    again = drawn(tmp_path, study)
    again.retry()
    runner.run(again, tmp_path, start, wait=0.01, say=lambda line: None)
    assert len(again.known()) == 2 and {trials.state(tmp_path / t.name).word for t in again.known()} == {"finished"}
    assert again.best()[0] in again.known()
    # Asked once more, nothing is left to try.
    third = drawn(tmp_path, study)
    third.retry()
    assert {trials.said(tmp_path / t.name)[0] for t in third.known()} == {"finished"} and not third.candidates()


def test_what_is_to_be_tried_again_is_whoever_takes_it_up(tmp_path):
    """The command says so once for all its processes, and may be killed before any of them begins."""
    study = wanted(sampler="random", trials=2)
    source = drawn(tmp_path, study)
    for trial in (source.draw(), source.draw()):
        write_status(tmp_path / trial.name, "failed", "by chance")
        source.ended(trial, trials.state(tmp_path / trial.name))
    assert not source.candidates()
    for retry in (True, True, False):
        source = drawn(tmp_path, study)
        if retry:
            source.retry()
        assert source.candidates() == source.known() and len(source.known()) == 2
        assert {trials.state(tmp_path / t.name)[:2] for t in source.known()} == {
            ("waiting", "it has failed before: by chance")
        }
    runner.run(source, tmp_path, Quick, wait=0.0, say=lambda line: None)
    assert {trials.state(tmp_path / t.name).word for t in source.known()} == {"finished"} and source.best()
    assert [one.state.name for one in source._all()] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_second_try_does_not_compete_with_the_first(tmp_path):
    """ASHA by two: of four trials two go on, though the best of them has been at the rung twice."""
    source = drawn(tmp_path, wanted(sampler="random", pruner="asha", reduction=2, trials=4))

    def evaluates(trial, value):
        line = {"step": 1, "eval/v/loss": value}
        (tmp_path / trial.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return source.should_stop(trial)

    worse, best, worst, good = (source.draw() for _ in range(4))
    assert not evaluates(worse, 2.0) and not evaluates(best, 1.0)
    write_status(tmp_path / best.name, "failed", "by chance")
    source.ended(best, trials.state(tmp_path / best.name))
    source.retry()
    assert not evaluates(best, 1.0) and evaluates(worst, 3.0) and not evaluates(good, 1.5)


def test_one_that_finishes_without_its_metric_has_failed_and_is_no_second_try(tmp_path):
    study = wanted(trials=1)
    source = drawn(tmp_path, study)
    run = tmp_path / source.draw().name
    (run / "metrics.jsonl").write_text('{"step": 1, "eval/v/loss": NaN}\n')
    (run / "status.json").write_text('{"state": "finished"}')
    for retry in (False, True, True):
        source = drawn(tmp_path, study)
        if retry:
            source.retry()
        runner.run(source, tmp_path, start, wait=0.0, say=lambda line: None)
        assert source.best() is None and len(source.known()) == 1 and not (run / "starts").exists()


def test_every_sampler_draws_what_the_space_has(tmp_path):
    """And a grid ends when it is through; two folders that share a database draw for themselves and not the same."""
    for sampler in ("tpe", "cmaes", "random"):
        source = drawn(tmp_path / sampler, wanted(sampler=sampler, trials=3))
        found = [source.draw() for _ in range(4)]
        assert found[3] is None and all(1e-4 <= t.overrides["optim.lr"] <= 1 for t in found[:3])
        assert len({t.overrides["optim.lr"] for t in found[:3]}) == 3
    space = {"optim.lr": choice(0.1, 0.2), "model.block": choice({"a": 1}, {"a": 2})}
    grid = drawn(tmp_path / "grid", wanted(space=space, sampler="grid", trials=9))
    found = []
    while (trial := grid.draw()) is not None:
        found.append(trial)
        grid.ended(trial, trials.State("failed"))
    assert len(found) == 4 == len({repr(trial.overrides) for trial in found})
    url, (a, b) = f"sqlite:///{tmp_path}/study.db", (tmp_path / "a" / "s", tmp_path / "b" / "s")
    here, there = (Drawn(wanted(sampler="random", trials=3), folder, storage=url) for folder in (a, b))
    first, second = here.draw(), there.draw()
    assert first.overrides != second.overrides
    assert here.candidates() == [first] and there.candidates() == [second] and here.known() == [first, second]


def test_long_names(tmp_path):
    """A trial of many keys is found again by its number."""
    space = {"optim.lr": log_uniform(1e-4, 1.0), **{f"model.{'k' * 30}{i}": uniform(0.0, 1.0) for i in range(8)}}
    for _ in range(2):
        source = drawn(tmp_path, wanted(space=space, sampler="random", trials=2))
        runner.run(source, tmp_path, Quick, wait=0.0, say=lambda line: None)
    assert [len(trial.name) for trial in source.known()] == [255] * 2 and source.best()[0] in source.known()


def test_machines_that_draw_at_the_same_moment(tmp_path):
    """What is more than asked for, or twice in a grid, is given up by the one that was later; nobody counts it."""
    url = f"sqlite:///{tmp_path}/study.db"
    cells = {"optim.lr": choice(0.1, 0.2)}
    for name, study, cell in (("s", wanted(trials=1), None), ("g", wanted(space=cells, sampler="grid"), 2)):
        here, there = (Drawn(study, tmp_path / place / name, storage=url) for place in "ab")
        added, first = here._added, []

        def later(before, there=there, first=first, added=added):
            if not first:
                first.append(there.draw())
            return added(before)

        here._added = later
        drawn_here = here.draw()
        assert here.known() == there.known() == [*first, *([drawn_here] if cell else [])]
        assert drawn_here is None if cell is None else drawn_here.overrides != first[0].overrides
        assert here.draw() is None and there.draw() is None and there.candidates() == first
        assert [one.state.name for one in here._all()][1] == "FAIL"
        assert len(list(tmp_path.glob(f"*/{name}/*/trial.json"))) == len(here.known())


def test_one_that_another_command_draws_while_candidates_are_looked_for(tmp_path):
    study = wanted(sampler="random", trials=3)
    source, other = drawn(tmp_path, study), drawn(tmp_path, study)
    found = [source.draw()]
    counted = source._counted
    source._counted = lambda: (found.append(other.draw()), counted())[1]
    assert source.candidates() == found and len(found) == 2


def test_a_database_has_one_study_of_a_name(tmp_path):
    """The same study from a folder that was moved finds its trials; another one of that name is refused."""
    url, folder = f"sqlite:///{tmp_path}/study.db", tmp_path / "a" / "s"
    mine = Drawn(wanted(), folder, storage=url).draw()
    folder.parent.rename(tmp_path / "moved")
    assert Drawn(wanted(trials=9), tmp_path / "moved" / "s", storage=url).candidates() == [mine]
    with says("The study 's' of that storage belongs to another sweep:\n  seed: 0 -> 1\nUse another --workdir."):
        Drawn(wanted(seed=1), tmp_path / "b" / "s", storage=url)


def test_bad_studies(tmp_path):
    with says("sweep: the space is empty."):
        wanted(space={})
    with says("sweep: sampler='tbe' does not exist. Did you mean 'tpe'?"):
        wanted(sampler="tbe")
    with says("sweep: optim.lr is in the space and fixed."):
        wanted(fixed={"optim.lr": 1})
    with says("sweep: nothing lies between 2 and 1."):
        uniform(2, 1)
    with says("sweep: sampler='grid' needs a choice for each key."):
        wanted(sampler="grid")
    with pytest.raises(UserError, match=r"^--storage=sqlite:////nowhere/a\.db cannot be opened: "):
        Drawn(wanted(), tmp_path, storage="sqlite:////nowhere/a.db")


@pytest.mark.parametrize(
    ("metric", "nearest"), [("eval/v/los", "eval/v/loss"), ("evl/v/loss", "eval/v/loss"), ("eval/w/los", "eval/v/loss")]
)
def test_a_metric_that_no_trial_logs(tmp_path, metric, nearest):
    """Found in the first trial: at its first evaluation, or at its end where it might be another evaluator's."""
    source = drawn(tmp_path, wanted(metric=metric, trials=2))
    with says(f"sweep: no trial logs metric={metric!r}. Did you mean {nearest!r}?"):
        runner.run(source, tmp_path, Quick, wait=0.0, say=lambda line: None)
    assert len(source.known()) == 1
    assert len(read_metrics(tmp_path / source.known()[0].name)) == (5 if metric.startswith("eval/w") else 2)


@pytest.mark.parametrize("moment", ["open", "known", "retry"])
def test_a_database_that_has_gone_away_before_anything_runs(tmp_path, monkeypatch, moment):
    (tmp_path / "db").mkdir()
    url, opened = f"sqlite:///{tmp_path}/db/study.db", terms.storage

    def goes_away(storage):
        storage.engine.dispose()
        (tmp_path / "db").rename(tmp_path / "gone")
        return storage

    with pytest.raises(UserError, match=rf"^--storage={re.escape(url)} has gone away: OperationalError: "):
        if moment == "open":
            monkeypatch.setattr(terms, "storage", lambda *arguments: goes_away(opened(*arguments)))
            Drawn(wanted(), tmp_path / "s", storage=url)
        source = Drawn(wanted(), tmp_path / "s", storage=url)
        goes_away(source._study._storage._backend)
        getattr(source, moment)()


def test_a_driver_that_says_nothing(tmp_path, monkeypatch):
    def silent(url):
        raise ValueError

    monkeypatch.setattr(terms, "AGAIN_S", 0.0)
    monkeypatch.setattr("optuna.storages.RDBStorage", silent)
    with says("--storage=x://y cannot be opened: ValueError: "):
        Drawn(wanted(), tmp_path, storage="x://y")


def test_one_that_was_behind_only_in_the_end_may_be_the_best(tmp_path):
    """The pruner tells what goes on, not what has come of it: the table ranks by the last values too."""
    source = drawn(tmp_path, wanted(sampler="random", pruner="asha", reduction=2, trials=2))
    first, second = source.draw(), source.draw()
    for trial, values in ((first, (1.0, 0.9)), (second, (5.0, 0.1))):
        lines = [{"step": step, "eval/v/loss": value} for step, value in enumerate(values, 1)]
        (tmp_path / trial.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_status(tmp_path / trial.name, "finished")
        source.ended(trial, trials.state(tmp_path / trial.name))
    assert [one.state.name for one in source._all()] == ["COMPLETE", "PRUNED"]
    assert source.best() == (second, 0.1)


def test_a_database_that_goes_away(tmp_path):
    """What runs ends by itself, and then it is said; one that has come back knows all that happened meanwhile."""
    (tmp_path / "db").mkdir()
    url = f"sqlite:///{tmp_path}/db/study.db"
    source, gone, said = Drawn(wanted(trials=3), tmp_path / "s", storage=url), tmp_path / "gone", []

    class Interrupting(Quick):
        def poll(self):
            if len(read_metrics(self._path.parent)) == 2:
                source._study._storage._backend.engine.dispose()
                (tmp_path / "db").rename(gone)
            return super().poll()

    runner.run(source, tmp_path / "s", Interrupting, wait=0.0, say=said.append)
    assert len(said) == 1 and "finished at step 5" in said[0] and source.best() is None
    assert re.fullmatch(
        rf"--storage={re.escape(url)} has gone away: OperationalError: .*unable to open database file"
        r"\. What ran has ended; the same command goes on\.",
        str(source.lost),
    )
    gone.rename(tmp_path / "db")
    runner.run(source, tmp_path / "s", Quick, wait=0.0, say=said.append)
    assert source.lost is None and [one.state.name for one in source._all()] == ["COMPLETE"] * 3 and len(said) == 3

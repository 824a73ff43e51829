"""The page of a sweep in a real browser, and what stands in it."""

import contextlib
import itertools
import json
import math
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.reproduce import report as reproduce
from tests.errors import says
from tests.sweep.runs import write_sweep
from tfm_jax.errors import UserError
from tfm_jax.files import write_status
from tfm_jax.metrics import goal_of
from tfm_jax.sweep import content, results, trials
from tfm_jax.sweep.importance import importances
from tfm_jax.sweep.page import page

METRIC = "eval/validation/loss"
BEST = "lr=0.004,seed=0"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "rates")
    # Wider than a phone.
    found = {"step": 40, "results": {f"eval/{name}/exact_match": 0.5 for name in ("one", "two", "three", "four")}}
    (folder / BEST / "evaluations.jsonl").write_text(json.dumps(found) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(sweep):
    """The page of 16 runs, and what the command said of it."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **k: said.append(" ".join(map(str, a))))
        began = time.process_time()
        assert report.main([str(sweep), "--json"]) == 0
    # Of this process: what else the machine does is not the report's.
    return json.loads(said[-1]) | {"seconds": time.process_time() - began}


def test_size_and_best(made, sweep):
    assert made["runs"] == 16 and made["best"] == BEST
    assert made[METRIC] == pytest.approx(2 + 2 * np.exp(-40 / 9))
    assert made["bytes"] < 5e6 and made["seconds"] < 10
    assert [path.rpartition("/")[2] for path in made["pictures"]] == ["curves.png", "response.png"]


def test_what_differs(sweep):
    runs = results.read_all([sweep])
    # `data.seed` follows `train.seed`; places of caches and how often is logged say nothing.
    assert results.differing(runs) == ["data.seed", "optim.lr"]
    shares = importances(runs, ["data.seed", "optim.lr"], METRIC)
    assert sum(shares.values()) <= 1 + 1e-9 and shares["optim.lr"] > 0.9
    assert importances(runs[:3], ["optim.lr"], METRIC) == {}
    assert (
        goal_of(METRIC) == "lower"
        and goal_of("eval/validation/accuracy") == goal_of("eval/test/bleu_lowercase") == "higher"
    )
    assert goal_of("eval/validation/examples") is None and goal_of("tokens_per_s") == "higher"
    assert results.ranked(runs, METRIC, "higher")[0].name == "lr=0.128,seed=1"


def table(value, **axes):
    """Finished runs at each point of some axes."""
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    return [
        results.Run(str(i), Path(str(i)), point, "finished", lines=[{"step": 1, METRIC: value(**point)}])
        for i, point in enumerate(points)
    ]


def test_importance_where_it_is_known():
    """Of a sum of effects each one's share of the variance, over the logarithm of a rate; of an interaction alone, nothing."""
    rates, widths = [10.0**-i for i in range(8)], [float(i) for i in range(8)]
    runs = table(lambda lr, width: 2 * math.log10(lr) + 0.5 * width, lr=rates, width=widths)
    shares = importances(runs, ["lr", "width"], METRIC)
    assert shares["lr"] == pytest.approx(16 / 17, abs=0.02) and shares["width"] == pytest.approx(1 / 17, abs=0.02)
    signs = [-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0]
    shares = importances(table(lambda a, b: a * b, a=signs, b=signs), ["a", "b"], METRIC)
    assert sum(shares.values()) < 0.5


def test_words_of_a_status_are_words():
    (run,) = table(lambda lr: lr, lr=[1.0])
    (run,) = [replace(run, state="<script>alert(1)</script>", reason="<b>")]
    assert "<script>alert" not in page(content.Report("<i>", [run], [], METRIC, "lower", {}))


def test_losses_of_other_tokens_are_not_compared():
    lines = [{"step": 1, "eval/validation/loss": 1.0, "eval/validation/bits_per_byte": 2.0}]
    runs = [replace(run, lines=lines) for run in table(lambda lr: lr, lr=[1.0, 2.0])]
    assert results.deciding(runs, None) == "eval/validation/loss"
    runs = [replace(run, config={"data.tokenizer": name}) for run, name in zip(runs, ("bytes", "chars"), strict=True)]
    assert results.deciding(runs, None) == "eval/validation/bits_per_byte"


def test_who_has_not_finished_is_not_the_best():
    runs = table(lambda lr: lr, lr=[3.0, 1.0, 2.0, 4.0, 5.0])
    runs[1] = replace(runs[1], state="running")
    runs[2] = replace(runs[2], state="failed")
    assert [run.name for run in results.ranked(runs, METRIC, "lower")] == ["0", "3", "4", "1", "2"]
    assert importances(runs, ["lr"], METRIC) == {}


def test_a_study_says_what_its_trials_are_compared_by(tmp_path, capsys):
    """Its metric and direction, unless somebody asks for others."""
    folder = write_sweep(tmp_path / "study", rates=3, seeds=1)
    trials.open_folder(folder, {"metric": "perf/tokens_per_sec", "direction": "minimize"})
    runs = results.read_all([folder])
    assert results.judged(runs, None, None) == ("perf/tokens_per_sec", "lower")
    assert results.judged(runs, None, "higher") == ("perf/tokens_per_sec", "higher")
    assert results.judged(runs, METRIC, None) == (METRIC, None)
    trials.open_folder(folder.parent, {"metric": None, "direction": "minimize"})
    assert results.judged([replace(run, path=folder) for run in runs], None, None) == (None, None)
    for name, speed in (("lr=0.001,seed=0", 3.0), ("lr=0.002,seed=0", 1.0), ("lr=0.004,seed=0", 2.0)):
        with (folder / name / "metrics.jsonl").open("a") as out:
            out.write(json.dumps({"step": 41, "perf/tokens_per_sec": speed}) + "\n")
    assert report.main([str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["best"] == "lr=0.002,seed=0" and said["perf/tokens_per_sec"] == 1.0


def test_what_was_pruned_is_not_compared(tmp_path, capsys):
    """It stands where it was stopped, here lower than any other, is not the best, and explains nothing."""
    folder = write_sweep(tmp_path / "study", rates=5, seeds=1)
    stopped = folder / "lr=0.016,seed=0"
    with (stopped / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 41, METRIC: 0.5}) + "\n")
    write_status(stopped, "running")
    (stopped / "pruned").write_text("behind")
    runs = results.read_all([folder])
    ranked = results.ranked(runs, METRIC, "lower")
    assert (ranked[0].name, ranked[-1].name) == (BEST, "lr=0.016,seed=0")
    # Four others are enough, three are not.
    assert importances(runs, ["optim.lr"], METRIC) == pytest.approx({"optim.lr": 1.0})
    assert importances([run for run in runs if run.name != BEST], ["optim.lr"], METRIC) == {}
    assert report.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best"] == BEST
    text = (folder / "report" / "index.html").read_text()
    assert "Grey and hollow: pruned" in text and '"label":{"type":"value","value":"pruned"}' in text


def test_evaluations_since(tmp_path):
    """A row for each checkpoint and way of evaluating it; several evaluators and a second time are the same row."""
    folder = write_sweep(tmp_path / "rates", rates=2, seeds=1)
    plain = {"step": 40, "average": 1, "decay": 1.0, "overrides": {}}
    records = [
        plain | {"results": {"eval/a/loss": 9.0, "eval/a/tokens": 77.0}},
        plain | {"results": {"eval/b/loss": 2.5}},
        plain | {"results": {"eval/a/loss": 1.25}},
        plain | {"step": 30, "average": 2, "decay": 0.5, "overrides": {"data.source": "<x>"}, "results": {"eval/a/loss": 3.0}},
    ]  # fmt: skip
    with (folder / "lr=0.001,seed=0" / "evaluations.jsonl").open("w") as out:
        out.write("".join(json.dumps(record) + "\n" for record in records) + '{"step": 40, "resu')
    assert report.main([str(folder)]) == 0
    text = (folder / "report" / "index.html").read_text()
    section = text[text.index('<section id="evaluations">') :].partition("</section>")[0]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", section)]
    assert rows == [
        ["run", "step", "with", "eval/a/loss", "eval/b/loss"],
        ["lr=0.001,seed=0", "40", "", "1.25", "2.5"],
        ["lr=0.001,seed=0", "30", "average=2, decay=0.5, data.source=&lt;x&gt;", "3", ""],
    ]


def test_damaged_and_missing(sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(sweep / BEST)
    few = tmp_path / "few"
    for name in (BEST, "lr=0.001,seed=1", "lr=0.002,seed=0", "lr=0.016,seed=0"):
        shutil.copytree(sweep / name, few / name)
    (few / "lr=0.001,seed=1" / "config.json").write_text("{")
    with (few / BEST / "metrics.jsonl").open("a") as cut:
        cut.write('{"step": 41, "eval/valid')
    (few / "lr=0.002,seed=0" / "status.json").write_text('{"state": "running", "reason": ""}')
    (few / "lr=0.002,seed=0" / "failed").write_text("exit code 1")
    write_status(few / "lr=0.016,seed=0", "running")
    (few / "lr=0.016,seed=0" / "pruned").write_text("too slow")
    assert report.main([str(few), "--json", f"--to={tmp_path}/page"]) == 0
    out = capsys.readouterr().out
    assert (
        "lr=0.001,seed=1 is damaged: ValueError: config.json: " in out
        and json.loads(out.splitlines()[-1])["best"] == BEST
    )
    text = (tmp_path / "page" / "index.html").read_text()
    assert "1 damaged, 1 failed, 1 finished, 1 pruned" in text
    # What a study has pruned is folded away.
    shown, _, folded = text[text.index("<ul>") :].partition("<details><summary>1 pruned before their end</summary>")
    assert "exit code 1" in shown and "too slow" not in shown and "too slow" in folded
    with says(f"No run has logged eval/validation/los; --metric names another. Did you mean '{METRIC}'?"):
        report.main([str(few), "--metric=eval/validation/los"])
    with says(f"{tmp_path}/page is no run, and there is none below it: no folder there has a config.json."):
        report.main([f"{tmp_path}/page"])
    monkeypatch.chdir(tmp_path)
    with says("page is no run, and there is none below it: no folder there has a config.json. Valid: few."):
        report.main(["page"])
    with says(f"There is no folder {tmp_path}/feww. Did you mean '{tmp_path}/few'?"):
        report.main([f"{tmp_path}/feww"])


@pytest.fixture(scope="module")
def browser():
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(reproduce.browser())
        except UserError as error:
            pytest.skip(str(error))
        yield opened


def wait_for(browser, script, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return found


# Bokeh draws inside shadow roots, which selectors do not enter.
DEEP = """
window.deep = (selector, root = document) => {
  const found = [...root.querySelectorAll(selector)];
  for (const one of root.querySelectorAll('*')) if (one.shadowRoot) found.push(...window.deep(selector, one.shadowRoot));
  return found;
};
window.source = () => [...Bokeh.documents[0]._all_models.values()].find(m => m.type == 'ColumnDataSource' && 'run' in m.data);
window.plot = title => Bokeh.index.roots.find(v => v.model.title && v.model.title.text.startsWith(title));
window.spot = (title, x, y) => {
  const view = window.plot(title), box = view.canvas_view.el.getBoundingClientRect();
  return [box.x + view.frame.x_scale.compute(x), box.y + view.frame.y_scale.compute(y)];
};
"""


def test_in_a_browser(made, sweep, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    def point_at(title, x, y, *, click):
        browser.execute_script("window.plot(arguments[0]).el.scrollIntoView({block: 'center'})", title)
        left, top = browser.execute_script("return window.spot(...arguments)", title, x, y)
        actions = ActionChains(browser, duration=0)
        mouse = actions.w3c_actions.pointer_action
        assert isinstance(mouse.source, PointerInput)
        mouse.move_to_location(round(left) - 3, round(top))
        mouse.move_to_location(round(left), round(top))
        if click:
            mouse.click()
        actions.perform()

    browser.get((sweep / "report" / "index.html").as_uri())
    wait_for(browser, "window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
    browser.execute_script(DEEP)
    # Sort: the best comes first, then after two clicks on the column of settings the highest rate.
    rows = "return window.deep('.slick-row').map(r => [parseFloat(r.style.top || r.offsetTop), r.innerText.split('\\n')[0]]).sort((a, b) => a[0] - b[0]).map(p => p[1])"
    assert browser.execute_script(rows)[0] == BEST
    for wanted in ("lr=0.001,seed=", "lr=0.128,seed="):
        browser.execute_script("window.deep('.slick-header-column').find(h => h.innerText.trim() == 'lr').click()")
        assert browser.execute_script(rows)[0].startswith(wanted)
    # Of a setting its own digits, of what decides four decimals, and that first.
    worst = (
        "window.deep('.slick-row').find(r => r.innerText.startsWith('lr=0.128,seed=1')).querySelectorAll('.slick-cell')"
    )
    cells = browser.execute_script(f"return [...{worst}].map(c => c.innerText)")
    assert cells[:4] == ["lr=0.128,seed=1", "finished", "40", "4.5335"] and sorted(cells[4:6]) == ["0.128", "1"]
    # Select: a click on the table's first row selects that run everywhere, here the worst one.
    browser.execute_script(
        "window.deep('.slick-row').find(r => r.innerText.startsWith('lr=0.128,seed=1')).querySelector('.slick-cell').click()"
    )
    chosen = wait_for(
        browser,
        "window.source().selected.indices.length && window.source().selected.indices.map(i => window.source().data.run[i])",
    )
    assert chosen == ["lr=0.128,seed=1"]
    # And a click on the best run's point in the response curve selects that one.
    found = results.ranked(results.read_all([sweep]), METRIC, "lower")
    by_name = {run.name: run for run in found}
    other = by_name["lr=0.008,seed=1"]
    point_at(f"{METRIC} over lr", other.config["optim.lr"], other.value(METRIC), click=True)
    wait_for(browser, "window.source().selected.indices.some(i => window.source().data.run[i] == 'lr=0.008,seed=1')")
    # Hover: the pointer on a point of a curve says which run it is.
    best = by_name[BEST]
    point_at(METRIC, 10, best.series(METRIC)[1][0], click=False)
    leaves = "window.deep('div, span').filter(e => !e.children.length && !e.closest('.slick-cell'))"
    wait_for(browser, f"{leaves}.some(e => e.textContent.trim() == '{BEST}')")
    # A phone: nothing is wider than its screen.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    wait_for(browser, "document.documentElement.scrollWidth <= 390 && Bokeh.documents[0].is_idle")
    # And what decides is on it.
    assert browser.execute_script(f"return {worst}[3].getBoundingClientRect().right") <= 390
    # Nothing has been asked of a network.
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert problems == []

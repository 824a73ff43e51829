"""The page of a report, by Bokeh: one HTML file that needs no network.

One table of columns (a row a run) lies behind all figures and the table itself, so that what is selected in one is in all.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from tfm_jax.errors import UserError
from tfm_jax.sweep.content import Report, curves, shown
from tfm_jax.sweep.results import Run, ranked
from tfm_jax.sweep.space import short_names
from tfm_jax.train.log import asked_with
from tfm_jax.units import counted


def page(report: Report) -> str:
    """The whole HTML.

    Raises:
      UserError: Bokeh is not installed.
    """
    try:
        from bokeh.embed import components
        from bokeh.resources import Resources
    except ImportError:
        raise UserError("A report needs Bokeh: pip install 'tfm_jax[report]'.") from None
    from tfm_jax.sweep.figures import Figures  # needs Bokeh

    figures = Figures(report)
    sections: dict[str, list[tuple[str, Any]]] = {"Runs": [("wide", figures.table())]}
    drawn = [("", figures.curve(name)) for name in curves(report.runs)]
    if drawn:
        sections["Curves"] = drawn
    if report.keys:
        sections["Settings"] = [
            ("wide", figures.parallel()),
            *([("", figures.importance())] if report.importance else []),
            *(("", figures.response(key)) for key in report.keys),
        ]
    if report.maps:
        sections["Attention"] = [("", figures.heat(one)) for one in report.maps]
    models = {f"{name}-{i}": model for name, parts in sections.items() for i, (_, model) in enumerate(parts)}
    script, divs = components(models)
    bodies = {
        name: f'<div class="grid">{"".join(_cell(kind, divs[f"{name}-{i}"]) for i, (kind, _) in enumerate(parts))}</div>'
        for name, parts in sections.items()
    }
    bodies["Runs"] += _printed(report)
    if "Settings" in bodies and any(run.pruned for run in report.runs):
        bodies["Settings"] = f'<p class="note">{_WITHOUT}</p>{bodies["Settings"]}'
    if evaluations := _evaluations(report):
        bodies["Evaluations"] = evaluations
    if report.samples:
        bodies["Samples"] = "".join(
            f"<figure><figcaption>{html.escape(prompt) or '(a new document)'}</figcaption>"
            f"<pre>{html.escape(text)}</pre></figure>"
            for prompt, text in report.samples
        )
    bodies["Config"] = _config(report)
    order = [n for n in ("Runs", "Curves", "Settings", "Evaluations", "Samples", "Attention", "Config") if n in bodies]
    navigation = " ".join(f'<a href="#{name.lower()}">{name}</a>' for name in order)
    of_one = {"Samples", "Attention"} if len(report.runs) > 1 else set()
    body = "".join(
        f'<section id="{n.lower()}"><h2>{n}{f" of {html.escape(report.chosen)}" if n in of_one else ""}</h2>{bodies[n]}</section>'
        for n in order
    )
    library = Resources(mode="inline", components=["bokeh", "bokeh-widgets", "bokeh-tables"]).render()
    return _PAGE.format(
        title=html.escape(report.title),
        navigation=navigation,
        summary=_summary(report),
        body=body,
        head=library,
        script=script,
    )


def _cell(kind: str, div: str) -> str:
    return f'<div class="cell {kind}">{div}</div>'


def _summary(report: Report) -> str:
    """What there is, and which run is best, in a sentence each."""
    counts: dict[str, int] = {}
    for run in report.runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    best = ranked(report.runs, report.metric, report.goal)[0]
    value, names = best.value(report.metric), short_names(report.keys)
    said = ", ".join(f"{names[key]} {shown(best.config.get(key))}" for key in report.keys)
    which = "" if len(report.runs) == 1 else f" of {best.name}" + (f" ({said})" if said and said != best.name else "")
    found = (
        "" if value is None else f" <strong>{html.escape(report.metric)} {shown(value)}</strong>{html.escape(which)}."
    )
    return f"{counted(len(report.runs), 'run')}: {html.escape(states)}.{found}"


def _table(kind: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(shown(cell))}</{tag}>" for cell in row) + "</tr>"

    return f'<table class="{kind}">{cells("th", head)}{"".join(cells("td", row) for row in rows)}</table>'


def _printed(report: Report) -> str:
    """The table as text, for paper and for readers without scripts, and what became of runs that did not finish."""
    names = short_names(report.keys)
    rows = (
        (run.name, run.state, run.step, run.value(report.metric), *(run.config.get(k) for k in report.keys))
        for run in ranked(report.runs, report.metric, report.goal)
    )
    table = _table("paper", ["run", "state", "step", report.metric, *names.values()], rows)
    pruned = [run for run in report.runs if run.pruned]
    # That a study prunes is its purpose, and hides no failure.
    others = [run for run in report.runs if run.reason and run not in pruned]
    folded = f"<details><summary>{len(pruned)} pruned before their end</summary>{_reasons(pruned)}</details>"
    return table + (_reasons(others) if others else "") + (folded if pruned else "")


def _reasons(runs: Sequence[Run]) -> str:
    said = ((html.escape(text) for text in (run.name, run.state, run.reason)) for run in runs)
    return f"<ul>{''.join(f'<li><b>{name}</b> {state}: {reason}</li>' for name, state, reason in said)}</ul>"


def _evaluations(report: Report) -> str:
    """What `evaluate` has found, a row for each checkpoint and each way in which it was evaluated; nothing if there is nothing."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for run in ranked(report.runs, report.metric, report.goal):
        for one in run.evaluations:
            found.setdefault((run.name, one["step"], asked_with(one)), {}).update(one.get("results", {}))
    names = sorted({n for values in found.values() for n in values if not n.endswith(("/tokens", "/examples"))})
    rows = ((*key, *(values.get(name) for name in names)) for key, values in found.items())
    return f'<div class="scroll">{_table("", ["run", "step", "with", *names], rows)}</div>' if found else ""


def _config(report: Report) -> str:
    """The settings that all runs share, or all of a single run's."""
    known = [run.config for run in report.runs if run.config]
    same = {k: v for k, v in (known[0] if known else {}).items() if all(repr(c.get(k)) == repr(v) for c in known)}
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(shown(value))}</td></tr>"
        for key, value in sorted(same.items())
    )
    title = "All settings" if len(known) == 1 else f"The {len(same)} settings that all runs share"
    return f'<details{" open" if len(known) == 1 else ""}><summary>{title}</summary><table class="config">{rows}</table></details>'


_WITHOUT = (
    "Grey and hollow: pruned, with what they had come to when they were stopped. They count neither for the best run nor for the"
    " importance of settings."
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 0 1rem 3rem; max-width: 76rem; }}
h1 {{ font-size: 1.5rem; margin: 1.2rem 0 .2rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }}
nav {{ position: sticky; top: 0; background: #fff; padding: .4rem 0; z-index: 9; }}
nav a {{ margin-right: 1rem; color: #2a5d84; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }}
.cell {{ min-width: 0; }}
.scroll {{ overflow-x: auto; }}
.scroll td, .scroll th {{ overflow-wrap: normal; }}
.wide {{ grid-column: 1 / -1; }}
.note, figcaption {{ color: #555; }}
figure {{ margin: 0 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8rem; margin: .2rem 0; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
td, th {{ text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #eee; overflow-wrap: anywhere; }}
.paper {{ display: none; }}
@media print {{
  body {{ font-size: 11px; padding: 0; max-width: none; }}
  nav {{ display: none; }}
  #runs .grid {{ display: none; }}
  .paper {{ display: table; width: 100%; }}
  .grid {{ display: block; }}
  .cell, figure, tr {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
}}
</style>{head}</head><body>
<h1>{title}</h1><p class="note">{summary}</p><nav>{navigation}</nav>
{body}
{script}</body></html>
"""

"""The figures of a report's page; Bokeh is here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    CDSView,
    CellFormatter,
    ColorBar,
    ColumnDataSource,
    DataTable,
    FactorRange,
    FixedTicker,
    HoverTool,
    HTMLTemplateFormatter,
    IndexFilter,
    LinearColorMapper,
    NumberFormatter,
    TableColumn,
)
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from tfm_jax.sweep import content
from tfm_jax.sweep.content import Map, Report, finite, scale, shown
from tfm_jax.sweep.results import metrics, ranked
from tfm_jax.sweep.space import short_names

TOOLS = "tap,box_zoom,pan,reset,save"
DIM = {"nonselection_alpha": 0.08, "selection_alpha": 1.0}
STAR = "#d62728"
# A number's own digits, as a run's name has them, from 3e-7 to 1000000: numbro, of `NumberFormatter`, has no exponents.
NUMBER = (
    '<span style="display: block; text-align: right">'
    '<%= value != value ? "" : value % 1 ? Number(value.toPrecision(6)) : value %></span>'
)


class Figures:
    """Figures over one table of columns, a row a run, the best first."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.runs = ranked(report.runs, report.metric, report.goal)
        self.names = short_names(report.keys)
        columns: dict[str, list[Any]] = {
            "run": [run.name for run in self.runs],
            "state": [run.state for run in self.runs],
            "step": [run.step for run in self.runs],
        }
        self.kinds = dict[str, str]()
        for key in report.keys:
            self.kinds[key] = kind = scale([run.config.get(key) for run in self.runs if run.config])
            # Of a run that cannot be read nothing is known.
            values = [run.config.get(key) if run.config else math.nan for run in self.runs]
            columns[key] = values if kind != "category" else [shown(v) if v == v else "" for v in values]
        for name in self._columns():
            columns[name] = [finite(run.value(name)) for run in self.runs]
        for name in content.curves(self.runs):
            series = [run.series(name) for run in self.runs]
            columns[f"x {name}"] = [content.thinned(x) for x, _ in series]
            columns[f"y {name}"] = [content.thinned(y) for _, y in series]
        whole = [run for run in self.runs if not run.pruned]
        # Dark is good; alone, a run is not pale.
        places = iter(np.linspace(0, 210, len(whole)).astype(int))
        columns["color"] = [content.GREY if run.pruned else Viridis256[next(places)] for run in self.runs]
        self.source = ColumnDataSource(columns)

    def _columns(self) -> list[str]:
        """Metrics in the table: the deciding one, other scores, the loss, and how fast."""
        known = metrics(self.runs)
        scores = [n for n in known if n.startswith("eval/") and not n.endswith(("/tokens", "/examples"))]
        fast = [n for n in known if n.endswith("_per_sec") and not n.endswith(content.HIDDEN)]
        extra = [n for n in ("train/loss", *fast, "perf/data_wait_frac", "train_seconds") if n in known]
        return list(dict.fromkeys([self.report.metric, *scores, *extra]))

    def _said(self) -> list[tuple[str, str]]:
        """What is said of a run when the pointer is on it."""
        settings = [(self.names[key], f"@{{{key}}}") for key in self.report.keys]
        return [("run", "@run"), *settings, (self.report.metric, f"@{{{self.report.metric}}}{{0.0000}}")]

    def _hover(self, *more: tuple[str, str], **settings: Any) -> HoverTool:
        return HoverTool(tooltips=[*self._said(), *more], **settings)

    def table(self) -> DataTable:
        """What decides comes first, so that a phone shows it."""

        def column(field: str, title: str, width: int) -> TableColumn:
            return TableColumn(field=field, title=title, width=width, formatter=self._form(field))

        longest = max(len(run.name) for run in self.runs)
        metric, *others = self._columns()
        columns = [
            column("run", "run", min(24 + 7 * longest, 130)),
            column("state", "state", 60),
            column("step", "step", 44),
            column(metric, metric.removeprefix("eval/"), 94),
            *(column(key, self.names[key], max(76, 24 + 6 * len(self.names[key]))) for key in self.report.keys),
            *(column(name, name, max(70, 24 + 6 * len(name))) for name in others),
        ]
        height = 25 * (min(len(self.runs), content.ROWS) + 1) + 22
        return DataTable(
            source=self.source, columns=columns, index_position=None, height=height, autosize_mode="none",
            sizing_mode="stretch_width", reorderable=False,
        )  # fmt: skip

    def _form(self, field: str) -> CellFormatter:
        """How a column's cells are written; they are sorted by their values."""
        values = self.source.data[field]
        known = [v for v in values if v == v]
        if scale(list(values)) == "category":
            # The whole of it, where the column is too narrow.
            return HTMLTemplateFormatter(template='<span title="<%- value %>"><%- value %></span>')
        if field in self.report.keys or max(map(abs, known), default=1) < 0.1:
            return HTMLTemplateFormatter(template=NUMBER)
        whole = all(float(v).is_integer() for v in known)
        return NumberFormatter(
            format="0" if whole else "0,0" if min(map(abs, known)) >= 1000 else "0.0000", text_align="right"
        )

    def _figure(self, title: str, *, height: int = 300, **settings: Any) -> Any:
        made = figure(title=title, height=height, sizing_mode="stretch_width", tools=TOOLS, **settings)
        made.toolbar.logo = None
        made.toolbar.autohide = True
        made.title.text_font_size = "14px"
        return made

    def curve(self, name: str) -> Any:
        values = [v for run in self.runs for v in run.series(name)[1]]
        positive = bool(values) and min(values) > 0
        made = self._figure(
            name, x_axis_label="step", y_axis_type="log" if positive and name == "train/grad_norm" else "linear"
        )
        made.multi_line(
            f"x {name}", f"y {name}", source=self.source, line_color="color", line_width=1.8,
            selection_line_width=3, **DIM,
        )  # fmt: skip
        single = [(run, run.series(name)) for run in self.runs if len(run.series(name)[0]) == 1]
        if single:
            made.scatter([x[0] for _, (x, _) in single], [y[0] for _, (_, y) in single], color="grey")
        made.add_tools(self._hover(("step", "$x{0}"), (name, "$y{0.0000}"), line_policy="nearest"))
        return made

    def _views(self) -> list[tuple[bool, CDSView]]:
        """The pruned runs, if there are any, and on top of them the others."""
        kinds = sorted({run.pruned for run in self.runs}, reverse=True)
        of = {kind: [i for i, run in enumerate(self.runs) if run.pruned == kind] for kind in kinds}
        return [(kind, CDSView(filter=IndexFilter(rows))) for kind, rows in of.items()]

    def response(self, key: str) -> Any:
        """The deciding metric over a setting; the line joins the best of each value, the star is the best of all.

        Of whole runs: what was pruned is hollow."""
        metric = self.report.metric
        runs = [run for run in self.runs if run.config and run.value(metric) is not None]
        # As its column is, which also has runs without the metric.
        values, kind = [run.config.get(key) for run in runs], self.kinds[key]
        settings: dict[str, Any] = {"x_axis_type": kind}
        if kind == "category":
            settings = {"x_range": FactorRange(*dict.fromkeys(sorted(shown(v) for v in values)))}
        made = self._figure(f"{metric} over {self.names[key]}", x_axis_label=key, **settings)
        best: dict[Any, float] = {}
        whole = [(value, run) for value, run in zip(values, runs, strict=True) if not run.pruned]
        for value, run in whole:
            # Runs come best first.
            best.setdefault(value if kind != "category" else shown(value), finite(run.value(metric)))
        line = sorted(best.items())
        made.line([x for x, _ in line], [y for _, y in line], color="#888", line_dash="dotted")
        points = []
        for pruned, view in self._views():
            look: dict[str, Any] = {"fill_color": "color", "line_color": "white"}
            if pruned:
                look = {"fill_color": None, "line_color": "color", "legend_label": "pruned"}
            points.append(made.scatter(key, metric, source=self.source, view=view, size=9, **look, **DIM))
        if whole:
            value, run = whole[0]
            first = value if kind != "category" else shown(value)
            made.scatter([first], [finite(run.value(metric))], marker="star", size=18, color=STAR, level="overlay")
        made.add_tools(self._hover(renderers=points))
        return made

    def parallel(self) -> Any:
        """Every run as a line through its settings to what came of it."""
        axes = [*self.report.keys, self.report.metric]
        heights, labels = [], []
        for place, key in enumerate(axes):
            values = self.source.data[key]
            spots, ticks = _spread([None if v != v else v for v in values])
            heights.append(spots)
            labels += [(place, spot, text) for spot, text in ticks]
        rows = list(zip(*heights, strict=True))
        self.source.data["x parallel"] = [[i for i, y in enumerate(row) if y is not None] for row in rows]
        self.source.data["y parallel"] = [[y for y in row if y is not None] for row in rows]
        made = self._figure("settings and result; click to select, shift for several", height=360,
                            x_range=(-0.15, len(axes) - 0.55), y_range=(-0.08, 1.08))  # fmt: skip
        for pruned, view in self._views():
            made.multi_line(
                "x parallel", "y parallel", source=self.source, view=view, line_color="color",
                line_width=1 if pruned else 2.5, selection_line_width=4, **DIM,
            )  # fmt: skip
        places = list(range(len(axes)))
        made.segment(places, [0] * len(axes), places, [1] * len(axes), color="#444")
        made.text(
            [x for x, _, _ in labels], [y for _, y, _ in labels], [text for _, _, text in labels], x_offset=5,
            text_font_size="11px", text_baseline="middle", text_color="#222", background_fill_color="white", background_fill_alpha=0.7,
        )  # fmt: skip
        made.xaxis.ticker = FixedTicker(ticks=places)
        made.xaxis.major_label_overrides = {i: self.names.get(key, key) for i, key in enumerate(axes)}
        made.yaxis.visible = False
        made.grid.visible = False
        made.add_tools(self._hover(line_policy="interp"))
        return made

    def importance(self) -> Any:
        found = sorted(self.report.importance.items(), key=lambda pair: pair[1])
        names = [self.names[key] for key, _ in found]
        made = self._figure(f"share of {self.report.metric}'s variance (fANOVA)", y_range=names, x_range=(0, 1))
        made.hbar(y=names, right=[share for _, share in found], height=0.6, color="#31688e")
        made.add_tools(HoverTool(tooltips=[("setting", "@y"), ("share", "@right{0.000}")]))
        return made

    def heat(self, one: Map) -> Any:
        """Row by row, on what each token looks."""
        queries, keys = one.weights.shape
        made = self._figure(one.title, height=340, x_range=(-0.5, keys - 0.5), y_range=(queries - 0.5, -0.5))
        x, y = zip(*itertools.product(range(keys), range(queries)), strict=True)
        cells = {
            "x": x,
            "y": y,
            "weight": [float(one.weights[j, i]) for i, j in zip(x, y, strict=True)],
            "seen": [one.seen[i] for i in x],
            "looking": [one.looking[j] for j in y],
        }
        colors = LinearColorMapper(palette=Viridis256[::-1], low=0, high=float(one.weights.max()) or 1.0)
        fill = {"field": "weight", "transform": colors}
        made.rect("x", "y", 1, 1, source=ColumnDataSource(cells), fill_color=fill, line_color=None)
        made.add_layout(ColorBar(color_mapper=colors, title="weight", width=10), "right")
        for axis, tokens in ((made.xaxis, one.seen), (made.yaxis, one.looking)):
            axis.ticker = FixedTicker(ticks=list(range(len(tokens))))
            axis.major_label_overrides = dict(enumerate(tokens))
        made.xaxis.major_label_orientation = "vertical"
        made.axis.major_label_text_font_size = "10px"
        made.grid.visible = False
        made.add_tools(HoverTool(tooltips=[("from", "@looking"), ("to", "@seen"), ("weight", "@weight{0.000}")]))
        return made


def _spread(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Where values stand on an axis of length 1, and its labels."""
    known = [v for v in values if v is not None]
    kind = scale(known)
    if not known:
        return [None] * len(values), []
    if kind == "category" or len(set(known)) == 1:
        options = sorted(set(map(shown, known)))
        step = 1 / max(len(options) - 1, 1)
        spots = {option: i * step if len(options) > 1 else 0.5 for i, option in enumerate(options)}
        return [None if v is None else spots[shown(v)] for v in values], [(y, text) for text, y in spots.items()]
    turn: Any = np.log10 if kind == "log" else np.asarray
    low, high = float(turn(min(known))), float(turn(max(known)))
    at = [None if v is None else (float(turn(v)) - low) / (high - low) for v in values]
    if len(set(known)) <= 8:
        return at, [((float(turn(v)) - low) / (high - low), shown(v)) for v in sorted(set(known))]
    ends = [low + (high - low) * i / 4 for i in range(5)]
    return at, [(i / 4, f"{10**e if kind == 'log' else e:.3g}") for i, e in enumerate(ends)]

"""The figures of a report that stand alone, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfm_jax.sweep.content import GREY, Report, curves, finite, scale, shown, thinned
from tfm_jax.sweep.results import ranked
from tfm_jax.sweep.space import short_names


def draw(report: Report, folder: Path) -> list[Path]:
    """`curves.png`, with settings that differ `response.png`, with maps `attention.png`."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    runs, names, paths = ranked(report.runs, report.metric, report.goal), short_names(report.keys), []
    whole = sum(not run.pruned for run in runs)
    shades = iter(0.82 * i / max(whole - 1, 1) for i in range(whole))
    colors = [GREY if run.pruned else to_hex(colormaps["viridis"](next(shades))) for run in runs]

    def panels(count: int, width: float = 4.0, height: float = 3.0) -> tuple[Any, list[Any]]:
        columns = min(count, 3)
        rows = -(-count // columns)
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for empty in axes[count:]:
            empty.set_axis_off()
        return figure, axes

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=100)
        paths.append(folder / name)

    if drawn := curves(runs):
        figure, axes = panels(len(drawn))
        for name, ax in zip(drawn, axes, strict=False):
            # The best lies on top.
            for run, color in reversed(list(zip(runs, colors, strict=True))):
                x, y = run.series(name)
                ax.plot(thinned(x), thinned(y), color=color, linewidth=1, label=run.name)
            ax.set(title=name, xlabel="step")
            ax.grid(alpha=0.3)
        if len(runs) <= 10:
            axes[0].legend(fontsize=7)
        save(figure, "curves.png")
    # Those that cannot be read have no numbers either, and so come last.
    if report.keys and (known := [run for run in runs if run.config]):
        figure, axes = panels(len(report.keys) + bool(report.importance))
        for key, ax in zip(report.keys, axes, strict=False):
            values = [run.config.get(key) for run in known]
            kind = scale(values)
            places: list[Any] = values if kind != "category" else [shown(v) for v in values]
            y = [finite(run.value(report.metric)) for run in known]
            for pruned, fill in ((False, None), (True, "none")):
                those = [i for i, run in enumerate(known) if run.pruned == pruned]
                if those:
                    edges = [colors[i] for i in those]
                    ax.scatter([places[i] for i in those], [y[i] for i in those], facecolors=fill or edges, edgecolors=edges,
                               label="pruned" if pruned else None)  # fmt: skip
            if not known[0].pruned:
                ax.plot(places[:1], y[:1], "*", markersize=14, color="tab:red", label=f"best: {shown(values[0])}")
            if kind == "log":
                ax.set_xscale("log")
            ax.set(xlabel=key, ylabel=report.metric)
            ax.legend()
            ax.grid(alpha=0.3)
        if report.importance:
            found = sorted(report.importance.items(), key=lambda pair: pair[1])
            axes[len(report.keys)].barh([names[k] for k, _ in found], [v for _, v in found])
            axes[len(report.keys)].set(xlabel="share of variance (fANOVA)", xlim=(0, 1))
        save(figure, "response.png")
    if report.maps:
        figure, axes = panels(len(report.maps), 4.0, 4.0)
        for one, ax in zip(report.maps, axes, strict=False):
            figure.colorbar(ax.imshow(one.weights, cmap="viridis_r", vmin=0), ax=ax, shrink=0.7)
            ax.set_xticks(range(len(one.seen)), one.seen, rotation=90, fontsize=max(4, 9 - len(one.seen) // 12))
            ax.set_yticks(range(len(one.looking)), one.looking, fontsize=max(4, 9 - len(one.looking) // 12))
            ax.set_title(one.title, fontsize=10)
        save(figure, "attention.png")
    return paths

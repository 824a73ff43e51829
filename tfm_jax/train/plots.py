"""The picture of a run: loss over steps, from `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path

from tfm_jax.train.log import read_metrics


def loss_picture(run: Path, references: dict[str, float] | None = None, unit: str = "token") -> Path:
    """Draw `plots/loss.png`: training loss, every evaluator's loss, and the learning rate below.

    Args:
      references: horizontal lines by name, in nats a unit (a compressor's rate, a published figure).
      unit: of the task.
    """
    # Drawing is the last thing a run does; importing matplotlib takes longer than its first step.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name in sorted({key for record in records for key in record if key.endswith("/loss")}):
        points = [(r["step"], r[name]) for r in records if name in r]
        marker = "o" if name.startswith("eval/") else None
        top.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4, linewidth=1.2)
    for name, value in (references or {}).items():
        top.axhline(value, color="grey", linestyle="--", linewidth=0.8)
        top.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="grey"
        )
    rates = [(r["step"], r["optim/lr"]) for r in records if "optim/lr" in r]
    if rates:
        bottom.plot(*zip(*rates, strict=True), linewidth=1.2)
    top.set(ylabel=f"loss (nats per {unit})", title=run.name)
    top.legend()
    bottom.set(xlabel="step", ylabel="learning rate")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    path = run / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path

"""A live table of runs in the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tfm_jax.errors import UserError
from tfm_jax.sweep import results
from tfm_jax.sweep.content import shown
from tfm_jax.sweep.results import Goal, Run
from tfm_jax.sweep.space import short

COLORS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "damaged": "red",
    "pruned": "dim",
    "preempted": "yellow",
}


def table(runs: Sequence[Run], metric: str | None, goal: Goal | None, now: float) -> Table:
    """Every run, the best first: settings that differ, state, step of steps, losses, speed, and how long nothing has come."""
    keys, known = results.differing(runs), results.metrics(runs)
    metric, goal = results.judged(runs, metric, goal)
    names = short(keys)
    losses = [metric] if metric is not None else [n for n in known if n.startswith("eval/") and n.endswith("/loss")]
    losses = list(dict.fromkeys([*losses, "train/loss"]))
    fast = [n for n in known if n.endswith("_per_sec") and n != "perf/steps_per_sec"]
    deciding = next((name for name in losses if name in known), losses[0])
    ordered = results.ranked(runs, deciding, goal or results.goal_of(deciding))
    counts = {state: sum(run.state == state for run in runs) for state in sorted({run.state for run in runs})}
    out = Table(title=", ".join(f"{count} {state}" for state, count in counts.items()), title_justify="left")
    for head in ("run", *names.values()):
        out.add_column(head, overflow="fold")
    out.add_column("state")
    for head in ("step", *losses, *fast, "last line"):
        out.add_column(head, justify="right", no_wrap=True)
    for run in ordered:
        color = COLORS.get(run.state, "")
        state = f"[{color}]{run.state}[/]" if color else run.state
        steps = run.config.get("train.steps")
        step = f"{run.step}/{steps}" if steps else str(run.step)
        out.add_row(
            run.name,
            *(shown(run.config.get(key)) for key in keys),
            state,
            step,
            *(f"{value:.4f}" if (value := run.value(name)) is not None else "" for name in losses),
            *(f"{value:,.0f}" if (value := run.value(name)) is not None else "" for name in fast),
            _since(run, now),
        )
    return out


def _since(run: Run, now: float) -> str:
    """A run that was killed cannot say so; that nothing comes from it any more does."""
    path = run.path / "metrics.jsonl"
    if run.state != "running" or not path.is_file():
        return ""
    seconds = max(0, round(now - path.stat().st_mtime))
    return f"{seconds} s ago" if seconds < 120 else f"{seconds // 60} min ago"


def watch(folders: Sequence[Path], metric: str | None, goal: Goal | None, every: float) -> None:
    """Show the table until Ctrl-C; trials that a sweep starts meanwhile join it. Without a terminal it is printed once.

    Raises:
      UserError: see `results.find`; an interval that is none.
    """
    if every <= 0:
        raise UserError(f"--every={every}: seconds, more than 0.")
    console, known = Console(), dict[Path, tuple[float, Run]]()

    def look() -> Table:
        found = [_read(name, path, known) for name, path in results.find(folders).items()]
        return table(results.completed(found), metric, goal, time.time())

    first = look()
    if not console.is_terminal:
        console.print(first)
        return
    with Live(first, console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(look(), refresh=True)
        except KeyboardInterrupt:
            live.update(look(), refresh=True)


def _read(name: str, path: Path, known: dict[Path, tuple[float, Run]]) -> Run:
    """A run, read again where something in its folder is newer."""
    files = (*results.MARKS, "metrics.jsonl", "result.json")
    newest = sum((path / file).stat().st_mtime for file in files if (path / file).is_file())
    if path not in known or known[path][0] != newest:
        known[path] = newest, results.read(name, path)
    return known[path][1]

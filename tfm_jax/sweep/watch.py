"""A live table of runs in the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tfm_jax.errors import UserError
from tfm_jax.metrics import Goal, direction
from tfm_jax.sweep import results
from tfm_jax.sweep.content import shown
from tfm_jax.sweep.results import Run
from tfm_jax.sweep.space import short_names
from tfm_jax.sweep.trials import FINISHED
from tfm_jax.units import counted

# Columns beside the run's name that are there however narrow the terminal is, and what is left of a name then.
ALWAYS, NAME = 3, 16
# Of a pipe: nothing is cut.
WIDE = 10_000
COLORS = {
    "finished": "green",
    "running": "cyan",
    "failed": "red",
    "damaged": "red",
    "pruned": "dim",
    "preempted": "yellow",
}


def table(
    runs: Sequence[Run], metric: str | None, goal: Goal | None, now: float, width: int, most: int | None = None
) -> Table:
    """Every run, the best first: state, step of steps, how long nothing has come, what decides, settings that differ, other losses
    and speed; as many of the columns as fit into `width` characters.

    Args:
      most: runs to show, those that are running before others.

    Raises:
      UserError: no run has logged `metric`, and some should have by now.
    """
    keys, known = results.differing(runs), results.metrics(runs)
    if metric is not None and _due(runs, metric):
        results.deciding(runs, metric)
    metric, goal = results.judged(runs, metric, goal)
    names = short_names(keys)
    losses = [metric] if metric is not None else [n for n in known if n.startswith("eval/") and n.endswith("/loss")]
    losses = list(dict.fromkeys([*losses, "train/loss"]))
    fast = [n for n in known if n.endswith("_per_sec") and n != "perf/steps_per_sec"]
    deciding = next((name for name in losses if name in known), losses[0])
    # A direction is that of the metric it was said of.
    own = goal if metric in (None, deciding) else None
    ordered = results.ranked(runs, deciding, own or direction(deciding))
    counts = {state: sum(run.state == state for run in runs) for state in sorted({run.state for run in runs})}
    columns: list[tuple[str, JustifyMethod, list[str]]] = [
        ("state", "left", [run.state for run in ordered]),
        ("step", "right", [_step(run) for run in ordered]),
        (deciding, "right", [_number(run, deciding, ".4f") for run in ordered]),
        ("last line", "right", [_since(run, now) for run in ordered]),
        *((names[key], "left", [shown(run.config.get(key)) for run in ordered]) for key in keys),
        *((name, "right", [_number(run, name, ".4f") for run in ordered]) for name in losses if name != deciding),
        *((name, "right", [_number(run, name, ",.0f") for run in ordered]) for name in fast),
    ]
    columns = [column for column in columns if column[0] != "last line" or any(column[2])]
    heads = [head.replace("/", "/\n") for head, _, _ in columns]
    taken = [3 + max(map(len, [*head.split("\n"), *cells])) for head, (_, _, cells) in zip(heads, columns, strict=True)]
    longest = max(len(run.name) for run in runs)
    count = len(columns)
    while count > ALWAYS and sum(taken[:count]) + min(longest, NAME) + 4 > width:
        count -= 1
    out = Table(title=", ".join(f"{count} {state}" for state, count in counts.items()), title_justify="left")
    room = max(min(longest, NAME), width - sum(taken[:count]) - 4)
    out.add_column("run", width=min(longest, room), no_wrap=True, overflow="ellipsis")
    for head, (_, justify, _) in zip(heads[:count], columns, strict=False):
        out.add_column(head, justify=justify, no_wrap=True)
    # A stable sort: of those that do not run the best.
    kept = {run.path for run in sorted(ordered, key=lambda run: run.state != "running")[:most]}
    for i, run in enumerate(ordered):
        if run.path not in kept:
            continue
        state = Text(run.state, COLORS.get(run.state, ""))
        out.add_row(Text(run.name), state, *(cells[i] for _, _, cells in columns[1:count]))
    notes = (
        [f"Nobody has logged {metric} yet: by {deciding} meanwhile."]
        if deciding in known and metric not in (None, deciding)
        else []
    )
    if left := [head for head, _, _ in columns[count:]]:
        notes.append(f"Too narrow for {', '.join(left)}.")
    if len(kept) < len(ordered):
        notes.append(f"Too short for {counted(len(ordered) - len(kept), 'more run')}.")
    out.caption, out.caption_justify = "\n".join(notes) or None, "left"
    return out


def _due(runs: Sequence[Run], metric: str) -> bool:
    """Whether a metric should have been logged: others of its kind have been, or a run has finished without."""
    kind = metric.partition("/")[0] + "/"
    return any(run.state == FINISHED for run in runs) or any(name.startswith(kind) for name in results.metrics(runs))


def _step(run: Run) -> str:
    steps = run.config.get("train.steps")
    return f"{run.step}/{steps}" if steps else str(run.step)


def _number(run: Run, metric: str, form: str) -> str:
    value = run.value(metric)
    return "" if value is None else format(value, form)


def _since(run: Run, now: float) -> str:
    """A run that was killed cannot say so; that nothing comes from it any more does."""
    path = run.path / "metrics.jsonl"
    if run.state != "running" or not path.is_file():
        return ""
    seconds = max(0, round(now - path.stat().st_mtime))
    return f"{seconds} s ago" if seconds < 120 else f"{seconds // 60} min ago"


def watch(folders: Sequence[Path], metric: str | None, goal: Goal | None, every: float) -> None:
    """Show the table until Ctrl-C; trials that a sweep starts meanwhile join it. Without a terminal that can draw it anew it is
    printed whole at each change.

    Raises:
      UserError: see `results.find` and `table`; an interval that is none.
    """
    if every <= 0:
        raise UserError(f"--every={every}: seconds, more than 0.")
    console, known = Console(), dict[Path, tuple[float, Run]]()

    def look() -> list[Run]:
        return results.completed([_read(name, path, known) for name, path in results.find(folders).items()])

    def drawn(runs: Sequence[Run], width: int, most: int | None = None) -> Table:
        return table(runs, metric, goal, time.time(), width, most)

    if console.is_terminal and not console.is_dumb_terminal:
        _draw(console, look, drawn, every)
    else:
        _print(look, drawn, every)


def _draw(console: Console, look: Callable[[], list[Run]], drawn: Callable[..., Table], every: float) -> None:
    """In one place, as much as fits; in the end all."""

    def fitting() -> Table:
        runs = look()
        whole = drawn(runs, console.width)
        over = len(console.render_lines(whole)) - console.height
        # One more makes room for the line that says so.
        return whole if over <= 0 else drawn(runs, console.width, max(1, len(runs) - over - 1))

    with Live(fitting(), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                live.update(fitting(), refresh=True)
        except KeyboardInterrupt:
            live.update(drawn(look(), console.width))


def _print(look: Callable[[], list[Run]], drawn: Callable[..., Table], every: float) -> None:
    """One after the other."""
    console, before = Console(width=WIDE), list[Run]()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            if (runs := look()) != before:
                console.print(drawn(runs, WIDE))
                before = runs
            time.sleep(every)


def _read(name: str, path: Path, known: dict[Path, tuple[float, Run]]) -> Run:
    """A run, read again where something in its folder is newer."""
    files = (*results.MARKS, "metrics.jsonl", "result.json")
    newest = sum((path / file).stat().st_mtime for file in files if (path / file).is_file())
    if path not in known or known[path][0] != newest:
        known[path] = newest, results.read(name, path)
    return known[path][1]

"""Where a run's numbers go: `metrics.jsonl`, TensorBoard events, Weights & Biases, and the terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import tqdm

from tfm_jax.files import path_id, write_atomic

Metrics = dict[str, float]
EVALUATIONS = "evaluations.jsonl"


class Writers:
    """Writes metrics everywhere at once. Only the main process makes one that writes."""

    def __init__(self, run: Path, *, start: int, tensorboard: bool, wandb: str | None, config: Any) -> None:
        """`start` is the step a run goes on from: what was written after it, before a crash, is dropped."""
        path = run / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= start]
            write_atomic(path, "".join(kept))
        self._jsonl = open(path, "a", buffering=1)  # noqa: SIM115 - closed in close()
        self._events: Any = None
        self._wandb: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(run), purge_step=start + 1 if start else None)
        if wandb:
            import wandb as wandb_module  # that it is there was checked before anything was built

            entity, _, project = wandb.rpartition("/")
            self._wandb = wandb_module.init(
                project=project,
                entity=entity or None,
                dir=run,
                name=run.name,
                # Trials of two sweeps may have the same name.
                id=path_id(run),
                resume="allow",
                # Other threads may have runs of their own: by default it would be one of these.
                reinit="create_new",
                config=config,
            )

    def write(self, step: int, metrics: Metrics) -> None:
        self._jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        self._jsonl.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line of `metrics.jsonl`, in order; a line cut off by a crash is left out."""
    return _read_lines(run / "metrics.jsonl")


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """What `evaluate` has found since, in the same way: a record for each evaluator and checkpoint."""
    return _read_lines(run / EVALUATIONS)


def asked_with(evaluation: Mapping[str, Any]) -> str:
    """What an evaluation is of besides its checkpoint: `average=3, decay=1.0, data.seq_len=4`; nothing of the run as it is."""
    said = [f"{key}={value}" for key, value in dict(evaluation.get("overrides", {})).items()]
    if evaluation.get("average", 1) > 1:
        said.insert(0, f"average={evaluation['average']}, decay={evaluation['decay']}")
    return ", ".join(said)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) < _CUT_OFF]


def read_step(run: Path, step: int) -> Metrics:
    """All that was logged of one step."""
    lines = [line for line in read_metrics(run) if line["step"] == step]
    return {name: value for line in lines for name, value in line.items()}


_CUT_OFF = 1 << 62


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _CUT_OFF


def _speed(metrics: Metrics) -> list[str]:
    """Units a second, by their name: `12,346 tokens/s`."""
    rates = {re.fullmatch(r"perf/(\w+)_per_sec", name): rate for name, rate in metrics.items()}
    return [f"{rate:,.0f} {found[1]}/s" for found, rate in rates.items() if found and found[1] != "steps"]


class Progress:
    """A bar with loss, speed and time left on a terminal; a plain line at each report when piped."""

    def __init__(self, *, start: int, total: int, shown: bool, out: TextIO | None = None) -> None:
        out = sys.stderr if out is None else out
        self._out, self._shown, self._total = out, shown, total
        self._bar = None
        if shown and out.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix} [{elapsed}<{remaining}]"
            self._bar = tqdm.tqdm(total=total, initial=start, bar_format=layout, dynamic_ncols=True, file=out)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, metrics: Metrics, seconds_left: float) -> None:
        parts = [f"loss {metrics.get('train/loss', float('nan')):.4f}", *_speed(metrics)]
        if "perf/mfu" in metrics:
            parts.append(f"MFU {100 * metrics['perf/mfu']:.0f}%")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
        else:
            hours, rest = divmod(round(seconds_left), 3600)
            left = f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
            self.say(f"step {step}/{self._total}  {'  '.join(parts)}  ETA {left}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._out)
        else:
            print(text, file=self._out, flush=True)

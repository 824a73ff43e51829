"""What a run has said last, in its own log or its job's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfm_jax.launch.job import MISTAKE

# What a job's script says when it starts a run again.
AGAIN = "Attempt "


def last_words(run: Path, code: int | None) -> str:
    """Of what a run has printed last, here or as a job, the mistake or the last line."""
    logs = sorted([*run.glob("train.log"), *run.glob("slurm-*.log")], key=lambda log: log.stat().st_mtime)
    lines = own_lines(logs[-1]) if logs else []
    said = [line for line in lines if not line.startswith(AGAIN)]
    return (mistake(lines) if code == MISTAKE else "") or "".join(said[-1:]).removeprefix("error: ")


def own_lines(log: Path) -> list[str]:
    """What is in a log, if there is one, but for the cluster's words."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return [line for line in lines if line.strip() and not line.startswith(("srun: ", "slurmstepd: "))]


def mistake(lines: Sequence[str]) -> str:
    """The user's mistake with which a run ends, from its `error: ` to the end of its log; empty where it ends with none."""
    places = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    last = lines[places[-1] :] if places else []
    return "" if any(line.startswith(AGAIN) for line in last) else "\n".join(last).removeprefix("error: ")

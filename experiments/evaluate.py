"""Evaluate checkpoints with the evaluators of their runs' configs, on the devices that are here.

A run, RUN/checkpoints/STEP, or several, for which shell patterns may stand too. `--config.KEY=VALUE` changes the runs' configs, for
other data or another mesh. Results go to RUN/evaluations.jsonl, and what stands there already is not done again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from tfm_jax.errors import UserError
from tfm_jax.train.log import asked_with

EXAMPLES = """\
  python -m experiments.evaluate --run runs/gpt_stdlib
  python -m experiments.evaluate --run runs/gpt_stdlib --steps 400 --json
  python -m experiments.evaluate --run runs/gpt_stdlib --steps all --follow
  python -m experiments.evaluate --run 'sweeps/lr/*' --table sweeps/lr.csv
  python -m experiments.evaluate --run runs/gpt_stdlib --average 3 --decay 0.8
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m experiments.evaluate --run runs/gpt_stdlib --config.mesh.tensor=2"""
# Seconds between looks for new checkpoints.
LOOK_S = 1.0
# How often to look whether one that cannot be read is being deleted.
LOOKS = 10
ABOUT = ("run", "step", "average", "decay", "overrides")
log = logging.getLogger("tfm_jax")


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument("--run", nargs="+", required=True, metavar="RUN", help="run, checkpoint, or pattern of them")
    made.add_argument("--steps", help="checkpoints: `all`, or numbers with commas; the newest by default")
    made.add_argument(
        "--follow",
        action="store_true",
        help="with --steps=all, go on until the run ends; a minute after it is killed or preempted, unless it goes on",
    )
    cli.add_average(made)
    made.add_argument("--table", type=Path, metavar="FILE.csv", help="write all results to one table")
    made.add_argument("--again", action="store_true", help="evaluate also what has been evaluated before")
    cli.add_overrides(made)
    flags, overrides = cli.parse(made, argv)
    if flags.follow and flags.steps != "all":
        raise UserError("--follow waits for the checkpoints of --steps=all: give both.")
    averaged = cli.averaged(flags)
    cli.setup()
    import jax

    from tfm_jax.files import write_atomic
    from tfm_jax.parallel import multihost
    from tfm_jax.train.evaluation import Evaluations

    if flags.follow and jax.process_count() > 1:
        raise UserError("--follow: several processes may not see a checkpoint at the same moment. Use one.")
    evaluations = Evaluations(overrides, **averaged, again=flags.again)
    targets = cli.targets(flags.run)
    if flags.table is not None:
        cli.make_folder("--table", flags.table)
    wrong = _Wrong(several=len(targets) > 1)
    records: list[dict[str, Any]] = []
    try:
        for run, step in _asked(flags, targets, wrong):
            record = _evaluated(evaluations, run, step, flags, wrong)
            if record is None:
                continue
            records.append(record)
            if flags.follow and multihost.is_main():
                print(_line(record), flush=True)
    except KeyboardInterrupt:
        if not flags.follow:
            raise
    if not records:
        raise UserError("There was no checkpoint to evaluate.")
    if multihost.is_main():
        if not flags.follow:
            print(_vertical(records[0]) if len(records) == 1 else cli.table(_rows(records, shown)))
        if flags.table is not None:
            content = io.StringIO()
            csv.writer(content).writerows(_rows(records, str))
            write_atomic(flags.table, content.getvalue())
        if flags.json:
            one = len(records) == 1 and flags.steps != "all" and not wrong.said
            cli.print_json(records[0] if one else {"evaluations": records, "failed": wrong.said})
    return int(bool(wrong.said))


class _Wrong:
    """What is wrong with some of several targets, which keeps no other from being evaluated; of a single one it is raised.

    Attributes:
      said: by path.
    """

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self.said: dict[str, str] = {}

    @contextlib.contextmanager
    def of(self, path: Path) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if not self._several:
                raise
            self.said[path.as_posix()] = str(error)
            log.warning("%s: %s", path, error)


def _asked(flags: Any, targets: Sequence[Path], wrong: _Wrong) -> Iterator[tuple[Path, int]]:
    """Runs and steps, in the order in which they are to be evaluated."""
    from tfm_jax.train import rundir
    from tfm_jax.train.evaluation import following

    if flags.follow:
        runs = [rundir.run_folder(path) for path in targets]
        for run in (run for run in runs if not (run / "config.json").is_file()):
            hint = "" if run.exists() else rundir.nearest_run(run)
            log.info("Waiting for %s, which has not begun.%s", run, hint)
        yield from following(runs, lambda: time.sleep(LOOK_S))
        return
    numbers = _numbers(flags.steps)
    for path in targets:
        run, steps = rundir.run_folder(path), list[int]()
        with wrong.of(path):
            rundir.read_config(run)
            steps = _steps(path, numbers)
        for step in steps:
            yield run, step


def _steps(path: Path, numbers: Sequence[int | None]) -> list[int]:
    """Of a run or checkpoint, the asked ones that there are: all where no number is asked for."""
    from tfm_jax.train import rundir
    from tfm_jax.train.restore import open_checkpoint

    found = []
    for number in numbers or [None]:
        checkpoints, step = open_checkpoint(path, number)
        checkpoints.close()
        found.append(step)
    return found if numbers else rundir.checkpoint_steps(rundir.run_folder(path))


def _evaluated(evaluations: Any, run: Path, step: int, flags: Any, wrong: _Wrong) -> dict[str, Any] | None:
    """What there is to say of a checkpoint; None where something is wrong with it, or a run deletes what it takes meanwhile."""
    from tfm_jax.train import rundir

    def needed() -> list[int]:
        return [one for one in rundir.checkpoint_steps(run) if one <= step][-flags.average :]

    every, before = flags.steps == "all", needed()
    # The first ones have none before them, and a run that goes on may not keep them long enough.
    if every and (step not in before or len(before) < flags.average):
        has = f"of --average={flags.average} checkpoints there are {before}" if step in before else "it is deleted"
        log.warning("%s, step %d is left out: %s.", run, step, has)
        return None
    with wrong.of(run):
        try:
            return {"run": run.as_posix(), **evaluations.of(run, step)}
        except Exception:
            # Orbax has many errors for a folder that goes away while it reads, and it is there until the last file is gone.
            for _ in range(LOOKS):
                if not every or needed() != before or not rundir.is_claimed(run):
                    break
                time.sleep(LOOK_S)
            if not every or needed() == before:
                raise
            log.warning("%s, step %d is left out: the run has deleted a checkpoint of it meanwhile.", run, step)
    return None


def _numbers(text: str | None) -> Sequence[int | None]:
    """Steps, None for the newest; none for all."""
    if text is None or text == "all":
        return [None] if text is None else []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--steps={text}: write `all`, or numbers with commas: 100,200.") from None


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.6f}" if value % 1 else f"{value:.0f}"


def _vertical(record: dict[str, Any]) -> str:
    figures = sorted((name, shown(value)) for name, value in record.items() if name not in ABOUT)
    return cli.table(
        [("step", str(record["step"])), *([("with", said)] if (said := asked_with(record)) else []), *figures]
    )


def _rows(records: Sequence[dict[str, Any]], text: Any) -> list[tuple[str, ...]]:
    names = sorted({name for record in records for name in record if name not in ABOUT})
    lines = [
        (record["run"], str(record["step"]), *(text(record[name]) if name in record else "" for name in names))
        for record in records
    ]
    return [("run", "step", *names), *lines]


def _line(record: dict[str, Any]) -> str:
    figures = "  ".join(f"{name} {shown(value)}" for name, value in sorted(record.items()) if name not in ABOUT)
    said = asked_with(record)
    return f"{record['run']}  step {record['step']}  {said + '  ' if said else ''}{figures}"


if __name__ == "__main__":
    cli.run(main)

"""Run a sweep's trials, on this machine or on a cluster; the same command goes on with one that was stopped, however that went.

Trials are run directories in the sweep's folder, named by what differs between them. Several of these commands may work on one
sweep. What failed is shown with its reason, and tried again with `--retry_failed`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.launch import add_flags
from tfm_jax import config as configs
from tfm_jax.errors import UserError, nearest
from tfm_jax.launch.job import at_least
from tfm_jax.launch.slurm import launch
from tfm_jax.sweep import results, runner, slurm, terms, trials
from tfm_jax.sweep.results import Run
from tfm_jax.sweep.space import Choice, Overrides, Study, Trial, named, spelled
from tfm_jax.sweep.streams import ByThread
from tfm_jax.train import rundir
from tfm_jax.units import counted

EXAMPLES = """\
  python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/lr.py --workdir=sweeps/lr --parallel=2
  python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/lr.py --workdir=sweeps/lr --dry_run
  python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/lr.py --workdir=sweeps/lr --vectorise=8
  python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/asha.py --workdir=sweeps/asha
  python -m experiments.sweep --config=configs/gpt_stdlib.py --sweep=configs/sweeps/lr.py --workdir=sweeps/lr \\
    --backend=slurm --parallel=8 --time=24:00:00
  optuna-dashboard sweeps/asha/study.log"""
# First parts of what runs log.
LOGGED = ("train", "eval", "optim", "perf", "ckpt")


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    made.add_argument(
        "--config", required=True, metavar="FILE[:ARGS]", help="config file; --config.KEY=VALUE is for all trials"
    )
    made.add_argument(
        "--sweep", required=True, metavar="FILE[:ARGS]", help="file with a function sweep(); it may be the config's"
    )
    made.add_argument("--workdir", type=Path, help="folder of the sweep")
    made.add_argument(
        "--parallel",
        type=int,
        default=1,
        help="trials, or with --vectorise processes, at a time; here they share cores and GPUs out",
    )
    made.add_argument(
        "--vectorise",
        type=int,
        metavar="N",
        help="so many trials at a time in a process, by the same compiled programs; what is swept leaves the shapes as they are",
    )
    made.add_argument("--retry_failed", action="store_true", help="start what has failed again")
    made.add_argument("--storage", help="URL of a study's database; by default a journal file in the folder")
    made.add_argument("--dry_run", action="store_true", help="list the trials with their cost, and stop")
    made.add_argument("--backend", choices=("local", "slurm"), default="local", help="where trials run (%(default)s)")
    made.add_argument("--one_of_several", action="store_true", help=cli.HIDDEN)  # another shows the table
    settings = _backend_flags(made, argv)
    flags, overrides = cli.parse(made, argv)
    at_least(1, parallel=flags.parallel, vectorise=flags.vectorise)
    if flags.vectorise is not None and flags.backend != "local":
        raise UserError(f"--vectorise={flags.vectorise} is for --backend=local: submit this command itself as a job.")
    common, sweep = dict(overrides), _sweep(flags.sweep)
    _check_apart(common, sweep)
    if isinstance(sweep, Study):
        listed = _corners(sweep)
        _check_study(sweep, _check(flags.config, common, listed)[0])
    else:
        if flags.storage is not None:
            raise UserError(
                f"--storage={terms.shown(flags.storage)} is for studies; the sweep() of {flags.sweep} returns a list."
            )
        listed = named(sweep)
        _check(flags.config, common, listed)
    if flags.dry_run:
        return _dry_run(flags, common, sweep, listed)
    if flags.workdir is None:
        raise UserError("--workdir is not set: where should the runs go? For instance --workdir=sweeps/first")
    record = {"config": flags.config, "overrides": configs.fixed_part(common)}
    source, record = _opened(sweep, listed, record, flags, common)
    signal.signal(signal.SIGTERM, _interrupted)
    if flags.backend == "local":
        # Jobs outlive their launcher, on machines that may not say so here.
        trials.tell_stopped(flags.workdir)
    try:
        if flags.vectorise is not None and flags.parallel > 1:
            _several(flags.parallel, sys.argv[1:] if argv is None else argv)
        elif flags.vectorise is not None:
            _vectorised(source, flags, common, listed)
        else:
            start = runner.local(flags.config, flags.parallel, common)
            if flags.backend == "slurm":
                start = slurm.starter(flags.config, common, {name: getattr(flags, name) for name in settings})
            runner.run(source, flags.workdir, start, parallel=flags.parallel)
    except KeyboardInterrupt:
        if flags.backend == "local":
            trials.tell_stopped(flags.workdir)
        if not flags.one_of_several:
            count = sweep.limit if isinstance(sweep, Study) else len(listed)
            print(_stopped(flags.workdir, count), file=sys.stderr)
        return cli.INTERRUPTED
    best = source.best() if isinstance(sweep, Study) else None
    if isinstance(sweep, Study) and source.lost is not None:
        raise source.lost
    if flags.one_of_several:
        return 0
    rows = table(flags.workdir)
    print(shown(rows, record["metric"], record["direction"]))
    if best is not None:
        print(f"The best: {best[0].name}, {record['metric']} {best[1]:.4f}.")
    if flags.json:
        cli.print_json({"trials": rows})
    return 1 if any(row["state"] == trials.FAILED for row in rows) else 0


def _backend_flags(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """Those of `experiments.launch --backend slurm`, where that is the backend."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--backend")
    if first.parse_known_args(argv)[0].backend != "slurm":
        return []
    return add_flags(made.add_argument_group("--backend slurm"), launch, without=("dry_run",))


def _interrupted(number: int, frame: Any) -> None:
    """SIGTERM is as Ctrl-C: what runs is told to save."""
    raise KeyboardInterrupt


def _stopped(folder: Path, count: int) -> str:
    ended = sum(row["state"] in trials.ENDED for row in table(folder))
    return f"stopped: {ended} of {counted(count, 'trial')} ended; the same command goes on."


def _several(parallel: int, argv: Sequence[str]) -> None:
    """This command in several processes, which share the trials as any do that work in one folder."""
    own = [flag for flag in argv if flag != "--retry_failed"]  # done already, by this one
    command = [sys.executable, "-m", "experiments.sweep", *own, "--parallel=1", "--one_of_several"]
    started = [runner.bound(command, i, parallel) for i in range(parallel)]
    try:
        codes = [process.wait() for process in started]
    except KeyboardInterrupt:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    if any(codes):
        raise SystemExit(next(filter(None, codes)))


def _vectorised(source: Any, flags: Any, common: Mapping[str, str], listed: Sequence[Trial]) -> None:
    with contextlib.redirect_stderr(ByThread(sys.stderr)) as streams:
        cli.setup()
        from tfm_jax.sweep.vectorised import starter

        start = starter(lambda trial: _resolved(flags.config, common, trial), listed, streams)
        runner.run(source, flags.workdir, start, parallel=flags.vectorise)


def _opened(
    sweep: Any, listed: Sequence[Trial], record: dict[str, Any], flags: Any, common: Mapping[str, str]
) -> tuple[Any, dict[str, Any]]:
    """The source of trials, and what the folder says that it sweeps."""
    if not isinstance(sweep, Study):
        record |= {"study": None, "metric": None, "direction": "minimize"}
        trials.open_folder(flags.workdir, record)
        _check_begun(flags, common, listed, ())
        return runner.Listed(listed, flags.workdir, flags.retry_failed), record
    from tfm_jax.sweep import study

    record |= {"study": study.record(sweep), "metric": sweep.metric, "direction": sweep.direction}
    trials.open_folder(flags.workdir, record)
    # A run may be evaluated otherwise when it goes on; what trials are judged by is the study's, and when.
    evaluated = sweep.metric.startswith("eval/")
    judged = [f"evals.{sweep.metric.split('/')[1]}"] if evaluated else []
    if sweep.pruner != "none":
        judged.append("train.eval_every" if evaluated else "log.every")
    source = study.Drawn(sweep, flags.workdir, storage=flags.storage)
    _check_begun(flags, common, source.known(), judged)
    if flags.retry_failed:
        source.retry()
    return source, record


def _check_begun(flags: Any, common: Mapping[str, str], listed: Sequence[Trial], judged: Sequence[str]) -> None:
    """Find what has changed, say in the config's file, since trials have begun: one that has ended would not be asked again."""
    begun = [trial for trial in listed if rundir.has_checkpoint(flags.workdir / trial.name)]
    # The file gives the same to all that set the same keys, and reading it for each of a thousand would take minutes.
    for trial in {tuple(trial.overrides): trial for trial in begun}.values():
        run, asked = flags.workdir / trial.name, _resolved(flags.config, common, trial)
        rundir.check_config(run, asked)
        own, now = configs.flat(rundir.read_config(run)), configs.flat(json.loads(configs.to_json(asked)))
        for key in own:
            if own[key] != now.get(key) and configs.is_below(key, judged):
                raise UserError(
                    f"{run} is judged by {key}={own[key]!r}, not {now.get(key)!r}, as all trials of its study. Use another --workdir."
                )


def _sweep(spec: str) -> Sequence[Overrides] | Study:
    module, argument = configs.load_module(spec, "--sweep")
    if not hasattr(module, "sweep"):
        raise UserError(f"--sweep={spec}: the file has no function sweep().")
    given = [argument] if argument else []
    try:
        inspect.signature(module.sweep).bind(*given)
    except TypeError as error:
        raise UserError(f"--sweep={spec}: sweep(): {error}.") from None
    found: Any = module.sweep(*given)
    if isinstance(found, Study):
        return found
    listed = list(found) if isinstance(found, Iterable) else [found]
    if wrong := [one for one in listed if not isinstance(one, Mapping)]:
        raise UserError(f"--sweep={spec}: sweep() returns overrides (dicts in a list) or a Study, not {wrong[0]!r}.")
    return listed


def _check_apart(common: Mapping[str, str], sweep: Sequence[Overrides] | Study) -> None:
    """A trial's own override would hide the command's."""
    swept = {*sweep.space, *sweep.fixed} if isinstance(sweep, Study) else {key for one in sweep for key in one}
    for key, value in common.items():
        for own in sorted(swept):
            if f"{key}.".startswith(f"{own}."):
                raise UserError(
                    f"--config.{key}={value} overlaps with the sweep, which sets {own}. Leave one of them out."
                )


def _corners(study: Study) -> list[Trial]:
    """Trials that have every option and both ends of every range of a study."""
    most = max(len(one.options) if isinstance(one, Choice) else 2 for one in study.space.values())
    places = [i / most for i in range(most)] + [1 - 1e-9]
    corners = [{key: one.at(place) for key, one in study.space.items()} for place in places]
    return [Trial(spelled(corner), {**study.fixed, **corner}) for corner in corners]


def _resolved(config: str, common: Mapping[str, str], trial: Trial) -> configs.Config:
    # As a run's command has it: NumPy's short floats have fewer digits by `str`.
    pairs = [*common.items(), *((key, f"{value}") for key, value in trial.overrides.items())]
    return configs.resolve(configs.load(config), pairs)


def _check(config: str, common: Mapping[str, str], listed: Sequence[Trial]) -> list[configs.Config]:
    """Find before anything starts what every trial would stumble over: a key that is none, a value of a wrong type."""
    found = []
    for trial in listed:
        try:
            found.append(_resolved(config, common, trial))
        except UserError as error:
            raise UserError(f"sweep(), trial {trial.name}: {error}") from None
    return found


def _check_study(study: Study, config: configs.Config) -> None:
    kind, _, rest = study.metric.partition("/")
    name = rest.partition("/")[0]
    if kind not in LOGGED or (kind == "eval" and name not in config["evals"]):
        known = ["train/loss", "optim/lr", "perf/steps_per_sec", *(f"eval/{name}/loss" for name in config["evals"])]
        raise UserError(f"sweep: metric={study.metric!r} is none that trials log.{nearest(study.metric, known)}")
    if study.pruner != "none" and kind == "eval" and not config["train"]["eval_every"]:
        raise UserError(f"sweep: pruner={study.pruner!r} judges evaluations on the way: set train.eval_every.")


def _dry_run(flags: Any, common: Mapping[str, str], sweep: Any, listed: Sequence[Trial]) -> int:
    cli.setup()
    from tfm_jax.sweep.cost import Costs, telling

    costs = Costs(lambda trial: _resolved(flags.config, common, trial))
    studied = isinstance(sweep, Study)
    count, shown_ones = (sweep.limit, telling(sweep, costs)) if studied else (len(listed), listed)
    found = [costs(trial) for trial in shown_ones]
    rows = [(trial.name, str(cost.steps), f"{cost.flops:.3g}") for trial, cost in zip(shown_ones, found, strict=True)]
    flops = [cost.flops for cost in found]
    least, most = (count * min(flops), count * max(flops)) if studied else (sum(flops), sum(flops))
    print(cli.table([("trial with" if studied else "trial", "steps", "FLOPs"), *rows]))
    said = f"{most:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
    print(f"{counted(count, 'trial')}, {said} FLOPs in all{', if none is stopped early' if studied else ''}.")
    if flags.json:
        cli.print_json({"trials": count, "least_flops": least, "flops": most})
    return 0


def table(folder: Path) -> list[dict[str, Any]]:
    """A row for each trial of a sweep: its name, state, reason, step, overrides and final metrics."""
    rows = []
    for trial in trials.read_folder(folder)[1]:
        state = trials.state(folder / trial.name)
        metrics = trials.result(folder / trial.name)
        rows.append({"trial": trial.name, **state._asdict(), "overrides": trial.overrides, "metrics": metrics})
        rows[-1]["state"] = rows[-1].pop("word")
    return rows


def shown(rows: Sequence[Mapping[str, Any]], metric: str | None, direction: str) -> str:
    """The rows with a metric, or the evaluations' losses, the best first."""
    losses = sorted(
        {name for row in rows for name in row["metrics"] if name.startswith("eval/") and name.endswith("/loss")}
    )
    columns = losses if metric is None else [metric]
    runs = [Run(row["trial"], Path(), row["overrides"], row["state"], result=row["metrics"]) for row in rows]
    ranked = results.ranked(runs, "".join(columns[:1]), "lower" if direction == "minimize" else "higher")
    places = {run.name: place for place, run in enumerate(ranked)}
    lines = [("trial", "state", "step", *columns)]
    for row in sorted(rows, key=lambda row: places[row["trial"]]):
        found = [f"{row['metrics'][name]:.4f}" if name in row["metrics"] else "" for name in columns]
        lines.append((row["trial"], row["state"], str(row["step"]), *found))
    # One that has finished has a reason where its numbers cannot be read.
    told = [row for row in rows if row["state"] in (trials.FAILED, trials.FINISHED) and row["reason"]]
    reasons = [f"{row['trial']}: {row['state']}: {row['reason']}" for row in told]
    if failed := sum(row["state"] == trials.FAILED for row in rows):
        reasons.append(f"{failed} failed; --retry_failed tries again.")
    return "\n".join(itertools.chain([cli.table(lines)], reasons))


if __name__ == "__main__":
    cli.run(main)

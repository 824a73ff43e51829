"""The loop. It is the one place where order matters, and it is never copied.

 1. build, 2. agree across hosts, 3. restore; then, at each step,
 4. evaluate if due, and end if it says so, 5. save if due, 6. take the batch, 7. dispatch the update, 8. read the *previous* step's metrics
    (so the device never waits for the host), 9. log; at the end, or when told to stop,
10. write what remains, in the order checkpoint, evaluation, picture, result, status: a crash in between loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tfm_jax import config as configs
from tfm_jax.data.prefetch import Prefetcher
from tfm_jax.errors import UserError, nearest
from tfm_jax.evals.base import Evaluate
from tfm_jax.files import write_atomic, write_status
from tfm_jax.parallel import multihost, watchdog
from tfm_jax.train import rundir
from tfm_jax.train.build import Experiment, build
from tfm_jax.train.check import check_evaluators
from tfm_jax.train.checkpoint import Checkpointer, Restored
from tfm_jax.train.log import Metrics, Progress, Writers, read_metrics, read_step
from tfm_jax.train.meter import Meter
from tfm_jax.train.plots import loss_picture
from tfm_jax.train.references import as_loss, compressors
from tfm_jax.train.restore import starting_state
from tfm_jax.train.step import Programs
from tfm_jax.train.stop import StopRequest
from tfm_jax.train.trace import Trace

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a run ended: `finished` or `preempted`, with the final metrics."""

    status: str
    result: dict[str, Any]


def train(
    config: configs.Config,
    run: Path,
    *,
    profile: tuple[int, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    jit: Callable[..., Any] = jax.jit,
    stop: StopRequest | None = None,
) -> Outcome:
    """Train a resolved config in a run directory, going on from what is there.

    Args:
      profile: first step and number of steps to trace into `RUN/profile`.
      devices: of the mesh; all that there are if None.
      jit: what compiles; other than `jax.jit` where several runs share their programs.
      stop: asked between steps whether to save and end; signals ask it if None.

    Raises:
      UserError: anything the user can mend; once the run has begun, `status.json` says `failed` and why.
    """
    main = multihost.is_main()
    with contextlib.ExitStack() as held:
        try:
            if main:
                held.enter_context(rundir.claim(run))
            rundir.check_config(run, config)
            if profile is not None and profile[0] >= config["train"]["steps"]:
                raise UserError(f"--profile starts at step {profile[0]}, but train.steps={config['train']['steps']}.")
            # A tokenizer without a checkpoint may be another config's: a start that failed.
            tokenizer = run / "tokenizer" if rundir.has_checkpoint(run) else None
            experiment = build(rundir.with_own(run, config), tokenizer_dir=tokenizer, devices=devices, jit=jit)  # 1
            evaluators = experiment.evaluators()
            with jax.set_mesh(experiment.layout.mesh):
                check_evaluators(experiment.config, evaluators, experiment.abstract_state())
        except UserError as error:
            multihost.agree({}, problem=str(error))
            raise
        facts = {"config": configs.digest(experiment.config), "revision": rundir.revision()}
        # Also what may change between starts must be equal now: it decides when the processes meet.
        whole = {k: str(v) for k, v in configs.flat(experiment.config).items() if k not in configs.LOCAL_KEYS}
        multihost.agree({**whole, **facts, "data": experiment.data.fingerprint, "told": experiment.data.told})  # 2
        if watchdog.here is not None:
            watchdog.here.guard(run)
        if not main:
            return _train(experiment, evaluators, facts, run, profile, stop or StopRequest())
        try:
            rundir.begin(run, experiment.config, experiment.data.tokenizer)
            return _train(experiment, evaluators, facts, run, profile, stop or StopRequest())
        except BaseException as error:
            # What the end of another process leads to is not the reason; its watchdog has written that one.
            if isinstance(error, UserError) or not watchdog.lost():
                write_status(run, "failed", f"{type(error).__name__}: {error}")
            raise


def _train(
    experiment: Experiment,
    evaluators: dict[str, Evaluate],
    facts: dict[str, str],
    run: Path,
    profile: tuple[int, int] | None,
    stop: StopRequest,
) -> Outcome:
    main = multihost.is_main()
    with jax.set_mesh(experiment.layout.mesh):
        checkpoints = Checkpointer(
            run / "checkpoints", keep=experiment.checkpoint.keep, asynchronous=experiment.checkpoint.asynchronous
        )
        try:
            start = starting_state(experiment, checkpoints, main=main)  # 3
            ended = start.step == experiment.train.steps or experiment.train.stale(
                _watched(experiment, run, start.step)
            )
            if ended and (run / "result.json").is_file():
                # Nothing is left to do; evaluating again would log the last step twice.
                if main:
                    write_status(run, "finished", step=start.step)
                return Outcome("finished", json.loads((run / "result.json").read_text()))
            return _Loop(experiment, run, checkpoints, start, evaluators, facts, profile, stop, main).run()
        finally:
            checkpoints.close()


def _watched(experiment: Experiment, run: Path, step: int) -> list[float]:
    """What has been logged of the metric that may end the run, up to the step that it goes on from."""
    metric = experiment.train.stop_metric
    lines = read_metrics(run) if metric is not None else []
    return [float(line[metric]) for line in lines if metric in line and line["step"] <= step]


class _Loop:
    """The state of the loop between its steps."""

    def __init__(
        self,
        experiment: Experiment,
        run: Path,
        checkpoints: Checkpointer,
        start: Restored,
        evaluators: dict[str, Evaluate],
        facts: dict[str, str],
        profile: tuple[int, int] | None,
        stop: StopRequest,
        main: bool,
    ) -> None:
        self.experiment, self.run_dir, self.checkpoints = experiment, run, checkpoints
        self.facts, self.main = facts, main
        self.state, self.first = start.state, start.step
        self.watched = _watched(experiment, run, start.step)
        self.total = start.step if experiment.train.stale(self.watched) else experiment.train.steps
        self.evaluators = evaluators
        experiment.peak_flops()  # measured while nothing else runs
        self.meter = Meter(
            experiment,
            seconds=float(start.meta.get("train_seconds", 0.0)),
            skipped=int(start.meta.get("skipped_steps", 0)),
        )
        self.trace = Trace(run / "profile", *profile) if profile is not None and main else None
        self.finals: Metrics = {}
        self.evaluated: int | None = None
        self.pending: tuple[int, Any] | None = None  # a step dispatched, and its metrics not yet read
        self.stop = stop
        settings = experiment.log
        self.writers = (
            Writers(
                run, start=self.first, tensorboard=settings.tensorboard, wandb=settings.wandb, config=experiment.config
            )
            if main
            else None
        )

    def run(self) -> Outcome:
        experiment = self.experiment
        if (pipe := experiment.pipeline) is not None:
            waiting = 100 * pipe.bubble
            log.info("pipeline: %d stages, %d microbatches, waiting %.1f %%.", pipe.stages, pipe.microbatches, waiting)
        programs = Programs(experiment.jitted_step(), self.meter.compiling)
        log.info("compiling the step of %s parameters.", f"{experiment.parameter_count:,}")
        programs.get(self.state, experiment.batch(self.first))
        progress = Progress(start=self.first, total=self.total, shown=self.main)
        batches = Prefetcher(experiment.batch, self.first, self.total)
        try:
            with self.stop, progress, batches:
                self.progress = progress
                self.meter.start(self.first, batches)
                for step, batch in batches:
                    if step > self.first:
                        if self._due(step, experiment.train.eval_every):
                            self._read()
                            self._evaluate(step, list(self.evaluators))  # 4
                            if experiment.train.stale(self.watched):
                                self.total = step
                                if step % experiment.log.every:
                                    self._report(step)
                                break
                        if self._due(step, experiment.checkpoint.every):
                            self._read()
                            self._save(step)  # 5
                        if self._told_to_stop(step):
                            return self._preempted(step)
                    if self.trace is not None:
                        self.trace.before(step, self.state)
                    self.state, metrics = programs.get(self.state, batch)(self.state, batch)  # 6, 7
                    self._read()  # 8, 9
                    self.pending = (step + 1, metrics)
                    progress.advance()
                self._read()
                if self.trace is not None:
                    self.trace.stop(self.state)
                self.meter.pause()
                # A crash may have come between the last checkpoint and `result.json`.
                recorded = read_step(self.run_dir, self.total) if self.first == self.total else {}
                self._save(self.total)
                if self.evaluated != self.total:
                    done = {key.split("/")[1] for key in recorded if key.startswith("eval/")}
                    self._evaluate(self.total, [name for name in self.evaluators if name not in done])
                return self._finish(recorded)  # 10
        finally:
            if self.writers is not None:
                self.writers.close()

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _read(self) -> None:
        """Wait for the last dispatched step's metrics; count, check and perhaps log them."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        self.meter.add(step, jax.device_get(metrics))
        if self.meter.bad_in_a_row >= self.experiment.train.max_bad_steps:
            raise UserError(
                f"{self.meter.bad_in_a_row} updates in a row, up to step {step}, had a loss or gradient that was not"
                " finite. None of them changed the parameters. Lower optim.lr, warm up for longer, or clip harder"
                " (optim.clip_norm); train.max_bad_steps sets how many are allowed."
            )
        if step % self.experiment.log.every == 0 or step == self.total:
            self._report(step)

    def _report(self, step: int) -> None:
        line = self.meter.report(step)
        self._write(step, line)
        self.progress.report(step, line, self.meter.seconds_left(step))

    def _evaluate(self, step: int, names: Sequence[str]) -> None:
        with self.meter.paused():
            for name in names:
                found = {f"eval/{name}/{key}": value for key, value in self.evaluators[name](self.state).items()}
                self.finals |= found
                self._write(step, found)
                unit = self.experiment.task.unit
                shown = "  ".join(
                    f"{k.rpartition('/')[2]} {v:.4f}" for k, v in found.items() if not k.endswith(f"/{unit}s")
                )
                self.progress.say(f"step {step}/{self.total}  eval {name}: {shown}")
        self.evaluated = step
        metric = self.experiment.train.stop_metric
        if metric is not None and metric.split("/")[1] in names:
            if metric not in self.finals:
                raise UserError(
                    f"train.stop_metric={metric!r} is none that is evaluated.{nearest(metric, self.finals)}"
                )
            self.watched.append(self.finals[metric])
            if self.experiment.train.stale(self.watched):
                self.progress.say(
                    f"{metric} has not become better for {self.experiment.train.stop_patience} evaluations: the run ends."
                )

    def _save(self, step: int) -> None:
        if step in self.checkpoints.steps():
            return
        with self.meter.paused():
            meta = {
                **self.facts,
                "data": self.experiment.data.fingerprint,
                "told": self.experiment.data.told,
                "examples": step * self.experiment.data.train.batch_size,
                "train_seconds": self.meter.train_seconds,
                "skipped_steps": self.meter.skipped,
                "layer_loop": self.experiment.config["model"].get("layer_loop"),
                "versions": rundir.versions(),
            }
            blocked = self.checkpoints.save(step, self.state, meta)
        self._write(step, {"ckpt/blocking_s": blocked})

    def _told_to_stop(self, step: int) -> bool:
        return self.stop.told(step)

    def _preempted(self, step: int) -> Outcome:
        self._read()
        self.meter.pause()
        self._save(step)
        self.checkpoints.wait()
        if self.main:
            write_status(self.run_dir, "preempted", f"stopped by {self.stop.name} after step {step}", step=step)
        self.progress.say(f"Stopped after step {step}, checkpoint saved. The same command goes on from here.")
        return Outcome("preempted", {"step": step})

    def _finish(self, recorded: Metrics) -> Outcome:
        self.checkpoints.wait()
        result: dict[str, Any] = {
            **recorded,
            "step": self.total,
            "revision": self.facts["revision"],
            "date": time.strftime("%Y-%m-%d"),
            "machine": rundir.machine(),
            "versions": rundir.versions(),
            "train_seconds": self.meter.train_seconds,
            "parameters": self.experiment.parameter_count,
            **self.meter.last,
            **self.finals,
            **{f"reference/{name}": rate for name, rate in compressors(self.experiment.data.facts).items()},
        }
        if self.main:
            self.writers.close()  # type: ignore[union-attr]
            loss_picture(self.run_dir, as_loss(self.experiment.data.facts), self.experiment.task.unit)
            write_atomic(self.run_dir / "result.json", configs.to_json(result))
            write_status(self.run_dir, "finished", step=self.total)
        return Outcome("finished", result)

    def _write(self, step: int, metrics: Metrics) -> None:
        if self.writers is not None:
            self.writers.write(step, metrics)

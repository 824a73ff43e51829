"""The loop. It is the one place where order matters, and it is never copied.

 1. build, 2. agree across hosts, 3. restore; then, at each step,
 4. evaluate if due, 5. save if due, 6. take the batch, 7. dispatch the update, 8. read the *previous* step's metrics
    (so the device never waits for the host), 9. log; at the end, or when told to stop,
10. write what remains, in the order checkpoint, picture, result, status: a crash in between loses nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax

from tfm_jax import config as configs
from tfm_jax.data.prefetch import Prefetcher
from tfm_jax.errors import UserError
from tfm_jax.evals.base import Evaluate
from tfm_jax.files import write_atomic
from tfm_jax.parallel import multihost
from tfm_jax.parallel.devices import peak_flops
from tfm_jax.train import rundir
from tfm_jax.train.build import Experiment, build
from tfm_jax.train.checkpoint import Checkpointer, Restored, first_state
from tfm_jax.train.log import Metrics, Progress, Writers, read_metrics
from tfm_jax.train.meter import Meter
from tfm_jax.train.plots import loss_picture
from tfm_jax.train.restore import load_donor, open_checkpoint

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a run ended: `finished` or `preempted`, with the final metrics."""

    status: str
    result: dict[str, Any]


def train(config: configs.Config, run: Path, *, profile: tuple[int, int] | None = None) -> Outcome:
    """Train a resolved config in a run directory, going on from what is there.

    Args:
      profile: first step and number of steps to trace into `RUN/profile`.

    Raises:
      UserError: anything the user can mend; `status.json` then says `failed` and why.
    """
    if not multihost.is_main():
        return _train(config, run, profile)
    with rundir.claim(run):
        try:
            return _train(config, run, profile)
        except BaseException as error:
            # What was found before this start began says nothing about the run.
            if rundir.is_running(run):
                rundir.write_status(run, "failed", f"{type(error).__name__}: {error}")
            raise


def _train(config: configs.Config, run: Path, profile: tuple[int, int] | None) -> Outcome:
    rundir.check_config(run, config)
    experiment = build(config, tokenizer_dir=run / "tokenizer")  # 1
    if profile is not None and profile[0] >= experiment.train.steps:
        raise UserError(f"--profile starts at step {profile[0]}, but train.steps={experiment.train.steps}.")
    main = multihost.is_main()
    facts = {"config": configs.digest(experiment.config), "revision": rundir.revision()}
    # Also what may change between starts must be equal now: it decides when the processes meet.
    whole = {k: str(v) for k, v in configs.flat(experiment.config).items() if k not in configs.LOCAL_KEYS}
    multihost.agree({**whole, **facts, "data": experiment.data.fingerprint})  # 2
    evaluators = experiment.evaluators()
    if main:
        _begin(run, experiment)
    with jax.set_mesh(experiment.layout.mesh):
        checkpoints = Checkpointer(
            run / "checkpoints", keep=experiment.checkpoint.keep, asynchronous=experiment.checkpoint.asynchronous
        )
        try:
            start = _restore(experiment, checkpoints, main)  # 3
            if start.step == experiment.train.steps and (run / "result.json").is_file():
                # Nothing is left to do; evaluating again would log the last step twice.
                if main:
                    rundir.write_status(run, "finished", step=start.step)
                return Outcome("finished", json.loads((run / "result.json").read_text()))
            return _Loop(experiment, run, checkpoints, start, evaluators, facts, profile, main).run()
        finally:
            checkpoints.close()


def _begin(run: Path, experiment: Experiment) -> None:
    if not (run / "tokenizer").is_dir() and experiment.data.tokenizer is not None:
        temporary = run / f".tokenizer.{os.getpid()}"
        experiment.data.tokenizer.save(temporary)
        temporary.rename(run / "tokenizer")
    write_atomic(run / "config.json", configs.to_json(experiment.config))
    rundir.write_status(run, "running", pid=os.getpid())


def _restore(experiment: Experiment, checkpoints: Checkpointer, main: bool) -> Restored:
    settings, abstract = experiment.checkpoint, experiment.abstract_state()

    def resume() -> Restored:
        source, step = open_checkpoint(Path(str(settings.resume)))
        try:
            return source.restore(step, abstract)
        finally:
            source.close()

    def init_from(state: Any) -> Any:
        params, report = load_donor(
            Path(str(settings.init_from)),
            state.params,
            rename=settings.rename,
            resize_positions=settings.resize_positions,
        )
        if main:
            log.warning("init_from %s: %s", settings.init_from, report)
        return state._replace(params=params, extra=experiment.task.init_extra(params))

    start, origin = first_state(
        checkpoints,
        abstract,
        resume=resume if settings.resume else None,
        initialise=experiment.fresh_state,
        init_from=init_from if settings.init_from else None,
    )
    saved = start.meta.get("data", experiment.data.fingerprint)
    if saved != experiment.data.fingerprint:
        raise UserError(
            f"The data has changed since this run's checkpoint was written (fingerprint {saved} then,"
            f" {experiment.data.fingerprint} now), so going on would not be the same run. Restore the data, or start"
            " another run with checkpoint.init_from."
        )
    if start.step > experiment.train.steps:
        raise UserError(f"The checkpoint is of step {start.step}, beyond train.steps={experiment.train.steps}.")
    if main and origin != "scratch":
        log.info("%s at step %d.", origin, start.step)
    return start


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
        main: bool,
    ) -> None:
        self.experiment, self.run_dir, self.checkpoints, self.facts, self.main = (
            experiment,
            run,
            checkpoints,
            facts,
            main,
        )
        self.state, self.first = start.state, start.step
        self.total = experiment.train.steps
        self.evaluators = evaluators
        peak_flops()  # measured while nothing else runs
        self.meter = Meter(experiment, seconds=float(start.meta.get("train_seconds", 0.0)))
        self.profile, self.tracing = profile, False
        self.finals: Metrics = {}
        self.pending: tuple[int, Any] | None = None  # a step dispatched, and its metrics not yet read
        self.stop = _StopRequest()
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
        began = time.perf_counter()
        compiled = experiment.jitted_step().lower(self.state, experiment.batch(self.first)).compile()
        self.meter.compile_seconds = time.perf_counter() - began
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
                            self._evaluate(step)  # 4
                        if self._due(step, experiment.checkpoint.every):
                            self._read()
                            self._save(step)  # 5
                        if self._told_to_stop(step):
                            return self._preempted(step)
                    self._trace(step)
                    self.state, metrics = compiled(self.state, batch)  # 6, 7
                    self._read()  # 8, 9
                    self.pending = (step + 1, metrics)
                    progress.advance()
                self._read()
                self._trace(None)
                self.meter.pause()
                recorded = self._recorded()
                if not any(name.startswith("eval/") for name in recorded):
                    self._evaluate(self.total)
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
            line = self.meter.report(step)
            self._write(step, line)
            self.progress.report(step, line, self.meter.seconds_left(step))

    def _evaluate(self, step: int) -> None:
        with self.meter.paused():
            for name, evaluate in self.evaluators.items():
                found = {f"eval/{name}/{key}": value for key, value in evaluate(self.state).items()}
                self.finals |= found
                self._write(step, found)
                shown = "  ".join(
                    f"{k.rpartition('/')[2]} {v:.4f}" for k, v in found.items() if not k.endswith("tokens")
                )
                self.progress.say(f"step {step}/{self.total}  eval {name}: {shown}")

    def _save(self, step: int) -> None:
        if step in self.checkpoints.steps():
            return
        with self.meter.paused():
            meta = {
                **self.facts,
                "data": self.experiment.data.fingerprint,
                "examples": step * self.experiment.data.train.batch_size,
                "train_seconds": self.meter.train_seconds,
                "layer_loop": self.experiment.config["model"].get("layer_loop"),
                "versions": rundir.versions(),
            }
            blocked = self.checkpoints.save(step, self.state, meta)
        self._write(step, {"ckpt/blocking_s": blocked})

    def _told_to_stop(self, step: int) -> bool:
        # Processes ask each other only now and then: the answer costs a collective.
        if jax.process_count() > 1 and step % self.experiment.log.every:
            return False
        return multihost.any_process(self.stop.asked)

    def _preempted(self, step: int) -> Outcome:
        self._read()
        self.meter.pause()
        self._save(step)
        self.checkpoints.wait()
        if self.main:
            rundir.write_status(self.run_dir, "preempted", f"stopped by {self.stop.name} after step {step}", step=step)
        self.progress.say(f"Stopped after step {step}, checkpoint saved. The same command goes on from here.")
        return Outcome("preempted", {"step": step})

    def _recorded(self) -> Metrics:
        """What was logged of the last step, if a crash came between its checkpoint and `result.json`."""
        if self.first < self.total:
            return {}
        lines = [line for line in read_metrics(self.run_dir) if line["step"] == self.total]
        return {name: value for line in lines for name, value in line.items()}

    def _finish(self, recorded: Metrics) -> Outcome:
        self._save(self.total)
        self.checkpoints.wait()
        result: dict[str, Any] = {
            **recorded,
            "step": self.total,
            "train_seconds": self.meter.train_seconds,
            "parameters": self.experiment.parameter_count,
            **self.meter.last,
            **self.finals,
            **{f"reference/{name}": rate for name, rate in compressors(self.experiment.data.facts).items()},
        }
        if self.main:
            self.writers.close()  # type: ignore[union-attr]
            loss_picture(self.run_dir, _as_loss(self.experiment.data.facts))
            write_atomic(self.run_dir / "result.json", configs.to_json(result))
            rundir.write_status(self.run_dir, "finished", step=self.total)
        return Outcome("finished", result)

    def _write(self, step: int, metrics: Metrics) -> None:
        if self.writers is not None:
            self.writers.write(step, metrics)

    def _trace(self, step: int | None) -> None:
        if self.profile is None or not self.main:
            return
        first, count = self.profile
        if not self.tracing:
            if step == max(first, self.first):
                jax.profiler.start_trace(str(self.run_dir / "profile"))
                self.tracing = True
        elif step is None or step == max(first, self.first) + count:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.profile = None


def compressors(facts: Mapping[str, Mapping[str, Any]], split: str = "validation") -> dict[str, float]:
    """Bits per byte of general compressors on a split, where the data set knows them."""
    found = facts.get(split, {})
    return {
        f"{tool} -9": 8 * found[f"{tool}_bytes"] / found["bytes"] for tool in ("gzip", "xz") if f"{tool}_bytes" in found
    }


def _as_loss(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The same rates in nats a token, the unit of the loss."""
    found = facts.get("validation", {})
    return {
        name: rate * math.log(2) * found["bytes"] / (found["tokens"] - 1) for name, rate in compressors(facts).items()
    }


class _StopRequest:
    """SIGTERM and Ctrl-C as a flag that the loop looks at between steps; the second one stops at once."""

    def __init__(self) -> None:
        self.asked, self.name = False, ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        # Only the main thread may set handlers; a sweep that runs trials in threads keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked, self.name = True, signal.Signals(number).name
        signal.signal(number, self._previous[number])

"""The config sections that belong to the loop itself: their names, defaults and meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tfm_jax.errors import UserError
from tfm_jax.sections import Inside


@dataclass(frozen=True)
class Train:
    """Section `train`.

    Args:
      steps: updates in the whole run.
      seed: of parameters and dropout (data has its own).
      accum: microbatches an update; the batch stays `data.batch_size`.
      ema: decay of an exponential moving average of the parameters, used for evaluation; None for none.
      adapter: train a few numbers beside each kernel and nothing else: the arguments of `tasks.lora.wrap`, for instance
        `{"rank": 8}`, or of what its `name` says (`adalora`); None for all parameters.
      quantize: `(regex on a kernel's path, "int8" | "fp8")` pairs: products of these kernels in 8 bits while training, and not
        when evaluating; see `train.quantize`. Needs `pip install 'tfm_jax[quantize]'`.
      mup: maximal update parametrisation: sizes of a narrower base of the model, by their names in section `model`, for instance
        `{"width": 64}`; initial values and learning rates then are the base's, carried over, and `optim.lr` is right for both. See
        `train.mup`; None for the standard parametrisation.
      eval_every: steps between evaluations; 0 for only at the end.
      stop_metric: end the run before its last step when this metric, `eval/NAME/KEY`, has not become better for
        `stop_patience` evaluations; None for never. To have the best step's checkpoint then, let checkpoint.every be
        train.eval_every and checkpoint.keep more than the patience.
      stop_patience: how many.
      stop_goal: whether `lower` or `higher` is better.
      max_bad_steps: stop after this many updates in a row whose loss or gradient was not finite.
    """

    steps: int
    seed: int = 0
    accum: int = 1
    ema: float | None = None
    adapter: Annotated[Mapping[str, Any] | None, Inside("adapter")] = None
    quantize: Sequence[Any] = ()
    mup: Mapping[str, Any] | None = None
    eval_every: int = 0
    stop_metric: str | None = None
    stop_patience: int = 3
    stop_goal: Literal["lower", "higher"] = "lower"
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accum", 1), ("eval_every", 0), ("stop_patience", 1), ("max_bad_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"train.{name}={getattr(self, name)}: must be at least {least}.")
        if self.stop_metric is not None and not self.eval_every:
            raise UserError(
                f"train.stop_metric={self.stop_metric!r} is looked at when evaluating: set train.eval_every."
            )

    def stale(self, history: Sequence[float]) -> bool:
        """Whether a metric's values at each evaluation so far say that the run should end."""
        if len(history) <= self.stop_patience:
            return False
        best, worst = (min, math.inf) if self.stop_goal == "lower" else (max, -math.inf)
        # A correlation of predictions that are all alike is NaN, which is no progress and compares with nothing.
        history = [worst if math.isnan(value) else value for value in history]
        return history.index(best(history)) < len(history) - self.stop_patience


@dataclass(frozen=True)
class Checkpoint:
    """Section `checkpoint`.

    Args:
      every: steps between checkpoints; 0 for only at the end.
      keep: how many to keep.
      asynchronous: write in a background thread.
      resume: a run or checkpoint folder whose whole state, its step and optimizer included, this run begins with, if it has no
        checkpoint yet; what its config has otherwise is said.
      init_from: a run or checkpoint folder whose parameters start this run, if it has no checkpoint yet.
      rename: `(regex, replacement)` pairs applied to the donor's parameter paths.
      layers: of the donor, the ones that become this model's, in this order: a student from some of its teacher's. None
        for all.
      resize_positions: stretch or cut the donor's position tables to this model's length, by linear interpolation.
    """

    every: int = 500
    keep: int = 3
    asynchronous: bool = True
    resume: str | None = None
    init_from: str | None = None
    rename: Sequence[Any] = ()
    layers: Sequence[int] | None = None
    resize_positions: bool = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"checkpoint.every={self.every}: must be at least 0.")
        if self.keep < 1:
            raise UserError(f"checkpoint.keep={self.keep}: must be at least 1.")
        if self.resume and self.init_from:
            raise UserError("checkpoint.resume and checkpoint.init_from exclude each other: give one.")
        for name in ("rename", "layers", "resize_positions"):
            if (value := getattr(self, name)) and self.init_from is None:
                raise UserError(f"checkpoint.{name}={value}: says how to read checkpoint.init_from, which is not set.")


@dataclass(frozen=True)
class Log:
    """Section `log`.

    Args:
      every: steps between lines.
      tensorboard: write event files.
      wandb: Weights & Biases project to log to, `project` or `entity/project`; needs `pip install 'tfm_jax[wandb]'`.
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"log.every={self.every}: must be at least 1.")

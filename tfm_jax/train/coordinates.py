"""The coordinate check: how far activations move in the first steps, at several widths.

Yang et al. 2022 (arXiv 2203.03466), appendix D.1: where a parametrisation is right, every activation moves as far in a wide model
as in a narrow one; where it is not, some move further with every doubling, and the learning rate has to follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model
from tfm_jax.tasks.base import bind
from tfm_jax.train import mup
from tfm_jax.train.build import build

# By name of the quantity, in the order of its steps.
Moves = dict[str, list[float]]
NAMES = {"standard": "standard parametrisation", "mup": "muP"}


def at_width(config: configs.Config, width: int, parametrisation: str, base: int) -> configs.Config:
    """The config at another width, standard or by muP; at the base both are one.

    The standard one has one rate for all, and the variance of all that `init_std` draws falls with the width. For kernels and
    output weights that is the paper's table 3; tables of tokens and positions keep theirs in it, as by muP. Here one setting
    draws them all, and tied to the logits the table of tokens is the output weights, whose variance has to fall.

    Args:
      base: the width of the base where `train.mup` does not say.

    Raises:
      UserError: a model that muP does not know, or without an `init_std`.
    """
    sizes = config["train"]["mup"] or {"width": base}
    if all(size == (config["model"] | {"width": width}).get(name) for name, size in sizes.items()):
        return configs.changed(config, {"model.width": width, "train.mup": None})
    wide = configs.changed(config, {"model.width": width, "train.mup": sizes})
    mup.check(wide)
    if parametrisation == "mup":
        return wide
    model = build_model(config["model"])
    std = getattr(getattr(model, "block", model), "init_std", None)
    if std is None:
        raise UserError(
            "The coordinate check's standard parametrisation scales model.init_std, the standard deviation that weights begin with,"
            f" and model.name={config['model']['name']!r} has no such field. Give it one."
        )
    std *= (sizes.get("width", base) / width) ** 0.5
    return configs.changed(config, {"model.width": width, "model.init_std": std, "train.mup": None})


def moves(config: configs.Config, *, steps: int) -> Moves:
    """Root mean square of the change since initialisation, on the first batch, after each of `steps` updates.

    Of `logits`, and of what the blocks say of themselves: attention `scores` and `states`, by their paths.
    """
    # Constant from the first step on: a warm-up would hide what a step does.
    experiment = build(configs.changed(config, {"optim.schedule": "constant", "optim.warmup_steps": 0}))
    model = experiment.model

    def seen(params: Any, inputs: Any) -> dict[str, jax.Array]:
        out = bind(model, {})(params, **inputs, train=False, capture=True)
        if "logits" not in out:
            raise UserError(f"The coordinate check looks at logits; this model returns {', '.join(sorted(out))}.")
        return {**flatten(out["captured"]), "logits": out["logits"]}

    @jax.jit
    def moved(before: Any, after: Any, inputs: Any) -> dict[str, jax.Array]:
        pairs = jax.tree.map(
            lambda a, b: b.astype(jnp.float32) - a.astype(jnp.float32), *(seen(p, inputs) for p in (before, after))
        )
        return {name: jnp.sqrt(jnp.mean(jnp.square(x))) for name, x in pairs.items()}

    found: Moves = {}
    with jax.set_mesh(experiment.layout.mesh):
        state, first = experiment.fresh_state(), experiment.batch(0)
        before, step = jax.tree.map(jnp.copy, state.params), experiment.jitted_step()
        for i in range(steps):
            state, _ = step(state, experiment.batch(i))
            for name, x in jax.device_get(moved(before, state.params, first["inputs"])).items():
                found.setdefault(name, []).append(float(x))
    return found


def slopes(by_width: Mapping[int, Sequence[Moves]]) -> dict[str, float]:
    """By quantity, the power of the width that its change grows with after the last step; 0 is flat, 1 doubles.

    Args:
      by_width: for each width, the moves of each seed.

    Raises:
      UserError: something has not moved, or no longer by a finite number: nothing follows from it.
    """
    x = np.log2(list(by_width))
    found = {}
    for name in next(iter(by_width.values()))[0]:
        for width, seeds in by_width.items():
            for moved in (m[name][-1] for m in seeds):
                if not (math.isfinite(moved) and moved > 0):
                    raise UserError(
                        f"Coordinate check: after the last step at width {width}, {name} has moved by {moved}, which has"
                        " no place on a line over the widths. Lower optim.lr if it diverges; raise it if nothing moves."
                    )
        y = [np.mean([np.log2(m[name][-1]) for m in seeds]) for seeds in by_width.values()]
        found[name] = float(np.polyfit(x, y, 1)[0])
    return found


def draw(path: Path, by_name: Mapping[str, Mapping[int, Sequence[Moves]]]) -> None:
    """The changes over the widths, for each parametrisation beside the others; pale after one step, dark after the last."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(by_name), sharey=True, squeeze=False)[0]
    for axes, (parametrisation, by_width) in zip(panels, by_name.items(), strict=True):
        first = next(iter(by_width.values()))[0]
        for i, name in enumerate(first):
            for step, alpha in ((0, 0.35), (len(first[name]) - 1, 1.0)):
                y = [2 ** np.mean([np.log2(m[name][step]) for m in seeds]) for seeds in by_width.values()]
                label = name.removeprefix("stack/") if alpha == 1.0 else None
                axes.plot(list(by_width), y, color=f"C{i}", alpha=alpha, label=label, marker="o", markersize=3)
        axes.set(title=NAMES.get(parametrisation, parametrisation), xlabel="width", xscale="log", yscale="log")
        axes.set_xticks(list(by_width), [str(width) for width in by_width], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    last = len(next(iter(first.values())))
    panels[0].set_ylabel(f"change after 1 and {last} steps (root mean square)")
    panels[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

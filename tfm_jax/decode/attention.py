"""What a model looks at: the attention weights of chosen heads on one input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from tfm_jax.errors import UserError
from tfm_jax.nn.capture import LOOKED
from tfm_jax.paths import flatten


class Weights(NamedTuple):
    """Of one layer: `where` is its path, `weights` (H, T, S) float32."""

    where: str
    weights: np.ndarray


def attention_weights(model: nn.Module, params: Any, inputs: dict[str, Any]) -> list[Weights]:
    """Of each attention layer in the order of the model, on inputs of one row, without dropout.

    Raises:
      UserError: the model's attention does not say what it looks at (Longformer, Transformer-XL, one of your own).
    """

    def run(params: Any, inputs: dict[str, Any]) -> Any:
        return model.apply({"params": params}, **inputs, train=False, mutable=[LOOKED])[1]

    said = flatten(jax.device_get(jax.jit(run)(params, inputs)))
    out = []
    for path in sorted(said, key=_by_number):
        x = said[path]
        where = path.removeprefix(f"{LOOKED}/").removesuffix("/weights")
        # Scanned and shared layers have an axis in front.
        layers = x[None] if x.ndim == 4 else x
        out += [Weights(where if x.ndim == 4 else f"{where}/{i}", layer[0]) for i, layer in enumerate(layers)]
    if not out:
        raise UserError("The attention of this model does not say what it looks at.")
    return out


def _by_number(path: str) -> list[tuple[int, str]]:
    """`block_2` before `block_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def chosen(layers: Sequence[Weights], heads: Sequence[str], most: int = 12) -> list[tuple[str, np.ndarray]]:
    """The asked `LAYER.HEAD`, both from 0, with a title; of as many layers as `most` allows all heads where none is asked.

    Raises:
      UserError: a head that does not exist.
    """
    known = {f"{i}.{h}": (i, h) for i, layer in enumerate(layers) for h in range(len(layer.weights))}
    wanted = list(heads) or list(known)[:most]
    for name in wanted:
        if name not in known:
            raise UserError(f"--heads={name}: heads are LAYER.HEAD, from 0.0 to {list(known)[-1]}.")
    out = []
    for name in wanted:
        i, h = known[name]
        out.append((f"{name}  {layers[i].where}", layers[i].weights[h]))
    return out

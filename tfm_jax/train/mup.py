"""Maximal update parametrisation: initial values and learning rates of a model from those of a narrower base.

Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), table 8: a parameter is W = a w, where w begins with b times its
standard deviation at the base's width and learns at c times the rate. The factors a, which others multiply logits and attention
scores by, are in the parameters here: W begins at a b, its gradient is taken times a, and its update again. That is the same
training, and the model stays an ordinary one for decoding, conversion, kernels and meshes.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tfm_jax import config as configs
from tfm_jax import models
from tfm_jax.errors import UserError
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten, map_with_path
from tfm_jax.sections import build_model, family

# Parameters of one infinite dimension, their last: a width's worth of numbers for each of a fixed number of entries.
_VECTORS = re.compile(r"(embedding|bias|scale|_token)$")
_QUERY = re.compile(r"(^|/)query(_global)?/(kernel|bias)$")
_QUERY_NORM = re.compile(r"(^|/)query_norm/scale$")
# Initial values that do not follow the width by themselves.
_INITS = ("gpt2", "normal")


class Scale(NamedTuple):
    """A parameter's factors; at the base's own width each is 1.

    Attributes:
      multiplier: a.
      init: b.
      rate: c.
    """

    multiplier: float = 1.0
    init: float = 1.0
    rate: float = 1.0


Scales = Mapping[str, Scale]  # by path


def check(config: configs.Config) -> None:
    """Refuse what has no such parametrisation.

    Raises:
      UserError: with the nearest that has.
    """
    sizes = config["train"].get("mup")
    if sizes is None:
        return
    if not sizes:
        raise UserError("train.mup={}: name the base's sizes, for instance train.mup.width=64.")
    name, optim = config["model"]["name"], config["optim"]
    if family(name, "READOUT", None) is None:
        raise UserError(
            f"train.mup: model.name={name!r} does not say where its width ends. Those that do: {_families()}."
        )
    own, base = (getattr(build_model(section), "block", None) for section in (config["model"], base_section(config)))
    if isinstance(own, BlockSpec) and isinstance(base, BlockSpec):
        _check_blocks(own, base)
    if config["train"]["adapter"] is not None:
        raise UserError(
            "train.mup: train.adapter trains beside a model that has its width already. Leave out one of them."
        )
    if optim["name"] == "adafactor" and (optim["options"] or {}).get("multiply_by_parameter_scale", True):
        raise UserError(
            "train.mup: adafactor's updates follow the parameters' own size. Set"
            " optim.options={'multiply_by_parameter_scale': False}, or optim.name='adamw'."
        )


def _families() -> str:
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    return ", ".join(n for n in names if hasattr(importlib.import_module(f"{models.__name__}.{n}"), "READOUT"))


def _check_blocks(own: BlockSpec, base: BlockSpec) -> None:
    if own.init not in _INITS:
        raise UserError(
            f"train.mup: model.init={own.init!r} follows the width in a way of its own. Use"
            f" {' or '.join(map(repr, _INITS))}."
        )
    inside = {"mlp_width": (own.hidden, base.hidden), "heads": (own.heads * own.key_size, base.heads * base.key_size)}
    for name, (size, small) in inside.items():
        if own.width != base.width and size == small:
            near = max(1, round(getattr(own, name) * base.width / own.width))
            raise UserError(
                f"train.mup: the base is {base.width} wide, the model {own.width}, but inside their blocks both have {size}"
                f" (model.{name}). Set train.mup.{name} too, for instance {near}."
            )


def base_section(config: configs.Config) -> dict[str, Any]:
    """The section `model` of the base.

    Raises:
      UserError: fields that do not exist, or sizes that cannot be.
    """
    try:
        changes = {f"model.{name}": size for name, size in config["train"]["mup"].items()}
        section: dict[str, Any] = configs.changed(config, changes)["model"]
        return section
    except UserError as error:
        raise UserError(f"train.mup, the base: {error}") from None


def scales(config: configs.Config, shapes: Callable[[Any], Any]) -> Scales | None:
    """The factors of every parameter of a checked config; None where all are 1: without `train.mup`, and at the base itself.

    Args:
      shapes: from a model, its abstract parameters, as they are trained.
    """
    if config["train"].get("mup") is None:
        return None
    section = base_section(config)
    own, base = build_model(config["model"]), build_model(section)
    tokens = "tokens" in getattr(own, "outputs", ("tokens",))
    found = from_shapes(
        shapes(own),
        shapes(base),
        readout=family(section["name"], "READOUT", ()) if tokens else (),
        scores=_scores(getattr(own, "block", None), getattr(base, "block", None)),
        orthogonal=config["optim"]["name"] == "muon",
    )
    return found if any(scale != Scale() for scale in found.values()) else None


def _scores(own: Any, base: Any) -> float:
    """What attention scores are multiplied by to be q k / K times a constant, and as they are at the base (definition 4.1)."""
    if not isinstance(own, BlockSpec) or not isinstance(base, BlockSpec):
        return 1.0
    # The model itself divides by sqrt(K), or by nothing.
    return (base.key_size / own.key_size) ** (0.5 if own.attention_scale == "sqrt" else 1.0)


def from_shapes(
    params: Any, base: Any, *, readout: tuple[str, ...] = (), scores: float = 1.0, orthogonal: bool = False
) -> dict[str, Scale]:
    """Table 8, by which of a parameter's dimensions differ from the base's.

    Args:
      params, base: abstract parameters; kernels end in (fan in, fan out), a leading axis of layers or experts is free.
      readout: a family's READOUT: patterns, of which the first that matches anything counts.
      scores: multiplier of the attention scores.
      orthogonal: whether updates of kernels are orthogonal with the root mean square of AdamW's (`optim` `muon`).

    Raises:
      UserError: other paths, or other sizes in a dimension that is no width.
    """
    leaves, small = flatten(params), flatten(base)
    if leaves.keys() != small.keys():
        raise UserError(
            f"train.mup: the base has other parameters: {', '.join(sorted(leaves.keys() ^ small.keys())[:4])}. It may differ"
            " in widths alone."
        )
    last = next((p for p in map(re.compile, readout) if any(p.search(path) for path in leaves)), None)
    if readout and last is None:
        raise UserError(
            f"train.mup: the model has no parameter to scale its logits by ({', '.join(readout)}): of gpt, with"
            " model.norm_position='post', only one with model.output='free' has."
        )
    queries = _QUERY_NORM if any(_QUERY_NORM.search(path) for path in leaves) else _QUERY
    found = {}
    for path, x in leaves.items():
        a, b = x.shape, small[path].shape
        widths = min(len(a), 1 if _VECTORS.search(path) else 2)
        if len(a) != len(b) or a[: len(a) - widths] != b[: len(b) - widths]:
            raise UserError(f"train.mup: {path} is {a}, at the base {b}: other than a width. Change widths alone.")
        scale = _matrix(a[-2:], b[-2:], orthogonal and path.endswith("/kernel")) if widths == 2 else Scale()
        if last is not None and last.search(path):
            scale = scale._replace(multiplier=scale.multiplier * b[-1] / a[-1])
        if queries.search(path):
            scale = scale._replace(multiplier=scale.multiplier * scores)
        found[path] = scale
    return found


def _matrix(own: tuple[int, ...], base: tuple[int, ...], orthogonal: bool) -> Scale:
    """A kernel by its (fan in, fan out): into the width (only the second grows), inside it (both), or out of it (the first)."""
    fan = base[0] / own[0]
    out = own[1] == base[1]
    scale = Scale(multiplier=fan) if out else Scale(init=fan**0.5, rate=fan)
    if orthogonal:
        # An update's spectral norm goes with sqrt(fan out / fan in) (Yang et al. 2023, arXiv 2310.17813, condition 1); that of
        # an orthogonal one with AdamW's size with sqrt(max(fan in, fan out)).
        size = math.sqrt(own[1] / own[0] / max(own)) / math.sqrt(base[1] / base[0] / max(base))
        scale = scale._replace(rate=size / scale.multiplier)
    return scale


def initial(params: Any, scales: Scales) -> Any:
    """A model's initial parameters, times a b."""
    return map_with_path(lambda path, x: x * (scales[path].multiplier * scales[path].init), params)

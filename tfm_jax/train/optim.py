"""Optimizers by name, from optax: update rule, schedule, decay, clipping, per-parameter rates and freezing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from optax import contrib

from tfm_jax.errors import UserError, nearest
from tfm_jax.paths import compile_patterns, flatten, map_with_path, values_by_pattern
from tfm_jax.tasks.adapters import KEY as ADAPTER
from tfm_jax.tasks.distillation import BRIDGE
from tfm_jax.train import schedules
from tfm_jax.train.moments import Moments, stored
from tfm_jax.train.mup import Scales

Name = Literal["adamw", "adafactor", "lion", "muon"]


class Optimizer(NamedTuple):
    tx: optax.GradientTransformation
    schedule: optax.Schedule


def make(
    params: Any,
    *,
    steps: int,
    name: Name = "adamw",
    lr: float = 1e-3,
    schedule: schedules.Name = "cosine",
    warmup_steps: int = 100,
    end_factor: float = 0.1,
    decay_fraction: float = 0.2,
    weight_decay: float = 0.1,
    decay_pattern: str = r"(kernel|embedding)$",
    clip_norm: float | None = 1.0,
    lr_multipliers: Sequence[Any] = (),
    layer_decay: float = 1.0,
    freeze: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    moments: Moments = "float32",
    scales: Scales | None = None,
) -> Optimizer:
    """The config section `optim` (its `steps` is `train.steps`, its `scales` come of `train.mup`).

    Args:
      params: abstract parameters, for the patterns.
      name: `adamw` (Loshchilov and Hutter 2019), `adafactor` (Shazeer and Stern 2018), `lion` (Chen et al. 2023), or
        `muon` (Jordan 2024), which orthogonalises the updates of all kernels, heads' and routers' too, and leaves the rest
        (embeddings, norms, biases, adapters) to AdamW.
      lr: peak learning rate.
      schedule, warmup_steps, end_factor, decay_fraction: see `schedules.make`.
      weight_decay: decoupled, times the learning rate.
      decay_pattern: regex; parameters that match are decayed, and the adapters of those that do.
      clip_norm: global gradient norm above which gradients are scaled down; None for no clipping.
      lr_multipliers: `(regex, factor)` pairs; the first that matches scales a parameter's update.
      layer_decay: the rate of each layer is that of the one above times this (Clark et al. 2020, appendix B); heads have the
        full one, embeddings the lowest. 1 for none.
      freeze: regexes; parameters that match get no update and no moments.
      options: further arguments of the update rule, for instance `{"b1": 0.9, "b2": 0.95}`.
      moments: what the rule's moments are kept in: `float32`, `bfloat16` (2 bytes a number) or `int8` (1.125); see
        `train.moments`.

    Raises:
      UserError: an unknown option, a pattern that matches nothing, a value out of range.
    """
    rate = schedules.make(
        schedule=schedule,
        lr=lr,
        steps=steps,
        warmup_steps=warmup_steps,
        end_factor=end_factor,
        decay_fraction=decay_fraction,
    )
    if weight_decay < 0:
        raise UserError(f"optim.weight_decay={weight_decay}: must be at least 0.")
    if clip_norm is not None and clip_norm <= 0:
        raise UserError(f"optim.clip_norm={clip_norm}: must be above 0, or None for no clipping.")
    # The gradient of w where the parameter is a w.
    parts = [] if scales is None else [_scale_each(flat_lookup({p: s.multiplier for p, s in scales.items()}))]
    parts += [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parts += [rule(name, options or {}, moments)]
    if scales is not None:
        # In front of the decay, which takes the same share at every width (Wang and Aitchison 2024, arXiv 2405.13698).
        parts += [_scale_each(flat_lookup({p: s.multiplier * s.rate for p, s in scales.items()}))]
    if weight_decay:
        decayed = values_by_pattern(params, [(decay_pattern, True)], False, setting="optim.decay_pattern")
        decayed = map_with_path(lambda path, found: found or _adapts(path, decay_pattern), decayed)
        # Frozen parameters reach the chain as masked nodes, so the mask is looked up by path and not given as a tree.
        parts += [optax.add_decayed_weights(weight_decay, mask=_lookup(decayed))]
    if lr_multipliers:
        pairs = [_pair(rule) for rule in lr_multipliers]
        parts += [_scale_each(_lookup(values_by_pattern(params, pairs, 1.0, setting="optim.lr_multipliers")))]
    if not 0 < layer_decay <= 1:
        raise UserError(f"optim.layer_decay={layer_decay}: must lie in (0, 1].")
    if layer_decay < 1:
        parts += [_scale_each(flat_lookup(layer_factors(params, layer_decay)))]
    parts += [optax.scale_by_learning_rate(rate)]
    tx = optax.chain(*parts)
    if freeze:
        labels = values_by_pattern(params, [(p, "frozen") for p in freeze], "trained", setting="optim.freeze")
        if all(label == "frozen" for label in jax.tree.leaves(labels)):
            raise UserError(f"optim.freeze={tuple(freeze)} freezes every parameter.")
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    return Optimizer(tx, rate)


def _adafactor(**options: Any) -> optax.GradientTransformation:
    scale_by_parameter, threshold = (
        options.pop("multiply_by_parameter_scale", True),
        options.pop("clipping_threshold", 1.0),
    )
    parts = [optax.scale_by_factored_rms(**options)]
    parts += [] if threshold is None else [optax.clip_by_block_rms(threshold)]
    parts += [optax.scale_by_param_block_rms()] if scale_by_parameter else []
    return optax.chain(*parts)


def _muon(**options: Any) -> optax.GradientTransformation:
    adam = {key: options.pop(f"adam_{key}") for key in ("b1", "b2", "eps") if f"adam_{key}" in options}
    consistent_rms = options.pop("consistent_rms", 0.2)  # Liu et al. 2025, section 2.2: AdamW's rates carry over

    def dimensions(tree: Any) -> Any:
        # Kernels end in (in, out); a scanned stack's leading layer axis is a batch of matrices.
        def pick(path: str, x: Any) -> Any:
            if isinstance(x, optax.MaskedNode) or not _is_kernel(path):
                return optax.MaskedNode()
            return contrib.MuonDimensionNumbers(reduction_axis=(x.ndim - 2,), output_axis=(x.ndim - 1,))

        return map_with_path(pick, tree)

    def label(tree: Any) -> Any:
        return map_with_path(lambda path, _: "muon" if _is_kernel(path) else "adam", tree)

    orthogonal = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=dimensions, **options),
        _scale_by_shape(consistent_rms),
    )
    return optax.partition({"muon": orthogonal, "adam": optax.scale_by_adam(**adam)}, label)


def _is_kernel(path: str) -> bool:
    return path.endswith("/kernel")


def _scale_by_shape(factor: float) -> optax.GradientTransformation:
    """Give an orthogonal update the root mean square of AdamW's, whatever the matrix's shape."""
    return optax.stateless(lambda u, _: jax.tree.map(lambda x: x * (factor * max(x.shape[-2:]) ** 0.5), u))


# The arguments that `options` may name, beside those of the optax function.
_RULES: dict[str, tuple[Callable[..., optax.GradientTransformation], Callable[..., Any], tuple[str, ...]]] = {
    "adamw": (optax.scale_by_adam, optax.scale_by_adam, ()),
    "lion": (optax.scale_by_lion, optax.scale_by_lion, ()),
    "adafactor": (_adafactor, optax.scale_by_factored_rms, ("multiply_by_parameter_scale", "clipping_threshold")),
    "muon": (_muon, contrib.scale_by_muon, ("adam_b1", "adam_b2", "adam_eps", "consistent_rms")),
}


def rule(name: str, options: Mapping[str, Any], moments: Moments = "float32") -> optax.GradientTransformation:
    """The update rule by itself; an unknown name or option is a `UserError` with the nearest valid one."""
    if name not in _RULES:
        raise UserError(f"optim.name={name!r} does not exist.{nearest(name, _RULES)}")
    build, signature, more = _RULES[name]
    known = (set(inspect.signature(signature).parameters) - {"weight_dimension_numbers"}) | set(more)
    for key in options:
        if key not in known:
            raise UserError(f"optim.options.{key} is not an option of {name!r}.{nearest(key, known)}")
    if name == "adafactor" and moments != "float32":
        raise UserError(f"optim.moments={moments!r}: adafactor's are a row and a column of each kernel. Use 'float32'.")
    return stored(build(**options), moments)


def _pair(rule: Any) -> tuple[str, float]:
    try:
        pattern, factor = rule
        return str(pattern), float(factor)
    except (TypeError, ValueError):
        raise UserError(f"optim.lr_multipliers: {rule!r} is not a pair (regex, factor).") from None


def _adapts(path: str, pattern: str) -> bool:
    """Whether a parameter is an adapter's factor, whose kernel's path is one that matches."""
    return path.startswith(f"{ADAPTER}/") and re.search(pattern, path.rpartition("/")[0]) is not None


def check_trained(params: Any, lr_multipliers: Sequence[Any], freeze: Sequence[str]) -> None:
    """Each of `optim.lr_multipliers` must match a parameter that is trained, if it matches any."""
    held, names = compile_patterns(freeze, setting="optim.freeze"), list(flatten(params))
    for pattern in compile_patterns([_pair(rule)[0] for rule in lr_multipliers], setting="optim.lr_multipliers"):
        found = [name for name in names if pattern.search(name)]
        if found and all(any(one.search(name) for one in held) for name in found):
            raise UserError(
                f"optim.lr_multipliers: the pattern {pattern.pattern!r} matches only parameters that are frozen, such as {found[0]}."
            )


def _lookup(values: Any) -> Callable[[Any], Any]:
    return flat_lookup(flatten(values))


def flat_lookup(table: Mapping[str, Any]) -> Callable[[Any], Any]:
    return lambda tree: map_with_path(lambda path, _: table[path], tree)


# An adapter is as deep as its kernel, whose path it has below its own branch.
_BLOCK, _BLOCKS = (re.compile(rf"(?:{ADAPTER}/)?{path}") for path in (r"(.*?)block_(\d+)/", r"(.*?)blocks/"))
# Named by embeddings, but at the other end: an output's own table, and what leads from a student's states to its teacher's.
_HEAD = re.compile(rf"(^|/)unembedding/|^{BRIDGE}/")


def layer_factors(params: Any, decay: float) -> dict[str, Any]:
    """decay^(L - i) for layer i of a stack of L, from 0; decay^(L + 1) for embeddings of the deepest stack, else 1.

    Of stacked layers a factor each, (L, 1, ..).
    """
    leaves, depth = flatten(params), dict[str, int]()
    for path, x in leaves.items():
        if found := _BLOCK.match(path):
            depth[found[1]] = max(depth.get(found[1], 0), int(found[2]) + 1)
        elif found := _BLOCKS.match(path):
            depth[found[1]] = x.shape[0]
    if not depth:
        raise UserError(f"optim.layer_decay={decay}: this model has no stack of layers.")

    def factor(path: str, x: Any) -> Any:
        if found := _BLOCK.match(path):
            return decay ** (depth[found[1]] - int(found[2]))
        if found := _BLOCKS.match(path):
            layers = depth[found[1]]
            return decay ** np.arange(layers, 0, -1, dtype=np.float32).reshape(layers, *[1] * (len(x.shape) - 1))
        return decay ** (max(depth.values()) + 1) if "embedding" in path and not _HEAD.search(path) else 1.0

    return {path: factor(path, x) for path, x in leaves.items()}


def _scale_each(factors: Callable[[Any], Any]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors(updates)))

"""Bytes of a training state, and of what the backward pass is left, by the settings that change them: of shapes, on no device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax import config as configs
from tfm_jax.sections import build_model
from tfm_jax.train.build import build

CONFIG = "configs/pod.py:gpt2"
STATES: tuple[dict[str, str], ...] = (
    {},
    {"optim.moments": "bfloat16"},
    {"optim.moments": "int8"},
    {"mesh.optimizer_memory": "host"},
    {"optim.name": "lion", "optim.moments": "int8"},
)
POLICIES = (
    "none",
    "dots_batched",
    "dots",
    "(('attention/(query|key|value|mixed)|mlp/up','save'),)",
    "(('attention/mixed|mlp/up','save'),)",
    "full",
)
LENGTH = 1024


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def states() -> dict[str, dict[str, float]]:
    """Of the optimizer's state, bytes a parameter on the device and on the host."""
    found = {}
    for changes in STATES:
        config = configs.resolve(configs.load(CONFIG), list(changes.items()))
        experiment = build(config)
        arrays = jax.tree.leaves(experiment.abstract_state().opt)
        host = [x for x in arrays if x.sharding.memory_kind == "pinned_host"]
        name = " ".join(f"{key}={value}" for key, value in changes.items()) or "as it is"
        count = experiment.parameter_count
        found[name] = {"device": (_bytes(arrays) - _bytes(host)) / count, "host": _bytes(host) / count}
    return found


def activations() -> dict[str, float]:
    """Bytes that a policy keeps a token and layer beyond what `full` does."""
    found = {policy: _kept(policy) for policy in POLICIES}
    return {policy: size - found["full"] for policy, size in found.items()}


def _kept(policy: str) -> float:
    overrides = {"model.remat": policy, "model.attention": "xla"}
    section = configs.resolve(configs.load(CONFIG), list(overrides.items()))["model"]
    model = build_model({**section, "vocab_size": 64})
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]

    def backward(params: Any) -> Any:
        return jax.vjp(lambda p: model.apply({"params": p}, tokens, train=True)["hidden"], params)[1]

    return _bytes(jax.tree.leaves(jax.eval_shape(backward, params))) / LENGTH / section["layers"]

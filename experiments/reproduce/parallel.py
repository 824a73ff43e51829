"""Losses and gradients on meshes of 8 simulated devices beside one device: six models, each axis that they can have, each pair.

Everything in float32, so that all that differs is the order of sums. Writes `results/parallel.json`, and fails where a loss or a
gradient is further away than 1e-5 of its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import cli
from experiments.reproduce.record import write_result
from tfm_jax import config as configs
from tfm_jax.errors import UserError

EXAMPLES = "  python -m experiments.reproduce.parallel"
DEVICES, MOST = 8, 1e-5
_SIZE = {"width": 32, "heads": 8, "mlp_width": 64, "layer_loop": "scan", "init_std": 0.1, "dropout": 0.0}
_LAYERS = _SIZE | {"layers": 4, "max_len": 16}
_TOKENS = {"vocab_size": 64, "seq_len": 16}
_PAIRS = {"kind": "pairs", "vocab_size": 64, "seq_len": 16, "target_len": 8}
_LLAMA = {"norm": "rms", "mlp": "gated", "activation": "silu", "position": "rotary", "bias": "none", "output": "free"}
_EVERY = {"data": 8, "fsdp": 8, "tensor": 8, "stage": 4}
_CAUSAL = _EVERY | {"context": 4}
# Model, data, and the most that each axis can be. Routers without a balance: a pipeline's microbatch has one of its own.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "gpt2": ({"name": "gpt", **_LAYERS}, _TOKENS, _CAUSAL),
    "llama": ({"name": "gpt", **_LAYERS, **_LLAMA}, _TOKENS, _CAUSAL),
    "mixtral": (
        {
            "name": "gpt",
            **_LAYERS,
            **_LLAMA,
            "experts": 4,
            "expert_capacity": 1.0,
            "router_balance": 0.0,
            "router_z": 0.01,
        },
        _TOKENS,
        _CAUSAL | {"expert": 4},
    ),
    "t5": ({"name": "t5", **_SIZE, "encoder_layers": 4, "decoder_layers": 4}, _PAIRS, _EVERY),
    "bart": ({"name": "bart", **_SIZE, "encoder_layers": 4, "decoder_layers": 4, "max_len": 16}, _PAIRS, _EVERY),
    "vit": (
        {"name": "vit", **_SIZE, "layers": 4, "image_size": 16, "patch": 4},
        {"kind": "images", "image_size": 16, "classes": 8},
        _EVERY,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    made = cli.parser(str(__doc__), EXAMPLES)
    flags, _ = cli.parse(made, argv)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    cli.setup()
    rows, refused, worst = dict[str, float](), dict[str, str](), 0.0
    for name, (model, data, most) in FAMILIES.items():
        params, one = _loss_and_gradients(model, data, {}, None)
        for sizes in meshes(most):
            label = " ".join(f"{axis}={size}" for axis, size in sizes.items())
            try:
                _, got = _loss_and_gradients(model, data, sizes, params)
            except UserError as error:
                refused[f"{name} {label}"] = str(error)
                print(f"{name:8s} {label:20s} refused: {error}", flush=True)
                continue
            away = _away(got, one)
            worst = max(worst, away)
            rows[f"{name} {label}"] = away
            print(f"{name:8s} {label:20s} {away:.1e}", flush=True)
    figures = {"worst": worst, "limit": MOST, "cases": len(rows), "by_case": rows, "refused": refused}
    write_result("parallel", figures, config={name: list(family) for name, family in FAMILIES.items()}, seed=0)
    print(f"{len(rows)} cases, at most {worst:.1e} away (limit {MOST:.0e})")
    if flags.json:
        cli.print_json(figures)
    return int(worst > MOST)


def meshes(most: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Each axis by itself and each pair, the second as large as it can be."""
    for axis, size in most.items():
        yield {axis: size}
    for first, second in itertools.combinations(most, 2):
        size = min(most[second], DEVICES // 2)
        yield {first: DEVICES // size, second: size}


def _loss_and_gradients(
    model: Mapping[str, Any], data: Mapping[str, Any], sizes: Mapping[str, int], params: Any
) -> tuple[Any, dict[str, Any]]:
    """The parameters, fresh if None, and by path the gradients of the training loss, which is there too."""
    import jax

    from tfm_jax.paths import flatten
    from tfm_jax.tasks.base import bind
    from tfm_jax.train.build import build

    section = {"name": "synthetic", "batch_size": DEVICES, **data}
    config = {
        "model": dict(model),
        "data": section,
        "train": {"steps": 1},
        "optim": {"warmup_steps": 0},
        "mesh": {"data": 1, **sizes},
    }
    if data.get("kind") == "images":
        config["task"] = {"name": "classification"}
    built = build(configs.resolve(config), devices=jax.devices()[: math.prod(sizes.values())])

    def mean(params: Any, batch: Any) -> jax.Array:
        out = built.task.loss(bind(built.model, {}), params, {}, batch, None, True)
        return out.total / out.weight

    with jax.set_mesh(built.layout.mesh):
        places = jax.tree.map(lambda x: x.sharding, built.abstract_state().params)
        params = jax.device_get(built.fresh_state().params) if params is None else params
        run = jax.jit(jax.value_and_grad(mean), out_shardings=(None, places))
        value, grads = jax.device_get(run(jax.device_put(params, places), built.batch(0)))
    return params, {"loss": value, **flatten(grads)}


def _away(got: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    """The largest difference over the array's largest value, or over a thousandth of the gradient's norm where that is more."""
    import numpy as np

    norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for path, x in want.items() if path != "loss"))
    sizes = {path: max(float(np.max(np.abs(x))), 1e-3 * norm) for path, x in want.items()}
    return max(float(np.max(np.abs(got[path] - x))) / sizes[path] for path, x in want.items())


if __name__ == "__main__":
    cli.run(main)

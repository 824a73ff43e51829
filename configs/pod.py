"""Models that need a pod, to be planned: `:gpt2`, `:llama_70b`, `:mixtral_8x7b`, `:vit_large`, `:t5_3b`.

    python -m experiments.plan --config=configs/pod.py:gpt2 --topology=v5e:2x4
    python -m experiments.plan --config=configs/pod.py:llama_70b --topology=v5p:8x8x16
    python -m experiments.plan --config=configs/pod.py:mixtral_8x7b --topology=v5p:8x8x8
    python -m experiments.plan --config=configs/pod.py:vit_large --topology=v5e:4x4
    python -m experiments.plan --config=configs/pod.py:t5_3b --topology=v5e:4x4

Data is drawn (`data.name=synthetic`), so that they also measure the speed of devices that are there. `:smoke` is a tiny one.
"""

from __future__ import annotations

from typing import Any

import ml_collections

_LAYERS = {"dtype": "bfloat16", "layer_loop": "scan", "remat": "full"}
_SPLIT = {"data": 1, "fsdp": -1}
# Model, data and mesh.
_PODS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gpt2": (
        {"name": "gpt", "variant": "gpt2", "dropout": 0.0, "attention_dropout": 0.0},
        {"vocab_size": 50257, "seq_len": 1024, "batch_size": 64},
        _SPLIT,
    ),
    "llama_70b": (
        {"name": "gpt", "variant": "llama2-70b"},
        {"vocab_size": 32000, "seq_len": 4096, "batch_size": 1024},
        _SPLIT,
    ),
    "mixtral_8x7b": (
        {"name": "gpt", "variant": "mixtral-8x7b", "expert_capacity": 1.25},
        {"vocab_size": 32000, "seq_len": 4096, "batch_size": 1024},
        {"data": 1, "fsdp": -1, "expert": 8},
    ),
    "vit_large": (
        {"name": "vit", "variant": "vit-large-patch16-224"},
        {"kind": "images", "batch_size": 2048},
        _SPLIT,
    ),
    "t5_3b": (
        {"name": "t5", "variant": "t5-3b", "dropout": 0.0},
        {"kind": "pairs", "vocab_size": 32128, "seq_len": 512, "target_len": 114, "batch_size": 512},
        _SPLIT,
    ),
    "smoke": (
        {"name": "gpt", "variant": "llama-mini", "layers": 1, "width": 32, "mlp_width": 64, "max_len": 16},
        {"vocab_size": 61, "seq_len": 16, "batch_size": 8},
        {"data": -1},
    ),
}


def get_config(arguments: str = "gpt2") -> ml_collections.ConfigDict:
    name = arguments or "gpt2"
    if name not in _PODS:
        raise ValueError(f"pod.py takes {', '.join(f':{name}' for name in _PODS)}, not {arguments!r}.")
    model, data, mesh = _PODS[name]
    smoke = name == "smoke"
    return ml_collections.ConfigDict(
        {
            "model": model if smoke else model | _LAYERS,
            "data": {"name": "synthetic", **data},
            "task": {"name": "classification" if data.get("kind") == "images" else "token_prediction"},
            "optim": {"lr": 3e-4, "warmup_steps": 1 if smoke else 100},
            "mesh": mesh,
            "train": {"steps": 20 if smoke else 1000},
            "checkpoint": {"every": 0},
            "evals": {"validation": {"split": "validation"}},
        }
    )

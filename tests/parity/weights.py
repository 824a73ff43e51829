"""Hugging Face's parameter names and layouts as this project's, for the tiny models of these tests.

GPT-2's Conv1D kernels are (in, out), query, key and value fused; Llama's Linear weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfm_jax.models.gpt import Model
from tfm_jax.nn.spec import BlockSpec

VOCAB, WIDTH, LAYERS, LENGTH = 61, 32, 2, 16
MODELS = {
    "gpt2": Model(BlockSpec(width=WIDTH, heads=4), vocab_size=VOCAB, max_len=LENGTH, layers=LAYERS),
    "llama": Model(
        BlockSpec(
            width=WIDTH,
            heads=4,
            kv_heads=2,
            mlp_width=48,
            norm="rms",
            mlp="gated",
            activation="silu",
            position="rotary",
            bias="none",
        ),
        vocab_size=VOCAB,
        max_len=LENGTH,
        layers=LAYERS,
        output="free",
    ),
}


def params(family: str, theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters, or gradients, of `MODELS[family]`."""
    return {"gpt2": _gpt2, "llama": _llama}[family](theirs)


def _gpt2(theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    def both(name: str, kind: str = "kernel") -> dict[str, np.ndarray]:
        return {kind: theirs[f"transformer.{name}.weight"], "bias": theirs[f"transformer.{name}.bias"]}

    def block(i: int) -> dict[str, Any]:
        fused = {key: np.split(x, 3, axis=-1) for key, x in both(f"h.{i}.attn.c_attn").items()}
        attention = {name: {key: fused[key][j] for key in fused} for j, name in enumerate(("query", "key", "value"))}
        return {
            "attention_norm": both(f"h.{i}.ln_1", "scale"),
            "attention": attention | {"out": both(f"h.{i}.attn.c_proj")},
            "mlp_norm": both(f"h.{i}.ln_2", "scale"),
            "mlp": {"up": both(f"h.{i}.mlp.c_fc"), "down": both(f"h.{i}.mlp.c_proj")},
        }

    return {
        "token_embedding": {"embedding": theirs["transformer.wte.weight"]},
        "position_embedding": {"embedding": theirs["transformer.wpe.weight"]},
        "stack": {f"block_{i}": block(i) for i in range(LAYERS)} | {"final_norm": both("ln_f", "scale")},
    }


def _llama(theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    def kernel(name: str) -> dict[str, np.ndarray]:
        return {"kernel": theirs[f"model.{name}.weight"].T}

    def scale(name: str) -> dict[str, np.ndarray]:
        return {"scale": theirs[f"model.{name}.weight"]}

    def block(i: int) -> dict[str, Any]:
        attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        return {
            "attention_norm": scale(f"layers.{i}.input_layernorm"),
            "attention": {ours: kernel(f"layers.{i}.self_attn.{name}") for ours, name in attention.items()},
            "mlp_norm": scale(f"layers.{i}.post_attention_layernorm"),
            "mlp": {ours: kernel(f"layers.{i}.mlp.{name}") for ours, name in mlp.items()},
        }

    return {
        "token_embedding": {"embedding": theirs["model.embed_tokens.weight"]},
        "stack": {f"block_{i}": block(i) for i in range(LAYERS)} | {"final_norm": scale("norm")},
        "unembedding": {"embedding": theirs["lm_head.weight"]},
    }

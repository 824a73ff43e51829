"""BART in `transformers`, and `models.bart` here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tfm_jax.convert.table import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Conversion,
    Fields,
    Row,
    Section,
    computed,
    each_layer,
    embedding,
    linear,
    norm,
)

# What these classes do not read.
UNREAD = (
    "num_hidden_layers",
    "add_bias_logits",
    "add_final_layer_norm",
    "classif_dropout",
    "extra_pos_embeddings",
    "force_bos_token_to_be_generated",
    "normalize_before",
    "normalize_embedding",
    "static_position_embeddings",
)
OFFSET = 2


def read_sides(c: Fields, *, vocab_size: int) -> dict[str, Any]:
    """The fields that BART and what is built like it share, defaults as theirs."""
    c.ignore(*UNREAD)
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        c.need(name, 0.0)
    c.need("is_decoder", False)
    c.need("tie_word_embeddings", True)
    return {
        "vocab_size": c.take("vocab_size", vocab_size),
        "max_len": c.take("max_position_embeddings", 1024),
        "width": c.take("d_model", 1024),
        "encoder_layers": c.take("encoder_layers", 12),
        "decoder_layers": c.take("decoder_layers", 12),
        "heads": _alike(c, "attention_heads", 16),
        "mlp_width": _alike(c, "ffn_dim", 4096),
        "activation": c.choose("activation_function", "gelu", ACTIVATIONS),
        "init_std": c.take("init_std", 0.02),
        "dropout": c.take("dropout", 0.1),
        "mlp_dropout": c.take("activation_dropout", 0.0),
        "attention_dropout": c.take("attention_dropout", 0.0),
        "embedding_scale": c.choose("scale_embedding", False, {True: "sqrt", False: "none"}),
    }


def _alike(c: Fields, name: str, default: int) -> Any:
    ours, theirs = c.take(f"encoder_{name}", default), c.take(f"decoder_{name}", default)
    if ours != theirs:
        c.problems.append(f"decoder_{name}={theirs!r} is not supported with encoder_{name}={ours!r}; what is: the same")
    return ours


def write_sides(m: Section) -> dict[str, Any]:
    hidden = m["mlp_width"] or 4 * m["width"]
    return {
        "vocab_size": m["vocab_size"],
        "max_position_embeddings": m["max_len"],
        "d_model": m["width"],
        "encoder_layers": m["encoder_layers"],
        "decoder_layers": m["decoder_layers"],
        "encoder_attention_heads": m["heads"],
        "decoder_attention_heads": m["heads"],
        "encoder_ffn_dim": hidden,
        "decoder_ffn_dim": hidden,
        "activation_function": ACTIVATION_NAMES[m["activation"]],
        "init_std": m["init_std"],
        "dropout": m["dropout"],
        "activation_dropout": m["mlp_dropout"],
        "attention_dropout": m["attention_dropout"],
        "scale_embedding": m["embedding_scale"] == "sqrt",
    }


def side_rows(m: Section, prefix: str, side: str) -> list[Row]:
    """The blocks of `encoder` or `decoder`."""
    theirs, ours = f"{prefix}{side}.layers.{{i}}.", f"{side}/block_{{i}}/"
    kinds = {"self_attn": "attention"} | ({"encoder_attn": "cross_attention"} if side == "decoder" else {})
    layer: list[Row] = []
    for their_kind, kind in kinds.items():
        for name, our_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            layer += linear(f"{theirs}{their_kind}.{name}", f"{ours}{kind}/{our_name}")
        layer += norm(f"{theirs}{their_kind}_layer_norm", f"{ours}{kind}_norm")
    layer += linear(f"{theirs}fc1", f"{ours}mlp/up") + linear(f"{theirs}fc2", f"{ours}mlp/down")
    layer += norm(f"{theirs}final_layer_norm", f"{ours}mlp_norm")
    return each_layer(layer, m[f"{side}_layers"])


def _read(c: Fields) -> dict[str, Any]:
    return read_sides(c, vocab_size=50265) | {"offset": OFFSET}


def _bart(prefix: str) -> Callable[[Section], list[Row]]:
    def table(m: Section) -> list[Row]:
        rows = embedding(f"{prefix}shared", "token_embedding")
        for side in ("encoder", "decoder"):
            rows += embedding(f"{prefix}{side}.embed_positions", f"{side}_position_embedding")
            rows += norm(f"{prefix}{side}.layernorm_embedding", f"{side}_embedding_norm")
            rows += side_rows(m, prefix, side)
        if prefix:
            # A buffer of theirs, which nothing trains.
            rows += computed("final_logits_bias", lambda: np.zeros((1, m["vocab_size"]), np.float32))
        return rows

    return table


def _conversion(architecture: str, prefix: str) -> Conversion:
    repeated = ("lm_head.weight", f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight")
    return Conversion(
        architecture,
        "bart",
        "bart",
        _read,
        write_sides,
        _bart(prefix),
        ties=lambda m: dict.fromkeys(repeated, f"{prefix}shared.weight"),
        data={"objective": "denoise"},
    )


CONVERSIONS = (_conversion("BartForConditionalGeneration", "model."), _conversion("BartModel", ""))

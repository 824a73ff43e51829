"""T5 in `transformers`, versions 1.0 and 1.1, and `models.t5` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.table import ACTIVATIONS, Conversion, Fields, Row, Section, each_layer, embedding, linear, norm

# Their name of the MLP, and our `mlp` and `activation`.
PROJECTIONS = {
    "relu": ("plain", "relu"),
    "gelu": ("plain", "gelu"),
    "gelu_new": ("plain", "gelu_tanh"),
    "silu": ("plain", "silu"),
    "gated-gelu": ("gated", "gelu_tanh"),
    "gated-relu": ("gated", "relu"),
    "gated-silu": ("gated", "silu"),
}
PROJECTION_NAMES = {ours: theirs for theirs, ours in PROJECTIONS.items()}


def _read(c: Fields) -> dict[str, Any]:
    c.need("is_decoder", False)
    c.ignore("n_positions")  # from before relative positions
    mlp, activation = c.choose("feed_forward_proj", "relu", PROJECTIONS)
    # What follows from that field; written out, another value would count instead.
    c.need("is_gated_act", mlp == "gated")
    c.need("dense_act_fn", *(name for name, ours in ACTIVATIONS.items() if ours == activation))
    layers, dropout = c.take("num_layers", 6), c.take("dropout_rate", 0.1)
    decoder_layers = c.take("num_decoder_layers")
    # Newer files say `tie_word_embeddings` of every model, and the difference in a field of its own.
    tied = c.take("tie_word_embeddings", True)
    scaled = c.take("scale_decoder_outputs", tied is not False)
    return {
        "vocab_size": c.take("vocab_size", 32128),
        "width": c.take("d_model", 512),
        "encoder_layers": layers,
        "decoder_layers": layers if decoder_layers is None else decoder_layers,
        "heads": c.take("num_heads", 8),
        "head_dim": c.take("d_kv", 64),
        "mlp_width": c.take("d_ff", 2048),
        "mlp": mlp,
        "activation": activation,
        "norm_eps": c.take("layer_norm_epsilon", 1e-6),
        "init_std": c.take("initializer_factor", 1.0),
        "dropout": dropout,
        "mlp_dropout": dropout,
        "attention_dropout": dropout,
        "relative_buckets": c.take("relative_attention_num_buckets", 32),
        "relative_max_distance": c.take("relative_attention_max_distance", 128),
        "output": "tied" if scaled else "free",
    }


def _write(m: Section) -> dict[str, Any]:
    return {
        "vocab_size": m["vocab_size"],
        "d_model": m["width"],
        "num_layers": m["encoder_layers"],
        "num_decoder_layers": m["decoder_layers"],
        "num_heads": m["heads"],
        "d_kv": m["head_dim"] or m["width"] // m["heads"],
        "d_ff": m["mlp_width"] or 4 * m["width"],
        "feed_forward_proj": PROJECTION_NAMES[m["mlp"], m["activation"]],
        "layer_norm_epsilon": m["norm_eps"],
        "initializer_factor": m["init_std"],
        "dropout_rate": m["dropout"],
        "relative_attention_num_buckets": m["relative_buckets"],
        "relative_attention_max_distance": m["relative_max_distance"],
        "tie_word_embeddings": m["output"] == "tied",
    }


def _side(m: Section, side: str) -> list[Row]:
    kinds = {"SelfAttention": "attention"} | ({"EncDecAttention": "cross_attention"} if side == "decoder" else {})
    ours, layer = f"{side}/block_{{i}}/", []
    for place, (their_kind, kind) in enumerate(kinds.items()):
        theirs = f"{side}.block.{{i}}.layer.{place}."
        for name, our_name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            layer += linear(f"{theirs}{their_kind}.{name}", f"{ours}{kind}/{our_name}", bias=False)
        layer += norm(f"{theirs}layer_norm", f"{ours}{kind}_norm", bias=False)
    theirs = f"{side}.block.{{i}}.layer.{len(kinds)}."
    names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if m["mlp"] == "gated" else {"wi": "up", "wo": "down"}
    for name, our_name in names.items():
        layer += linear(f"{theirs}DenseReluDense.{name}", f"{ours}mlp/{our_name}", bias=False)
    layer += norm(f"{theirs}layer_norm", f"{ours}mlp_norm", bias=False)
    return [
        *embedding(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{side}_relative_bias"),
        *each_layer(layer, m[f"{side}_layers"]),
        *norm(f"{side}.final_layer_norm", f"{side}/final_norm", bias=False),
    ]


def _t5(m: Section) -> list[Row]:
    return [
        *embedding("shared", "token_embedding"),
        *_side(m, "encoder"),
        *_side(m, "decoder"),
        *([] if m["output"] == "tied" else embedding("lm_head", "unembedding")),
    ]


# The head too in version 1.1: newer releases tie it in models that they make, and their config does not say so.
TIES = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), "shared.weight")

CONVERSIONS = (
    Conversion(
        "T5ForConditionalGeneration",
        "t5",
        "t5",
        _read,
        _write,
        _t5,
        ties=lambda m: TIES,
        # In files of version 1.0, where the reference has no use for it.
        skip=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
        data={"objective": "span"},
    ),
)

"""ALBERT in `transformers`, and `models.albert` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.bert import MASKED, POSITION_IDS, embedding_rows
from tfm_jax.convert.table import ACTIVATION_NAMES, ACTIVATIONS, Conversion, Fields, Row, Section, linear, norm, same


def _read(c: Fields) -> dict[str, Any]:
    c.need("num_hidden_groups", 1)
    c.need("inner_group_num", 1)
    c.need("position_embedding_type", "absolute")
    c.need("is_decoder", False)
    c.need("tie_word_embeddings", True)
    # Of the first release in TensorFlow; no version of the class has read them.
    c.ignore("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks", "eos_token_ids")
    width, narrow = c.take("hidden_size", 4096), c.take("embedding_size", 128)
    if width == narrow:
        c.problems.append(f"embedding_size={narrow!r} is not supported; what is: any but hidden_size")
    return {
        "vocab_size": c.take("vocab_size", 30000),
        "max_len": c.take("max_position_embeddings", 512),
        "embedding_width": narrow,
        "width": width,
        "layers": c.take("num_hidden_layers", 12),
        "heads": c.take("num_attention_heads", 64),
        "mlp_width": c.take("intermediate_size", 16384),
        "activation": c.choose("hidden_act", "gelu_new", ACTIVATIONS),
        "norm_eps": c.take("layer_norm_eps", 1e-12),
        "init_std": c.take("initializer_range", 0.02),
        "dropout": c.take("hidden_dropout_prob", 0.0),
        "attention_dropout": c.take("attention_probs_dropout_prob", 0.0),
        "types": c.take("type_vocab_size", 2),
    }


def _write(m: Section) -> dict[str, Any]:
    return {
        "vocab_size": m["vocab_size"],
        "max_position_embeddings": m["max_len"],
        "embedding_size": m["embedding_width"],
        "hidden_size": m["width"],
        "num_hidden_layers": m["layers"],
        "num_attention_heads": m["heads"],
        "intermediate_size": m["mlp_width"] or 4 * m["width"],
        "hidden_act": ACTIVATION_NAMES[m["activation"]],
        "layer_norm_eps": m["norm_eps"],
        "initializer_range": m["init_std"],
        "hidden_dropout_prob": m["dropout"],
        "attention_probs_dropout_prob": m["attention_dropout"],
        "type_vocab_size": m["types"],
    }


def _table(outputs: tuple[str, ...]) -> Any:
    theirs, ours = "albert.encoder.albert_layer_groups.0.albert_layers.0.", "stack/shared_block/"

    def table(m: Section) -> list[Row]:
        rows = embedding_rows(m, "albert.")
        rows += linear("albert.encoder.embedding_hidden_mapping_in", "embeddings/embedding_projection")
        for their_name, our_name in (("query", "query"), ("key", "key"), ("value", "value"), ("dense", "out")):
            rows += linear(f"{theirs}attention.{their_name}", f"{ours}attention/{our_name}")
        rows += norm(f"{theirs}attention.LayerNorm", f"{ours}attention_norm")
        rows += linear(f"{theirs}ffn", f"{ours}mlp/up") + linear(f"{theirs}ffn_output", f"{ours}mlp/down")
        rows += norm(f"{theirs}full_layer_layer_norm", f"{ours}mlp_norm")
        rows += linear("predictions.dense", "token_head/transform")
        rows += norm("predictions.LayerNorm", "token_head/norm") + same("predictions.bias", "token_head/bias")
        if "pair" in outputs:
            rows += linear("albert.pooler", "pooler/dense") + linear("sop_classifier.classifier", "pair_head/dense")
        return rows

    return table


def _conversion(architecture: str, outputs: tuple[str, ...], skip: tuple[str, ...] = ()) -> Conversion:
    ties = {"predictions.decoder.weight": "albert.embeddings.word_embeddings.weight"}
    ties["predictions.decoder.bias"] = "predictions.bias"
    return Conversion(
        architecture,
        "albert",
        "albert",
        lambda c: _read(c) | {"outputs": outputs},
        _write,
        _table(outputs),
        ties=lambda m: ties,
        skip=(POSITION_IDS, *skip),
        data=MASKED,
    )


CONVERSIONS = (
    _conversion("AlbertForPreTraining", ("tokens", "pair")),
    # Older files keep a pooler that this class does not use.
    _conversion("AlbertForMaskedLM", ("tokens",), (r"^albert\.pooler\.",)),
)

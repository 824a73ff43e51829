"""ALBERT in `transformers`, and `models.albert` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.bert import MASKED, POSITION_IDS, embedding_rows, read_encoder, write_encoder
from tfm_jax.convert.table import Conversion, Fields, Row, Section, linear, norm, same

_DEFAULTS = {
    "vocab_size": 30000, "hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16384,
    "hidden_act": "gelu_new", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _read(c: Fields) -> dict[str, Any]:
    c.need("num_hidden_groups", 1)
    c.need("inner_group_num", 1)
    # Of the first release in TensorFlow; no version of the class has read them.
    c.ignore("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks", "eos_token_ids")
    section = read_encoder(c, **_DEFAULTS)
    narrow = c.take("embedding_size", 128)
    if section["width"] == narrow:
        c.problems.append(f"embedding_size={narrow!r} is not supported; what is: any but hidden_size")
    return section | {"embedding_width": narrow}


def _write(m: Section) -> dict[str, Any]:
    return write_encoder(m) | {"embedding_size": m["embedding_width"]}


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
        prefix="albert.",
        skip=(POSITION_IDS, *skip),
        data=MASKED,
    )


CONVERSIONS = (
    _conversion("AlbertForPreTraining", ("tokens", "pair")),
    # Older files keep a pooler that this class does not use.
    _conversion("AlbertForMaskedLM", ("tokens",), (r"^albert\.pooler\.",)),
)

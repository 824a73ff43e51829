"""Longformer in `transformers`, and `models.longformer` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.bert import MASKED, POSITION_IDS, read_encoder, roberta_head, trunk_rows, write_encoder
from tfm_jax.convert.table import Conversion, Fields, Row, Section, each_layer, linear


def _read(c: Fields) -> dict[str, Any]:
    section = read_encoder(c)
    # The head's activation is GELU whatever the blocks' is.
    c.need("hidden_act", "gelu")
    # `attention_mode` chose between implementations in the authors' code.
    c.ignore("onnx_export", "attention_mode", "ignore_attention_mask")
    windows = c.take("attention_window")
    windows = 512 if windows is None else windows
    each = list(windows) if isinstance(windows, list) else [windows]
    if len(set(each)) != 1:
        c.problems.append(f"attention_window={windows!r} is not supported; what is: one window for all layers")
    offset = c.take("pad_token_id", 1) + 1
    return section | {"max_len": section["max_len"] - offset, "offset": offset, "window": each[0]}


def _write(m: Section) -> dict[str, Any]:
    return write_encoder(m) | {
        "max_position_embeddings": m["max_len"] + m["offset"],
        "pad_token_id": m["offset"] - 1,
        "attention_window": [m["window"]] * m["layers"],
    }


def _table(m: Section) -> list[Row]:
    theirs, ours = "longformer.encoder.layer.{i}.attention.self.", "stack/block_{i}/attention/"
    layer = [
        row
        for name in ("query_global", "key_global", "value_global")
        for row in linear(f"{theirs}{name}", f"{ours}{name}")
    ]
    return trunk_rows(m, "longformer.") + each_layer(layer, m["layers"]) + roberta_head()


CONVERSIONS = (
    Conversion(
        "LongformerForMaskedLM",
        "longformer",
        "longformer",
        _read,
        _write,
        _table,
        ties=lambda m: {
            "lm_head.decoder.weight": "longformer.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        prefix="longformer.",
        skip=(POSITION_IDS, r"^longformer\.pooler\."),
        data=MASKED,
    ),
)

"""Marian in `transformers` (the OPUS-MT translation models), and `models.encdec` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.bart import read_sides, side_rows, write_sides
from tfm_jax.convert.table import Conversion, Fields, Row, Section, computed, embedding, reshaped
from tfm_jax.nn.positions import sinusoids


def _read(c: Fields) -> dict[str, Any]:
    c.need("share_encoder_decoder_embeddings", True)
    section = read_sides(c, vocab_size=58101)
    c.need("decoder_vocab_size", None, section["vocab_size"])
    return section


def _marian(m: Section) -> list[Row]:
    entries = m["vocab_size"]
    rows = embedding("model.shared", "token_embedding")
    for side in ("encoder", "decoder"):
        rows += computed(f"model.{side}.embed_positions.weight", lambda: sinusoids(m["max_len"], m["width"]))
        rows += side_rows(m, "model.", side)
    return rows + reshaped("final_logits_bias", "logits_bias", (entries,), (1, entries))


REPEATED = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")

CONVERSIONS = (
    Conversion(
        "MarianMTModel",
        "marian",
        "encdec",
        _read,
        write_sides,
        _marian,
        ties=lambda m: dict.fromkeys(REPEATED, "model.shared.weight"),
        data={"objective": "continue"},
    ),
)

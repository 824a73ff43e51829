"""ELECTRA in `transformers`, and the halves of `models.electra` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.bert import MASKED, POSITION_IDS, embedding_rows, layer_rows, read_encoder, write_encoder
from tfm_jax.convert.table import Conversion, Fields, Row, Section, each_layer, linear, norm, same

_MODELS = "tfm_jax.models.electra"


def _read(c: Fields) -> dict[str, Any]:
    # Left out, these have other defaults than BERT's.
    section = read_encoder(c)
    section |= {"width": c.take("hidden_size", 256), "heads": c.take("num_attention_heads", 4)}
    section |= {"mlp_width": c.take("intermediate_size", 1024), "embedding_width": c.take("embedding_size", 128)}
    return section


def _read_generator(c: Fields) -> dict[str, Any]:
    # The head's activation is GELU whatever the blocks' is.
    c.need("hidden_act", "gelu")
    return _read(c)


def _write(m: Section) -> dict[str, Any]:
    return write_encoder(m) | {"embedding_size": m["embedding_width"]}


def _trunk(m: Section, part: str) -> list[Row]:
    layers = each_layer(layer_rows("electra.encoder.layer.{i}.", f"{part}/stack/block_{{i}}/"), m["layers"])
    rows = embedding_rows(m, "electra.") + layers
    if m["embedding_width"] != m["width"]:
        rows += linear("electra.embeddings_project", f"{part}/embedding_projection")
    return rows


def _generator(m: Section) -> list[Row]:
    return [
        *_trunk(m, "generator"),
        *linear("generator_predictions.dense", "generator/token_head/transform"),
        *norm("generator_predictions.LayerNorm", "generator/token_head/norm"),
        *same("generator_lm_head.bias", "generator/token_head/bias"),
    ]


def _discriminator(m: Section) -> list[Row]:
    return [
        *_trunk(m, "discriminator"),
        *linear("discriminator_predictions.dense", "discriminator/replaced_head/transform"),
        *linear("discriminator_predictions.dense_prediction", "discriminator/replaced_head/dense"),
    ]


CONVERSIONS = (
    Conversion(
        "ElectraForMaskedLM",
        "electra",
        f"{_MODELS}:Generator",
        _read_generator,
        _write,
        _generator,
        ties=lambda m: {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
        skip=(POSITION_IDS,),
        data=MASKED,
    ),
    Conversion(
        "ElectraForPreTraining",
        "electra",
        f"{_MODELS}:Discriminator",
        _read,
        _write,
        _discriminator,
        skip=(POSITION_IDS,),
        data=MASKED,
    ),
)

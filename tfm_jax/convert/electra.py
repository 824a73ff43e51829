"""ELECTRA in `transformers`, and the halves of `models.electra` here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tfm_jax.convert.bert import MASKED, POSITION_IDS, embedding_rows, layer_rows, read_encoder, write_encoder
from tfm_jax.convert.table import Conversion, Fields, Joined, Row, Section, each_layer, linear, norm, same
from tfm_jax.errors import UserError
from tfm_jax.sections import build_model

_MODELS = "tfm_jax.models.electra"


def _read(c: Fields) -> dict[str, Any]:
    section = read_encoder(c, hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    return section | {"embedding_width": c.take("embedding_size", 128)}


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
        prefix="electra.",
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
        prefix="electra.",
        skip=(POSITION_IDS,),
        data=MASKED,
    ),
)


def _split(m: Section) -> dict[str, Section]:
    narrow = build_model(m).generator_block
    shared = {key: value for key, value in m.items() if key != "generator_heads"}
    sizes = {"width": narrow.width, "heads": narrow.heads, "mlp_width": narrow.mlp_width}
    sizes |= {"kv_heads": narrow.kv_heads, "head_dim": narrow.head_dim}
    return {
        "generator": shared | sizes | {"name": f"{_MODELS}:Generator"},
        "discriminator": shared | {"name": f"{_MODELS}:Discriminator"},
    }


def _join(sections: Mapping[str, Section]) -> dict[str, Any]:
    """The discriminator's section, and how much narrower the generator is."""
    small, large = sections["generator"], sections["discriminator"]
    same_in_both = ("vocab_size", "max_len", "types", "embedding_width", "layers", "activation", "norm_eps")
    lines = [f"{key}: {small[key]} and {large[key]}" for key in same_in_both if small[key] != large[key]]
    for key in ("width", "mlp_width"):
        if small[key] * large["heads"] != large[key] * small["heads"]:
            lines.append(f"{key}: {small[key]} and {large[key]} are not as {small['heads']} to {large['heads']} heads")
    if lines:
        raise UserError("A generator and a discriminator that were not trained together:\n  " + "\n  ".join(lines))
    return {**large, "name": "electra", "generator_heads": small["heads"]}


JOINED = (
    Joined(
        "electra",
        {"generator": "ElectraForMaskedLM", "discriminator": "ElectraForPreTraining"},
        _split,
        _join,
        data=MASKED,
        task={"name": "replaced_token"},
    ),
)

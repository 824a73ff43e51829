"""ViT and DeiT in `transformers`, and `models.vit` and `models.deit` here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfm_jax.convert.bert import read_blocks, write_blocks
from tfm_jax.convert.table import Conversion, Fields, Row, Section, each_layer, linear, norm, reshaped, same


def _side(c: Fields, name: str, default: int) -> int:
    """A height that is also the width."""
    value = c.take(name, default)
    sides = value if isinstance(value, list | tuple) else [value]
    if len(set(sides)) != 1:
        c.problems.append(f"{name}={value!r} is not supported; what is: squares")
    return int(sides[0])


def _read(c: Fields) -> dict[str, Any]:
    c.need("qkv_bias", True)
    # Of a pooler and a decoder that these classes do not have.
    c.ignore("encoder_stride", "pooler_output_size", "pooler_act")
    labels, count = c.take("id2label"), c.take("num_labels")
    return {
        "image_size": _side(c, "image_size", 224),
        "patch": _side(c, "patch_size", 16),
        "channels": c.take("num_channels", 3),
        "classes": len(labels) if labels is not None else count or 2,
        **read_blocks(c, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    }


def _write(m: Section) -> dict[str, Any]:
    return {
        "image_size": m["image_size"],
        "patch_size": m["patch"],
        "num_channels": m["channels"],
        "num_labels": m["classes"],
        **write_blocks(m),
    }


def patch_kernel(theirs: str, ours: str, patch: int, channels: int) -> list[Row]:
    """Their convolution (D, C, P, P), whose stride is its size, as a product with patches (P*P*C, D)."""

    def read(x: np.ndarray) -> list[np.ndarray]:
        return [x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])]

    def write(x: Any) -> np.ndarray:
        grid: np.ndarray = x[0].reshape(patch, patch, channels, -1)
        return grid.transpose(3, 2, 0, 1)

    return [Row(theirs, (ours,), read, write)]


def _table(prefix: str, tokens: Mapping[str, str], heads: Mapping[str, str], m: Section) -> list[Row]:
    theirs, ours, width = f"{prefix}.embeddings.", "embeddings/", m["width"]
    length = len(tokens) + (m["image_size"] // m["patch"]) ** 2
    positions = f"{ours}position_embedding/embedding"
    rows = [
        *patch_kernel(
            f"{theirs}patch_embeddings.projection.weight", f"{ours}patch_embedding/kernel", m["patch"], m["channels"]
        ),
        *same(f"{theirs}patch_embeddings.projection.bias", f"{ours}patch_embedding/bias"),
        *reshaped(f"{theirs}position_embeddings", positions, (length, width), (1, length, width)),
    ]
    for their_name, our_name in tokens.items():
        rows += reshaped(f"{theirs}{their_name}", f"{ours}{our_name}", (width,), (1, 1, width))
    for their_name, our_name in heads.items():
        rows += linear(their_name, f"{our_name}/dense")
    return rows + _layers(prefix, m) + norm(f"{prefix}.layernorm", "stack/final_norm")


def _layers(prefix: str, m: Section) -> list[Row]:
    theirs, ours = f"{prefix}.encoder.layer.{{i}}.", "stack/block_{i}/"
    layer = [
        *norm(f"{theirs}layernorm_before", f"{ours}attention_norm"),
        *linear(f"{theirs}attention.output.dense", f"{ours}attention/out"),
        *norm(f"{theirs}layernorm_after", f"{ours}mlp_norm"),
        *linear(f"{theirs}intermediate.dense", f"{ours}mlp/up"),
        *linear(f"{theirs}output.dense", f"{ours}mlp/down"),
    ]
    for name in ("query", "key", "value"):
        layer += linear(f"{theirs}attention.attention.{name}", f"{ours}attention/{name}")
    return each_layer(layer, m["layers"])


def _conversion(architecture: str, family: str, tokens: Mapping[str, str], heads: Mapping[str, str]) -> Conversion:
    return Conversion(
        architecture,
        family,
        family,
        _read,
        _write,
        functools.partial(_table, family, tokens, heads),
        prefix=f"{family}.",
        data={"name": "images", "source": "missing"},
        task={"name": "classification"},
    )


_CLASS = {"cls_token": "class_token"}
CONVERSIONS = (
    _conversion("ViTForImageClassification", "vit", _CLASS, {"classifier": "head"}),
    _conversion(
        "DeiTForImageClassificationWithTeacher",
        "deit",
        _CLASS | {"distillation_token": "distillation_token"},
        {"cls_classifier": "class_head", "distillation_classifier": "distillation_head"},
    ),
)

"""Batches of the right shapes from no data at all, for planning and for measuring speed. B batch, T length."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tfm_jax.data.index import hash_ints
from tfm_jax.data.noise import span_sizes
from tfm_jax.data.types import Batch, Data, Rows
from tfm_jax.errors import UserError

Kind = Literal["tokens", "pairs", "images"]


def make(
    *,
    kind: Kind = "tokens",
    vocab_size: int = 32000,
    seq_len: int = 1024,
    target_len: int | None = None,
    image_size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
) -> Data:
    """The config section `data` for `name="synthetic"`: drawn from (seed, step, row), and worth nothing.

    Args:
      kind: `tokens` to predict tokens of one sequence, `pairs` for encoder-decoders, `images` to classify.
      vocab_size: of tokens.
      seq_len: T, of an encoder's input where there are two sequences.
      target_len: of a decoder's; `seq_len` if None.
      image_size, channels, classes: of images.
      batch_size: rows of the global batch.
      seed: of what is drawn.
    """
    sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "target_len": target_len or seq_len,
             "image_size": image_size, "channels": channels, "classes": classes, "batch_size": batch_size}  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"data.{name}={value}: must be at least 1.")

    def evals(name: str, rows: int | None) -> Drawn:
        return Drawn(kind, sizes, rows or batch_size, seed + 1, num_batches=4)

    return Data(
        train=Drawn(kind, sizes, batch_size, seed),
        evals=evals,
        vocab_size=None if kind == "images" else vocab_size,
        tokenizer=None,
        facts={},
        fingerprint=hashlib.sha256(f"synthetic {kind} {sizes} {seed}".encode()).hexdigest(),
        sizes={"classes": classes} if kind == "images" else {},
    )


@dataclass(frozen=True)
class Drawn:
    """Batches of drawn numbers."""

    kind: Kind
    sizes: Mapping[str, int]
    batch_size: int
    seed: int
    num_batches: int | None = None

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        index = np.arange(self.batch_size, dtype=np.int64)[rows]
        size, weights = self.sizes, np.ones(len(index), np.float32)
        if self.kind == "images":
            shape = (size["image_size"], size["image_size"], size["channels"])
            values = self._drawn(step, index, int(np.prod(shape)), 1 << 16, 0)
            images = (values.astype(np.float32) / 2.0**15 - 1).reshape(len(index), *shape)
            targets = self._drawn(step, index, 1, size["classes"], 1)[:, 0]
            return {"inputs": {"images": images}, "targets": targets, "weights": weights}
        tokens = self._drawn(step, index, size["seq_len"] + 1, size["vocab_size"], 0)
        if self.kind == "tokens":
            targets = np.ascontiguousarray(tokens[:, 1:])
            inputs = {"tokens": np.ascontiguousarray(tokens[:, :-1])}
        else:
            written = self._drawn(step, index, size["target_len"] + 1, size["vocab_size"], 1)
            targets = np.ascontiguousarray(written[:, 1:])
            inputs = {
                "tokens": np.ascontiguousarray(tokens[:, :-1]),
                "decoder_tokens": np.ascontiguousarray(written[:, :-1]),
            }
        return {
            "inputs": inputs,
            "targets": targets,
            "weights": np.broadcast_to(weights[:, None], targets.shape).copy(),
        }

    def _drawn(self, step: int, index: np.ndarray, count: int, below: int, tag: int) -> np.ndarray:
        """(rows, count) int32 below a number."""
        bits = hash_ints(self.seed, 6, tag, step, index[:, None], np.arange(count)[None])
        return (bits % np.uint64(below)).astype(np.int32)


def in_place_of(section: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The section of synthetic data whose batches have the shapes of another section's, which is not opened.

    Raises:
      UserError: the vocabulary is not known without the data, or this kind of data has no fixed shapes.
    """
    name, batch = section["name"], section["batch_size"]
    if name == "synthetic":
        return dict(section)
    common = {"name": "synthetic", "batch_size": batch, "seed": section["seed"]}
    if name == "images":
        channels, classes = section["channels"] or model.get("channels"), model.get("classes") or 1000
        size = section["image_size"] or model.get("image_size")
        return {**common, "kind": "images", "image_size": size, "channels": channels or 3, "classes": classes}
    if name not in ("tokens", "pairs"):
        raise UserError(f"data.name={name!r} has rows of many lengths, so its batches have no one shape to plan for.")
    length = section["seq_len"]
    sizes = {**common, "kind": "tokens", "seq_len": length, "vocab_size": _vocabulary(section, model)}
    objective = section.get("objective", "next" if name != "pairs" else "pairs")
    if objective == "span":
        _, noise, spans = span_sizes(length, section["mask_rate"] or 0.15, section["span_length"] or 3.0)
        return {**sizes, "kind": "pairs", "target_len": noise + spans + 1}
    if objective in ("denoise", "continue", "prefix", "pairs"):
        return {**sizes, "kind": "pairs", "target_len": length}
    return sizes


def _vocabulary(section: Mapping[str, Any], model: Mapping[str, Any]) -> int:
    kind, _, size = str(section["tokenizer"]).partition(":")
    known = model.get("vocab_size") or {"bytes": 257}.get(kind) or (int(size) if size.isdigit() else None)
    if known is None:
        raise UserError(
            f"data.tokenizer={section['tokenizer']!r} does not say how many pieces it has: set model.vocab_size."
        )
    return int(known)

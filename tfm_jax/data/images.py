"""Batches of labelled images. B batch, C channels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tfm_jax.data.index import epoch_records, hash_ints
from tfm_jax.data.picture_sources import open_pictures, renumbered
from tfm_jax.data.pictures import MODES, Fit, Labelled, Pictures, Resample, Shape
from tfm_jax.data.splits import check_rule
from tfm_jax.data.types import Batch, Data, Dataset, Rows
from tfm_jax.errors import UserError, nearest


def make(
    *,
    source: str,
    image_size: int | None = None,
    scaled_to: int | None = None,
    fit: Fit = "cover",
    resample: Resample = "bicubic",
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    crop_padding: int = 0,
    flip: float = 0.0,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    valid_fraction: float | None = None,
    label: str | None = None,
    workers: int = 0,
) -> Data:
    """The config section `data` for `name="images"`.

    Args:
      source: `digits`, `idx:FOLDER`, `folder:GLOB` or `tfds:NAME`; see `data.picture_sources`.
      image_size: height and width in pixels; an image is scaled to a square, whose middle is taken. As the source has
        them if None.
      scaled_to: side of that square, at least `image_size`, which it is if None. 256 for 224 is usual.
      fit: `cover` keeps an image's shape and loses its borders, `squeeze` keeps all of it.
      resample: `bicubic` or `bilinear`.
      channels: 1 for grey, 3 for colour; the source's own if None.
      classes: names in the order of their labels, where it must be a model's; the source's own order if None.
      batch_size: rows of the global batch.
      seed: of the order of the images, and of their augmentation.
      crop_padding: pixels of black around a training image, from which a window of its own size is cut at random;
        an eighth of the size is usual for photographs (He et al. 2016, section 4.2).
      flip: how often a training image is mirrored; 0.5 is usual for photographs.
      mean, std: of pixels in [0, 1], one for all channels or one each; (x - mean) / std is what the model sees.
      valid_fraction: how much is held out of a source that has no validation split; 0.1 if None.
      label: which of several labels (`tfds:` only).
      workers: threads that decode; 0 for one a core.
    """
    for name, value in (("batch_size", batch_size), ("image_size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"data.{name}={value}: must be at least 1.")
    if scaled_to is not None and scaled_to < (image_size or scaled_to + 1):
        raise UserError(f"data.scaled_to={scaled_to}: must be at least data.image_size, which is {image_size}.")
    if channels is not None and channels not in MODES:
        raise UserError(f"data.channels={channels}: 1 for grey or 3 for colour.")
    if crop_padding < 0:
        raise UserError(f"data.crop_padding={crop_padding}: must be at least 0.")
    if not 0 <= flip <= 1:
        raise UserError(f"data.flip={flip}: a probability in [0, 1].")
    check_rule("hash", valid_fraction)
    shape = Shape(image_size, channels, scaled_to, fit, resample)
    opened = open_pictures(source, shape=shape, valid_fraction=valid_fraction, label=label, workers=workers)
    if classes is not None:
        opened = renumbered(opened, list(classes))
    for name, found in opened.splits.items():
        if not len(found):
            raise UserError(f"data.source={source!r} leaves no image for {name}; set data.valid_fraction.")
    scale = Scale(tuple(mean), tuple(std))
    scale.check(opened.splits["train"].read(np.zeros(1, np.int64)).images.shape[3])

    def evals(name: str, rows: int | None) -> Dataset:
        if name not in opened.splits:
            raise UserError(f"data.source={source!r} has no split {name!r}.{nearest(name, opened.splits)}")
        return Pass(opened.splits[name], scale, rows or batch_size)

    facts = [opened.fingerprint, dataclasses.astuple(shape), crop_padding, flip, scale.mean, scale.std]
    return Data(
        train=Training(opened.splits["train"], scale, batch_size, seed, crop_padding, flip),
        evals=evals,
        vocab_size=None,
        tokenizer=None,
        facts={name: {"examples": len(found)} for name, found in opened.splits.items()},
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        sizes={"classes": len(opened.classes)},
    )


@dataclass(frozen=True)
class Scale:
    """What pixels become: (x / 255 - mean) / std, for each channel or for all."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def check(self, channels: int) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(f"data.{name}={values}: one value, or one for each of {channels} channels.")
        if min(self.std) <= 0:
            raise UserError(f"data.std={self.std}: must be above 0.")

    def __call__(self, images: np.ndarray) -> np.ndarray:
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return (images.astype(np.float32) / np.float32(255) - mean) / std


@dataclass(frozen=True)
class Training:
    """Endless images, each epoch in an order drawn from (seed, epoch); each varied by (seed, epoch, index)."""

    pictures: Pictures
    scale: Scale
    batch_size: int
    seed: int
    crop_padding: int
    flip: float
    num_batches: None = None

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        epoch, index = epoch_records(step, self.batch_size, len(self.pictures), self.seed, rows)
        images, labels = self.pictures.read(index)
        images = varied(images, hash_ints(self.seed, 2, epoch, index), self.crop_padding, self.flip)
        return _batch(self.scale, Labelled(images, labels), np.ones(len(labels), np.float32))


@dataclass(frozen=True)
class Pass:
    """One pass in order over a split's images as they are."""

    pictures: Pictures
    scale: Scale
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-len(self.pictures) // self.batch_size)

    def batch_at(self, step: int, rows: Rows = slice(None)) -> Batch:
        place = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        inside = place < len(self.pictures)
        found = self.pictures.read(np.where(inside, place, 0))
        return _batch(self.scale, found, inside.astype(np.float32))


def _batch(scale: Scale, found: Labelled, weights: np.ndarray) -> Batch:
    return {"inputs": {"images": scale(found.images)}, "targets": found.labels, "weights": weights}


def varied(images: np.ndarray, draws: np.ndarray, padding: int, flip: float) -> np.ndarray:
    """Each image moved by up to `padding` pixels each way, and mirrored with probability `flip`.

    Args:
      images: (B, height, width, C).
      draws: (B,) uint64, all the randomness there is.
    """
    height, width = images.shape[1:3]
    down, right, mirror = (hash_ints(draws.view(np.int64), i) for i in range(3))
    if padding:
        span, around = np.uint64(2 * padding + 1), (padding, padding)
        wide = np.pad(images, ((0, 0), around, around, (0, 0)))
        y = (down % span).astype(np.int64)[:, None] + np.arange(height)
        x = (right % span).astype(np.int64)[:, None] + np.arange(width)
        images = wide[np.arange(len(images))[:, None, None], y[:, :, None], x[:, None, :]]
    # The upper 53 bits as a number in [0, 1).
    flipped = (mirror >> np.uint64(11)).astype(np.float64) * 2.0**-53 < flip
    return np.where(flipped[:, None, None, None], images[:, :, ::-1], images)

"""Labelled images: one size, in memory or decoded as they are read. B images, C channels."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from tfm_jax.errors import UserError

Fit = Literal["cover", "squeeze"]
Resample = Literal["bicubic", "bilinear"]
MODES = {1: "L", 3: "RGB"}


class Labelled(NamedTuple):
    """images (n, height, width, channels) uint8, labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray


class Pictures(Protocol):
    """The images of a split, all of one size."""

    def __len__(self) -> int: ...

    def read(self, index: np.ndarray) -> Labelled:
        """Those at the given places, an int64 array in [0, len)."""


@dataclass(frozen=True)
class Renumbered:
    """The same images with other labels: `numbers[label]`."""

    pictures: Pictures
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: np.ndarray) -> Labelled:
        found = self.pictures.read(index)
        return Labelled(found.images, self.numbers[found.labels])


class PictureSource(NamedTuple):
    """Splits ("train", "validation", "test") by name, the classes' names in the order of the labels, a fingerprint."""

    splits: dict[str, Pictures]
    classes: list[str]
    fingerprint: str


@dataclass(frozen=True)
class Shape:
    """What every image is made to be.

    Attributes:
      size: height and width; an image is scaled to a square, whose middle is taken. None: as it is.
      channels: 1 for grey, 3 for red, green and blue; the source's own if None.
      scaled_to: the side of that square; `size` if None.
      fit: "cover" keeps the image's shape and loses its borders, "squeeze" keeps all of it.
      resample: how pixels are made of their neighbours.
    """

    size: int | None = None
    channels: int | None = None
    scaled_to: int | None = None
    fit: Fit = "cover"
    resample: Resample = "bicubic"

    def of(self, image: Any) -> np.ndarray:
        """A Pillow image as (height, width, channels) uint8."""
        from PIL import Image

        grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
        image = image.convert(MODES[self.channels or (1 if grey else 3)])
        side = self.scaled_to or self.size
        if self.size is not None and side is not None:
            method = Image.Resampling[self.resample.upper()]
            # The shorter edge becomes `side`, or both do.
            short = min(image.size)
            wide, high = (side, side) if self.fit == "squeeze" else (side * edge // short for edge in image.size)
            if image.size != (wide, high):
                image = image.resize((wide, high), method)
            left, top = (wide - self.size) // 2, (high - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array


@dataclass(frozen=True)
class InMemory:
    """Arrays that are there already."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: np.ndarray) -> Labelled:
        return Labelled(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Encoded:
    """Images that are decoded as they are read, by several threads.

    Attributes:
      fetch: from a list of places to (name, file or bytes, label) of each.
      size: how many there are.
      workers: threads; one a core if 0.
    """

    fetch: Callable[[list[int]], list[tuple[str, Any, int]]]
    size: int
    shape: Shape
    workers: int

    def __len__(self) -> int:
        return self.size

    def read(self, index: np.ndarray) -> Labelled:
        found = self.fetch([int(i) for i in index])
        images = list(_pool(self.workers).map(lambda entry: _decoded(entry[0], entry[1], self.shape), found))
        for entry, image in zip(found, images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"{entry[0]} is {_size(image)}, but {found[0][0]} is {_size(images[0])}:"
                    " images of several shapes need data.image_size and data.channels."
                )
        return Labelled(np.stack(images), np.array([label for _, _, label in found], np.int32))


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers or os.cpu_count(), thread_name_prefix="decode")


def _decoded(name: str, file: Any, shape: Shape) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return shape.of(image)
    except OSError as error:
        raise UserError(f"{name} cannot be read as an image: {error}.") from None


def _size(image: np.ndarray) -> str:
    return " x ".join(map(str, image.shape))

"""Where labelled images come from: a source string to splits, each of which gives its images by index.

digits          scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 that come with the package (extra: vision)
idx:FOLDER      the four files of MNIST and Fashion-MNIST, `.gz` or not
folder:GLOB     image files whose class is the name of their folder, or the folder of those (extra: vision)
tfds:NAME       a TFDS data set in ArrayRecord with an image and a label (see `records.tfds_folder`; extra: vision)
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfm_jax.data import records
from tfm_jax.data.pictures import Encoded, InMemory, Labelled, Pictures, PictureSource, Renumbered, Shape
from tfm_jax.data.splits import Keep, split_in_name
from tfm_jax.errors import UserError, nearest

KINDS = ("digits", "idx:FOLDER", "folder:GLOB", "tfds:NAME")
IDX_FILES = {"train": "train", "test": "t10k"}


def open_pictures(
    source: str, *, shape: Shape, valid_fraction: float | None = None, label: str | None = None, workers: int = 0
) -> PictureSource:
    """Find the images, their classes and their splits.

    Splits are the source's own. Where it has no validation split, `valid_fraction` of its training images, chosen by a
    hash of their place or path, become one.
    """
    if source == "missing":
        raise UserError("This model came without data. Give its images: --config.data.source=folder:GLOB, or another.")
    kind, _, rest = source.partition(":")
    valid = {k.partition(":")[0]: k for k in KINDS}
    if kind not in valid:
        raise UserError(f"data.source: unknown kind {kind!r} in {source!r}.{nearest(kind, valid)}")
    if bool(rest) != (":" in valid[kind]):
        raise UserError(f"data.source: {source!r} should look like {valid[kind]!r}.")
    if label is not None and kind != "tfds":
        raise UserError(f"data.label is {label!r}, but a {kind} source has one label only.")
    held = 0.1 if valid_fraction is None else valid_fraction
    if kind == "folder":
        return _folder(rest, shape, held, workers)
    if kind == "tfds":
        return _tfds(rest, shape, held, label, workers)
    if kind == "digits":
        arrays, classes = {"train": _digits()}, [str(i) for i in range(10)]
    else:
        arrays, classes = _idx(Path(rest).expanduser())
    made = {name: _shaped(found, shape) for name, found in arrays.items()}
    content = [(name, x.images.shape, _sha(x.images), _sha(x.labels)) for name, x in arrays.items()]
    if "validation" not in made:
        train = made["train"]
        for name in ("train", "validation"):
            kept = _held(len(train), name, held)
            made[name] = InMemory(train.images[kept], train.labels[kept])
    return PictureSource(dict(made), classes, _digest([kind, content, held]))


def renumbered(found: PictureSource, classes: Sequence[str]) -> PictureSource:
    """With the labels of a given list of classes, which may have more than the source.

    Raises:
      UserError: the source has a class that the list has not.
    """
    number = {name: i for i, name in enumerate(classes)}
    for name in found.classes:
        if name not in number:
            raise UserError(f"data.classes has no {name!r}, which the source has.{nearest(name, list(classes))}")
    numbers = np.array([number[name] for name in found.classes], np.int32)
    splits: dict[str, Pictures] = {name: Renumbered(pictures, numbers) for name, pictures in found.splits.items()}
    return PictureSource(splits, list(classes), _digest([found.fingerprint, list(classes)]))


def _held(size: int, split: str, fraction: float) -> np.ndarray:
    """The places that fall into a split."""
    keep = Keep(split, fraction)
    return np.array([i for i in range(size) if keep(f"train:{i}")], np.int64)


def _shaped(found: Labelled, shape: Shape) -> InMemory:
    height, width, channels = found.images.shape[1:]
    sizes = {shape.size, shape.scaled_to} - {None}
    if sizes <= {height} and sizes <= {width} and shape.channels in (None, channels):
        return InMemory(*found)
    _need_pillow("data.image_size and data.channels")
    from PIL import Image

    flat = found.images[..., 0] if channels == 1 else found.images
    return InMemory(np.stack([shape.of(Image.fromarray(image)) for image in flat]), found.labels)


def _digits() -> Labelled:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "data.source='digits' needs scikit-learn, which the data set comes with: pip install 'tfm_jax[vision]'."
        ) from None
    loaded = load_digits()
    # 17 shades of grey.
    images = np.round(loaded.images[..., None] * (255 / 16)).astype(np.uint8)
    return Labelled(images, loaded.target.astype(np.int32))


def _idx(folder: Path) -> tuple[dict[str, Labelled], list[str]]:
    out = {}
    for split, prefix in IDX_FILES.items():
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise UserError(f"idx:{folder}: {prefix} has {len(images)} images, but {len(labels)} labels.")
        out[split] = Labelled(images[..., None], labels.astype(np.int32))
    count = int(max(np.max(found.labels) for found in out.values())) + 1
    return out, [str(i) for i in range(count)]


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An array of the IDX format (yann.lecun.com/exdb/mnist): its number of dimensions, their sizes, then bytes."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise UserError(f"idx:{folder} has no {name}, and no {name}.gz.{nearest(name, there)}")
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    dims = content[3] if len(content) > 3 else 0
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise UserError(f"{path} is not an IDX file of bytes, or it is cut off.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _folder(pattern: str, shape: Shape, held: float, workers: int) -> PictureSource:
    _need_pillow("A folder of images")
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        expanded = os.path.join(glob.escape(expanded), "**")
    paths = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
    if not paths:
        raise UserError(f"data.source: folder:{pattern} matches no file.")
    base = Path(os.path.commonpath([p.parent.parent for p in paths]))
    groups: dict[str, list[Path]] = {}
    for path in paths:
        words = [split_in_name(part) for part in path.relative_to(base).parts[:-2]]
        # The folder above all classes may be the split, if there is only one.
        groups.setdefault(next((word for word in words if word), "train"), []).append(path)
    if "train" not in groups:
        raise UserError(f"data.source: folder:{pattern} has no train split; it has: {', '.join(sorted(groups))}.")
    if "validation" not in groups:
        train = groups["train"]
        for name in ("train", "validation"):
            keep = Keep(name, held)
            groups[name] = [p for p in train if keep(p.relative_to(base).as_posix())]
    classes = sorted({p.parent.name for p in groups["train"]})
    number = {name: i for i, name in enumerate(classes)}
    for found in groups.values():
        for path in found:
            if path.parent.name not in number:
                raise UserError(f"{path} is of a class with no training image.{nearest(path.parent.name, classes)}")
    content = [
        (split, [(p.relative_to(base).as_posix(), p.stat().st_size) for p in ps]) for split, ps in groups.items()
    ]
    splits: dict[str, Pictures] = {
        name: Encoded(functools.partial(_files, found, number), len(found), shape, workers)
        for name, found in groups.items()
    }
    return PictureSource(splits, classes, _digest(["folder", content, held]))


def _files(paths: Sequence[Path], number: dict[str, int], places: list[int]) -> list[tuple[str, Any, int]]:
    return [(str(paths[i]), paths[i], number[paths[i].parent.name]) for i in places]


def _tfds(name: str, shape: Shape, held: float, label: str | None, workers: int) -> PictureSource:
    _need_pillow("A TFDS data set of images")
    import tensorflow_datasets as tfds

    folder = records.tfds_folder(name)
    info = records.tfds_info(folder)
    image = _feature(info, tfds.features.Image, None, "image")
    label = _feature(info, tfds.features.ClassLabel, label, "label")
    found = records.tfds_record_set(folder, info, image)
    own = records.canonical_splits(found)
    places = {split: np.arange(own[split].records) for split in own}
    if "validation" not in own:
        own["validation"] = own["train"]
        places |= {split: _held(own["train"].records, split, held) for split in ("train", "validation")}
    builder, splits = tfds.builder_from_directory(str(folder)), dict[str, Pictures]()
    for split, kept in places.items():
        data = builder.as_data_source(split=own[split].name, decoders={image: tfds.decode.SkipDecoding()})
        fetch = functools.partial(_fetch, data, kept, f"tfds:{info.full_name}:{own[split].name}", image, label)
        splits[split] = Encoded(fetch, len(kept), shape, workers)
    classes = list(info.features[label].names)
    return PictureSource(splits, classes, _digest(["tfds", found.fingerprint, image, label, held]))


def _fetch(
    data: Any, kept: np.ndarray, name: str, image: str, label: str, places: list[int]
) -> list[tuple[str, Any, int]]:
    index = [int(i) for i in kept[places]]
    return [
        (f"{name}[{i}]", io.BytesIO(record[image]), int(record[label]))
        for i, record in zip(index, data.__getitems__(index), strict=True)
    ]


def _feature(info: Any, kind: type[Any], asked: str | None, what: str) -> str:
    """The one feature of a kind, or the asked one."""
    found = sorted(key for key, value in info.features.items() if isinstance(value, kind))
    if asked is not None and asked not in found:
        raise UserError(f"tfds:{info.full_name} has no {what} {asked!r}.{nearest(asked, found)}")
    if asked is None and len(found) != 1:
        which = f"the {what}s {', '.join(found)}; say which one with data.{what}" if found else f"no {what}"
        raise UserError(f"tfds:{info.full_name} has {which}.")
    return asked or found[0]


def _need_pillow(what: str) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs Pillow: pip install 'tfm_jax[vision]'.") from None


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

"""Tensor files of other libraries: safetensors, whole or in shards, and old PyTorch files through its safe loader."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from tfm_jax.errors import UserError

WHOLE, OLD = "model.safetensors", "pytorch_model.bin"
INDEX, OLD_INDEX = f"{WHOLE}.index.json", f"{OLD}.index.json"
MAX_SHARD_BYTES = 4 << 30
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


class Tensors(Mapping[str, np.ndarray]):
    """Named arrays that are read one at a time."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype[Any]],
        read: Callable[[str], np.ndarray],
    ) -> None:
        self.shapes, self.dtypes, self._read = shapes, dtypes, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_tensors(folder: Path) -> Tensors:
    """The weights in a folder.

    Raises:
      UserError: there are none, a shard is missing, or they need PyTorch and it is not installed.
    """
    if (folder / WHOLE).is_file():
        return _safetensors([folder / WHOLE])
    if (folder / INDEX).is_file():
        return _safetensors(_shards(folder / INDEX))
    if (folder / OLD).is_file():
        return _pytorch([folder / OLD])
    if (folder / OLD_INDEX).is_file():
        return _pytorch(_shards(folder / OLD_INDEX))
    raise UserError(f"{folder} has no weights: none of {WHOLE}, {INDEX}, {OLD} and {OLD_INDEX} is there.")


def _shards(index: Path) -> list[Path]:
    """The files of an index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of tensor files: {error!r}.") from None
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{index} names files that are not there: {', '.join(missing)}.")
    return paths


def _safetensors(paths: list[Path]) -> Tensors:
    places: dict[str, tuple[Path, np.dtype[Any], tuple[int, ...], int]] = {}
    for path in paths:
        # The header is a length, then JSON: read here, because the library has no way to bfloat16 without a framework.
        try:
            with safetensors.safe_open(path, framework="numpy") as checked:  # of the whole header
                checked.keys()
        except Exception as error:  # the library's own class is not exported everywhere
            raise UserError(f"{path} is not a safetensors file: {error}.") from None
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: {name} is {entry['dtype']}; what can be read: {', '.join(DTYPES)}.")
            start = 8 + length + entry["data_offsets"][0]
            places[name] = (path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)

    def read(name: str) -> np.ndarray:
        path, dtype, shape, start = places[name]
        # Read, not mapped: mapped pages stay counted as this process's memory, which is to hold the weights once.
        return np.fromfile(path, dtype, int(np.prod(shape, dtype=np.int64)), offset=start).reshape(shape)

    shapes = {name: place[2] for name, place in places.items()}
    return Tensors(shapes, {name: place[1] for name, place in places.items()}, read)


def _pytorch(paths: list[Path]) -> Tensors:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{paths[0]} is a pickle, which runs code when it is read. With PyTorch installed its safe loader reads it; or"
            " convert it where the model comes from: model.save_pretrained(FOLDER, safe_serialization=True)."
        ) from None
    loaded: dict[str, Any] = {}
    for path in paths:
        # Files from before PyTorch 1.6 are not archives and can only be read whole.
        try:
            loaded |= torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            # PyTorch's own message suggests to switch the safety off.
            raise UserError(
                f"{path} holds more than tensors, or is damaged; it was not read ({type(error).__name__})."
            ) from None

    def read(name: str) -> np.ndarray:
        tensor = loaded[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            words: np.ndarray = tensor.view(torch.int16).numpy()
            return words.view(ml_dtypes.bfloat16)
        array: np.ndarray = tensor.numpy()
        return array

    found = {name: x for name, x in loaded.items() if hasattr(x, "shape")}
    dtypes = {name: np.dtype(getattr(ml_dtypes, str(x.dtype).removeprefix("torch."), None) or str(x.dtype)[6:])
              for name, x in found.items()}  # fmt: skip
    return Tensors({name: tuple(x.shape) for name, x in found.items()}, dtypes, read)


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtypes: Mapping[str, np.dtype[Any]],
) -> None:
    """`model.safetensors`, or shards of at most 4 GiB and their index; one tensor is in memory at a time."""
    sizes = {name: dtypes[name].itemsize * int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [WHOLE]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, names, {n: shapes[n] for n in names}, sizes, read, dtypes)
    if len(shards) > 1:
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": index}, indent=2, sort_keys=True))


def _write_file(
    path: Path,
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    dtypes: Mapping[str, np.dtype[Any]],
) -> None:
    """One file: the header's length, the header, the tensors. The library's own writer wants all of them in memory."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    # The metadata is what `transformers` asks of a file before it loads it.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        header[name] = {
            "dtype": kinds[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [end, end + sizes[name]],
        }
        end += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            exact = read(name)
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(exact.astype(dtypes[name], copy=False))
            if array.dtype == np.float16 and not np.array_equal(np.isfinite(array), np.isfinite(exact)):
                raise UserError(f"{name} has values too large for float16. Use --dtype bfloat16 or float32.")
            file.write(array.reshape(-1).view(np.uint8).data)

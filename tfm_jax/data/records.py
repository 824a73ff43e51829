"""Record data sets: TFDS folders in ArrayRecord, read without TensorFlow, and Hugging Face `datasets` folders."""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tfm_jax.data.files import text_of
from tfm_jax.data.locks import locked
from tfm_jax.data.splits import Keep, split_in_name
from tfm_jax.data.types import Document
from tfm_jax.errors import UserError, nearest
from tfm_jax.files import digest, folders_beside

MADE_OF = "made_of"
"""The key of a builder's metadata that has `tfm_jax.files.digest` of each file it was made of, by name without `.gz`."""
_RECORDS_AT_ONCE = 200


class RecordSplit(NamedTuple):
    name: str
    records: int
    bytes: int


@dataclass(frozen=True)
class RecordSet:
    """A prepared data set on disk, and the feature that holds its text."""

    kind: str
    folder: str
    feature: str
    splits: tuple[RecordSplit, ...]
    fingerprint: str


@dataclass(frozen=True)
class RecordPiece:
    """The records [start, stop) of one split."""

    kind: str
    folder: str
    split: str
    start: int
    stop: int
    feature: str
    size: int
    keep: Keep | None

    def documents(self) -> Iterator[Document]:
        for where, value in self.values(self.feature):
            yield Document(text_of(value, where, self.feature), True)

    def values(self, field: str) -> Iterator[tuple[str, Any]]:
        records = (
            _tfds_records(self.folder, self.split) if self.kind == "tfds" else _hf_records(self.folder, self.split)
        )
        for index in range(self.start, self.stop):
            if self.keep is None or self.keep(f"{self.split}:{index}"):
                where, record = f"{self.kind}:{self.folder}, {self.split} {index}", records[index]
                if field not in record:
                    raise UserError(f"{where}: no field {field!r}.{nearest(field, record)}")
                yield where, record[field]


def record_pieces(data: RecordSet, split: RecordSplit, keep: Keep | None, piece_bytes: int) -> list[RecordPiece]:
    count = max(1, min(split.records, -(-split.bytes // piece_bytes)))
    edges = [split.records * i // count for i in range(count + 1)]
    return [
        RecordPiece(data.kind, data.folder, split.name, a, b, data.feature, split.bytes // count, keep)
        for a, b in itertools.pairwise(edges)
        if b > a
    ]


def canonical_splits(
    data: RecordSet, needed: Sequence[str] = ("train", "validation"), hint: str = ""
) -> dict[str, RecordSplit]:
    """The data set's own splits by canonical name; others (such as "unsupervised") are left alone.

    Args:
      needed: names that have to be one split's.
      hint: what to do instead where one is several's.

    Raises:
      UserError: there is no train split; or several are for a name that is needed, and none of them has it.
    """
    found: dict[str, list[RecordSplit]] = {}
    for split in data.splits:
        if (name := split_in_name(split.name)) is not None:
            found.setdefault(name, []).append(split)
    if "train" not in found:
        names = ", ".join(split.name for split in data.splits)
        raise UserError(f"{data.kind}:{data.folder} has no train split; it has: {names}.")
    own = dict[str, RecordSplit]()
    for name, several in found.items():
        exact = [split for split in several if split.name == name] or several
        if len(exact) == 1:
            own[name] = exact[0]
        elif name in needed:
            names = ", ".join(split.name for split in several)
            raise UserError(
                f"{data.kind}:{data.folder} has several splits for {name!r}: {names}. Name the one to read {name!r}.{hint}"
            )
    return own


def _pick_feature(feature: str | None, texts: list[str], words: list[str], every: list[str], name: str) -> str:
    """The feature that is asked for, text or a list of words, or the only one that is text."""
    if feature is None:
        if len(texts) != 1:
            what = f"text features {', '.join(sorted(texts))}" if texts else "no text feature"
            raise UserError(f"{name} has {what}; say which one with data.feature.")
        return texts[0]
    if feature not in every:
        raise UserError(f"{name} has no feature {feature!r}.{nearest(feature, every)}")
    if feature not in (*texts, *words):
        raise UserError(f"{name}: the feature {feature!r} is not text.{nearest(feature, [*texts, *words])}")
    return feature


def open_tfds(name: str, feature: str | None, manual_dir: str | None = None) -> RecordSet:
    """The text of a TFDS data set by its name; see `tfds_folder`."""
    return open_tfds_folder(tfds_folder(name, manual_dir), feature)


def tfds_folder(name: str, manual_dir: str | None = None) -> Path:
    """Where `my_ds/config` (registered or in the TFDS folder), `my_lab.data:Builder/config`, or a prepared folder's path is.

    A data set that is not prepared yet is prepared first, from the files in `manual_dir` if its builder asks for any. One that is
    must have been prepared from these, as far as its builder has told which they were.
    """
    import tensorflow_datasets as tfds

    if name.startswith(("/", ".", "~")):
        return Path(name).expanduser()
    if ":" in name:
        builder = _builder_class(name)
    else:
        try:
            builder = tfds.builder(name, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError:
            hint = nearest(name, tfds.list_builders(with_community_datasets=False))
            raise UserError(
                f"There is no TFDS data set {name!r}.{hint if 'mean' in hint else ''} A builder of your own is "
                f"tfds:my_package.my_module:MyBuilder."
            ) from None
    if not builder.is_prepared():
        if manual_dir is not None and not (asked := Path(manual_dir)).expanduser().is_dir():
            hint = nearest(asked.name, folders_beside(asked))
            raise UserError(f"data.manual_dir={manual_dir!r}: there is no such folder.{hint}")
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and manual_dir is None:
            raise UserError(
                f"tfds:{name} is made of files that you must have: {builder.MANUAL_DOWNLOAD_INSTRUCTIONS} Name the folder"
                " they are in: --config.data.manual_dir=FOLDER."
            )
        # Runs that begin together all find it missing; TFDS fails where two write one folder.
        with locked(Path(builder.data_dir)):
            if not builder.is_prepared():
                download = tfds.download.DownloadConfig(manual_dir=_expanded(manual_dir))
                write_data_set(builder, download_config=download)
    elif manual_dir is not None:
        _check_made_of(Path(builder.data_dir), Path(manual_dir).expanduser())
    return Path(builder.data_dir)


def write_data_set(builder: Any, **options: Any) -> None:
    """Make a TFDS data set; its bars, for a terminal alone, would fill a log file."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder.download_and_prepare(**options)


def made_of(folder: Path) -> dict[str, str]:
    """The digest of each file that a prepared data set says it was made of, by name."""
    about = folder / "metadata.json"
    found: dict[str, str] = json.loads(about.read_text()).get(MADE_OF, {}) if about.is_file() else {}
    return found


def found_file(folder: Path, name: str) -> Path | None:
    """A file below a folder, or the gzipped one of this name."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _check_made_of(folder: Path, manual_dir: Path) -> None:
    for name, told in made_of(folder).items():
        file = found_file(manual_dir, name)
        if file is not None and digest(file) != told:
            raise UserError(
                f"data.manual_dir={str(manual_dir)!r}: {file.relative_to(manual_dir)} is not the one that {folder} was prepared"
                " from. Delete that folder, and it is prepared anew."
            )


def _expanded(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().absolute())


def _builder_class(name: str) -> Any:
    path, _, config = name.partition("/")
    module, _, attribute = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"tfds:{name}: {error}.") from None
    except AttributeError:
        options = dir(importlib.import_module(module))
        raise UserError(f"tfds:{name}: {module} has no {attribute!r}.{nearest(attribute, options)}") from None
    return cls(config=config or None, file_format="array_record")


def open_tfds_folder(folder: Path, feature: str | None) -> RecordSet:
    import tensorflow_datasets as tfds

    info = tfds_info(folder)
    features = dict(info.features)
    texts = [key for key, value in features.items() if isinstance(value, tfds.features.Text)]
    words = [
        key
        for key, value in features.items()
        if isinstance(value, tfds.features.Sequence) and isinstance(value.feature, tfds.features.Text)
    ]
    return tfds_record_set(folder, info, _pick_feature(feature, texts, words, list(features), f"tfds:{info.full_name}"))


def tfds_record_set(folder: Path, info: Any, feature: str) -> RecordSet:
    splits = tuple(RecordSplit(s.name, s.num_examples, s.num_bytes) for s in info.splits.values())
    facts = [info.full_name, [[s.name, s.num_bytes, s.shard_lengths] for s in info.splits.values()]]
    facts += [told] if (told := made_of(folder)) else []
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return RecordSet("tfds", str(folder), feature, splits, fingerprint)


def tfds_digest(folder: Path) -> str:
    """SHA-256 of a prepared data set's records, the same on every machine: in a file, the order of a record's fields is by chance."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    builder, found = tfds.builder_from_directory(str(folder)), hashlib.sha256()
    for split in builder.info.splits:
        records = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            for record in records.__getitems__(range(start, min(start + _RECORDS_AT_ONCE, len(records)))):
                found.update(tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True))
    return found.hexdigest()


def tfds_info(folder: Path) -> Any:
    """The `DatasetInfo` of a prepared folder that can be read without TensorFlow."""
    import tensorflow_datasets as tfds

    if not (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder} is not a prepared TFDS folder: it has no dataset_info.json.")
    builder = tfds.builder_from_directory(str(folder))
    info = builder.info
    if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{folder} is prepared as {info.file_format.value}, which cannot be read without TensorFlow; prepare it "
            f"with file_format='array_record'."
        )
    return info


@functools.lru_cache(maxsize=8)
def _tfds_records(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(folder).as_data_source(split=split)


def _hf_module() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("An hf: source needs the datasets package: pip install 'tfm_jax[hf]'.") from None
    return datasets


@functools.lru_cache(maxsize=8)
def _hf_splits(folder: str) -> dict[str, Any]:
    loaded = _hf_module().load_from_disk(folder)
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _hf_records(folder: str, split: str) -> Any:
    return _hf_splits(folder)[split]


def open_hf(folder: Path, feature: str | None, fingerprint: str) -> RecordSet:
    """A folder written by `save_to_disk`: a Dataset (all of it "train") or a DatasetDict."""
    datasets = _hf_module()
    try:
        splits = _hf_splits(str(folder))
    except FileNotFoundError as error:
        raise UserError(f"hf:{folder} is not a folder written by save_to_disk: {error}.") from None
    features = next(iter(splits.values())).features
    strings = ("string", "large_string")
    texts = [key for key, value in features.items() if isinstance(value, datasets.Value) and value.dtype in strings]
    words = [
        key for key, value in features.items() if getattr(getattr(value, "feature", None), "dtype", None) in strings
    ]
    found = tuple(RecordSplit(name, len(data), data.data.nbytes) for name, data in splits.items())
    chosen = _pick_feature(feature, texts, words, list(features), f"hf:{folder}")
    return RecordSet("hf", str(folder), chosen, found, fingerprint)

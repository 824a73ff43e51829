import contextlib
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tensorflow_datasets as tfds

from tests.errors import says
from tfm_jax.data.records import RecordSet, RecordSplit, canonical_splits, open_tfds_folder, record_pieces
from tfm_jax.data.sources import open_source
from tfm_jax.data.splits import Keep
from tfm_jax.errors import UserError

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class Tales(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="full", version=VERSION),
        tfds.core.BuilderConfig(name="flat", version=VERSION),
    ]

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"title": text, "body": text, "year": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        if self.builder_config.name == "flat":
            return {"train": self._generate_examples("train", 100)}
        counts = {"train": 20, "dev": 3, "extra": 1}
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split, count):
        for i in range(count):
            yield i, {"title": f"t{i}", "body": f"{split} {i} \\u65e5\\n", "year": i}


class One(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({KIND}))

    def _split_generators(self, dl_manager):
        return {"SPLIT": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"x": VALUE}
"""


def texts(source, split):
    return [document.text for piece in source.splits[split] for document in piece.documents()]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of builders, importable under the name it returns, that prepare below `tmp_path/tfds`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    # Every test defines the same builders anew.
    monkeypatch.setattr("tensorflow_datasets.core.registered._DATASET_REGISTRY", {})
    monkeypatch.setattr("tensorflow_datasets.core.registered._ABSTRACT_DATASET_REGISTRY", {})

    def write(kind='"x": tfds.features.Text()', value='"one"', split="train"):
        name = f"lab_{tmp_path.name}"
        code = BUILDER.replace("{KIND}", "{" + kind + "}").replace("VALUE", value).replace("SPLIT", split)
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_a_builder_of_one_s_own_and_its_folder(tmp_path, module):
    name = module()
    source = open_source(f"tfds:{name}:Tales/full", cache_dir=tmp_path / "cache", feature="body", piece_bytes=100)
    assert texts(source, "train") == [f"train {i} 日\n" for i in range(20)]
    assert texts(source, "validation") == [f"dev {i} 日\n" for i in range(3)]
    assert sorted(source.splits) == ["train", "validation"] and source.rule == "names"
    assert len(source.splits["train"]) > 3
    assert all(document.ends for piece in source.splits["train"] for document in piece.documents())
    (info,) = tmp_path.glob("tfds/**/dataset_info.json")
    again = open_source(f"tfds:{info.parent}", cache_dir=tmp_path / "cache", feature="body", piece_bytes=100)
    assert again.fingerprint == source.fingerprint and texts(again, "train") == texts(source, "train")
    titles = open_source(f"tfds:{info.parent}", cache_dir=tmp_path / "cache", feature="title", piece_bytes=100)
    assert texts(titles, "train")[:2] == ["t0", "t1"] and titles.fingerprint != source.fingerprint


def test_runs_that_begin_together_prepare_it_once(tmp_path, module):
    name = f"tfds:{module()}:Tales/full"
    together = threading.Barrier(2)
    original = tfds.core.DatasetBuilder.is_prepared

    def is_prepared(self):
        found = original(self)
        if not found and together.n_waiting < 2 and not together.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(2)  # both have seen that it is missing
        return found

    def titles(_):
        return texts(open_source(name, cache_dir=tmp_path / "cache", feature="title"), "train")

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(tfds.core.DatasetBuilder, "is_prepared", is_prepared)
        assert list(pool.map(titles, range(2))) == [[f"t{i}" for i in range(20)]] * 2


def test_records_without_a_validation_split_are_shared_out_by_hash(tmp_path, module):
    name = f"tfds:{module()}:Tales/flat"
    options = dict(cache_dir=tmp_path / "cache", feature="body")
    source = open_source(name, **options, valid_fraction=0.2)
    keep = Keep("validation", 0.2)
    held = [i for i in range(100) if keep(f"train:{i}")]
    assert texts(source, "validation") == [f"train {i} 日\n" for i in held] and 8 < len(held) < 35
    assert texts(source, "train") == [f"train {i} 日\n" for i in range(100) if i not in held]
    cut = open_source(name, **options, valid_fraction=0.2, piece_bytes=64)
    assert texts(cut, "validation") == texts(source, "validation") and len(cut.splits["train"]) > 5
    with says(f"{name}: data.split=names, but it has no validation split of its own."):
        open_source(name, **options, split="names")
    with says(f"{name}: data.split=tail is for a single text; use hash or names."):
        open_source(name, **options, split="tail")


def test_features_that_cannot_be_the_text(tmp_path, module):
    name = module()
    where = "tfds:tales/full/1.0.0"
    opened = lambda feature: open_source(  # noqa: E731
        f"tfds:{name}:Tales/full", cache_dir=tmp_path / "cache", feature=feature
    )
    with says(f"{where} has text features body, title; say which one with data.feature."):
        opened(None)
    with says(f"{where} has no feature 'boddy'. Did you mean 'body'?"):
        opened("boddy")
    with says(f"{where}: the feature 'year' is not text. Valid: body, title."):
        opened("year")


def test_a_data_set_without_text(tmp_path, module):
    name = module('"x": tfds.features.Scalar(np.int64)', "3")
    with says("tfds:one/1.0.0 has no text feature; say which one with data.feature."):
        open_source(f"tfds:{name}:One", cache_dir=tmp_path / "cache")


def test_a_data_set_without_a_train_split(tmp_path, module):
    name = module(split="test")
    with pytest.raises(UserError) as caught:
        open_source(f"tfds:{name}:One", cache_dir=tmp_path / "cache")
    assert str(caught.value) == f"tfds:{tmp_path}/tfds/one/1.0.0 has no train split; it has: test."


def test_wrong_tfds_names(tmp_path, module):
    name = module()
    opened = lambda source: open_source(source, cache_dir=tmp_path / "cache")  # noqa: E731
    with says(f"tfds:{name}:Tails: {name} has no 'Tails'. Did you mean 'Tales'?"):
        opened(f"tfds:{name}:Tails")
    with says("tfds:no_lab.data:Tales: No module named 'no_lab'."):
        opened("tfds:no_lab.data:Tales")
    with says(f"{tmp_path} is not a prepared TFDS folder: it has no dataset_info.json."):
        opened(f"tfds:{tmp_path}")
    with says(
        "There is no TFDS data set 'no_such_thing_at_all'. A builder of your own is "
        "tfds:my_package.my_module:MyBuilder."
    ):
        opened("tfds:no_such_thing_at_all")


def test_a_folder_in_a_format_that_needs_tensorflow(tmp_path, module):
    name = module()
    open_source(f"tfds:{name}:One", cache_dir=tmp_path / "cache")
    (path,) = tmp_path.glob("tfds/**/dataset_info.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "fileFormat": "tfrecord"}))
    with says(
        f"{path.parent} is prepared as tfrecord, which cannot be read without TensorFlow; prepare it with "
        f"file_format='array_record'."
    ):
        open_tfds_folder(path.parent, None)


@pytest.mark.parametrize(("count", "size", "piece_bytes"), [(10, 1000, 300), (3, 10**6, 10), (7, 50, 100), (0, 0, 9)])
def test_pieces_cover_every_record_once_in_order(count, size, piece_bytes):
    split = RecordSplit("train", count, size)
    data = RecordSet("tfds", "/nowhere", "text", (split,), "f")
    pieces = record_pieces(data, split, None, piece_bytes)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(count))
    assert len(pieces) == min(count, max(1, -(-size // piece_bytes)))


def test_splits_of_other_names_are_left_alone():
    named = [RecordSplit(name, 1, 1) for name in ("training", "unsupervised", "val", "test")]
    data = RecordSet("hf", "/nowhere", "text", tuple(named), "f")
    assert canonical_splits(data) == {"train": named[0], "validation": named[2], "test": named[3]}


def test_several_splits_of_one_name():
    """As GLUE's MNLI has them: which one is meant is not guessed."""
    names = ("train", "train_hard", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    named = [RecordSplit(name, 1, 1) for name in names]
    data = RecordSet("tfds", "/nowhere", "text", tuple(named), "f")
    with says(
        "tfds:/nowhere has several splits for 'validation': validation_matched, validation_mismatched. Name the one to read"
        " 'validation'."
    ):
        canonical_splits(data)
    assert canonical_splits(data, ("train",)) == {"train": named[0]}


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    make = lambda split, count: datasets.Dataset.from_dict(  # noqa: E731
        {"text": [f"{split} {i} 日\n" for i in range(count)], "n": list(range(count))}
    )
    datasets.DatasetDict(train=make("train", 9), validation=make("validation", 2)).save_to_disk(tmp_path / "many")
    make("one", 50).save_to_disk(tmp_path / "one")
    return tmp_path


def test_hugging_face_folders(saved):
    source = open_source(f"hf:{saved}/many", cache_dir=saved / "cache")
    assert texts(source, "train") == [f"train {i} 日\n" for i in range(9)]
    assert texts(source, "validation") == ["validation 0 日\n", "validation 1 日\n"]
    assert source.rule == "names"
    single = open_source(f"hf:{saved}/one", cache_dir=saved / "cache", valid_fraction=0.3)
    held = [i for i in range(50) if Keep("validation", 0.3)(f"train:{i}")]
    assert texts(single, "validation") == [f"one {i} 日\n" for i in held] and held
    assert single.rule == "hash 0.3" and single.fingerprint != source.fingerprint
    every = open_source(f"hf:{saved}/many", cache_dir=saved / "cache", split="all")
    whole = [f"train {i} 日\n" for i in range(9)] + ["validation 0 日\n", "validation 1 日\n"]
    assert texts(every, "train") == texts(every, "validation") == whole and every.rule == "all of train, validation"


def test_wrong_hugging_face_folders(saved):
    (saved / "empty").mkdir()
    with pytest.raises(UserError, match=f"^hf:{re.escape(str(saved))}/empty is not a folder written by save_to_disk: "):
        open_source(f"hf:{saved}/empty", cache_dir=saved / "cache")
    with says(f"hf:{saved}/many: the feature 'n' is not text. Valid: text."):
        open_source(f"hf:{saved}/many", cache_dir=saved / "cache", feature="n")


def test_a_missing_datasets_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with says("An hf: source needs the datasets package: pip install 'tfm_jax[hf]'."):
        open_source(f"hf:{tmp_path}", cache_dir=tmp_path / "cache")

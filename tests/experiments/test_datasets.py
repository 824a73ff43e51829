"""The builders of published data sets, on files of their form."""

import gzip
import os
import shutil

import pytest
import tensorflow_datasets as tfds

from experiments.reproduce import datasets
from tests.errors import says
from tfm_jax.data.examples import make
from tfm_jax.data.records import MADE_OF, tfds_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base = tmp_path_factory.mktemp("files")
    for name in ("sst2", "cola", "stsb"):
        (base / name).mkdir()
    rows = [f"film {i} is fine\t{i % 2}" for i in range(300)]
    (base / "sst2" / "train.tsv.gz").write_bytes(gzip.compress("\n".join(["sentence\tlabel", *rows]).encode()))
    (base / "sst2" / "dev.tsv").write_text('sentence\tlabel\nan " odd one\t1\nb\t0\n')
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (base / "cola" / f"{name}.tsv").write_text("".join(f"x\t{i % 2}\t*\tsentence {i}\n" for i in range(300)))
    for name in ("train", "dev", "test"):
        (base / "stsb" / f"stsb-en-{name}.csv").write_text('"one, two",three,2.5\nfour,five,0.0\n')
    return base


def prepared(builder, files, tmp_path):
    made = builder(data_dir=str(tmp_path), file_format="array_record")
    made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(files)))
    return f"tfds:{made.data_dir}"


def test_sst2_and_cola(files, tmp_path):
    for builder in (datasets.Sst2, datasets.Cola):
        data = make(source=prepared(builder, files, tmp_path), text="sentence", tokenizer="bytes", seq_len=32)
        sizes = {name: found["examples"] for name, found in data.facts.items()}
        assert sizes["train"] + sizes["validation"] == 300 and 0 < sizes["validation"] < 20
        assert data.sizes == {"classes": 2}
        batch = data.evals("test", 1).batch_at(0)
        assert sizes["test"] == (2 if builder is datasets.Sst2 else 600) and batch["targets"].tolist() == [0]


def test_stsb(files, tmp_path):
    source = prepared(datasets.Stsb, files, tmp_path)
    data = make(
        source=source, text="sentence1", pair="sentence2", label="score", kind="number", tokenizer="bytes", seq_len=64
    )
    batch = data.evals("test", 2).batch_at(0)
    assert batch["targets"].tolist() == [0.0, 2.5]
    assert data.tokenizer.decode(batch["inputs"]["tokens"][1][batch["inputs"]["valid"][1]]) == "one, twothree"


def test_files_that_are_others_than_those_it_was_prepared_from(tmp_path, monkeypatch):
    """Of the same length, as labels that were put right have: the name, sizes and numbers that TFDS keeps are the same."""
    name, manual = "experiments.reproduce.datasets:Stsb", tmp_path / "manual"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    (manual / "stsb").mkdir(parents=True)

    def fingerprint(score, split="train"):
        for one in ("train", "dev", "test"):
            (manual / "stsb" / f"stsb-en-{one}.csv").write_text(f"one,two,{score if one == split else 2.5}\n")
        folder = tfds_folder(name, str(manual))
        return folder, make(source=f"tfds:{folder}", text="sentence1", label="score", kind="number", tokenizer="bytes",
                            seq_len=64, cache_dir=str(tmp_path / "cache")).fingerprint  # fmt: skip

    folder, before = fingerprint(2.5)
    assert fingerprint(2.5) == (folder, before)
    dev = manual / "stsb" / "stsb-en-dev.csv"
    zipped = dev.with_name(f"{dev.name}.gz")
    zipped.write_bytes(gzip.compress(dev.read_bytes()))
    dev.unlink()
    assert str(tfds_folder(name, str(manual))) == str(folder)
    zipped.write_bytes(gzip.compress(b"one,two,1.5\n"))
    with says(
        f"data.manual_dir='{manual}': stsb/stsb-en-dev.csv.gz is not the one that {folder} was prepared from. Delete that folder, and"
        " it is prepared anew."
    ):
        tfds_folder(name, str(manual))
    zipped.unlink()
    with says(
        f"data.manual_dir='{manual}': stsb/stsb-en-train.csv is not the one that {folder} was prepared from. Delete that folder, and"
        " it is prepared anew."
    ):
        fingerprint(4.5)
    shutil.rmtree(folder)
    assert fingerprint(4.5)[1] != before


class Untold(datasets.Cola):
    """A builder of one's own, which does not say what it was made of."""

    def _split_generators(self, dl_manager):
        found = super()._split_generators(dl_manager)
        del self.info.metadata[MADE_OF]
        return found


def test_labels_that_were_put_right(files, tmp_path):
    """What is kept of equal names, sizes and numbers is of other records; of equal records in another place it is theirs."""
    right = shutil.copytree(files, tmp_path / "right")
    for file in (right / "cola").iterdir():
        file.write_text("".join(f"x\t{(i + 1) % 2}\t*\tsentence {i}\n" for i in range(300)))

    def opened(folder, place):
        source = prepared(Untold, folder, tmp_path / place)
        for file in (tmp_path / place).rglob("*.*"):
            os.utime(file, (0, 0))  # old enough for what it holds to be kept
        common = dict(text="sentence", tokenizer="bytes", seq_len=32, cache_dir=str(tmp_path / "cache"))
        first, again = (make(source=source, **common).fingerprint for _ in range(2))
        assert first == again
        return first, make(source=source, **common).evals("test", 300).batch_at(0)["targets"].tolist()

    before, after = opened(files, "one"), opened(right, "two")
    assert after[0] != before[0] and after[1] == [1 - label for label in before[1]]
    assert opened(files, "three") == before


def test_files_that_one_must_have(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.Sst2, "is_prepared", lambda self: False)
    name = "experiments.reproduce.datasets:Sst2"
    with says(
        f"tfds:{name} is made of files that you must have: {datasets.Sst2.MANUAL_DOWNLOAD_INSTRUCTIONS} Name the folder"
        " they are in: --config.data.manual_dir=FOLDER."
    ):
        tfds_folder(name)
    (tmp_path / "files").mkdir()
    with says(f"data.manual_dir='{tmp_path}/fils': there is no such folder. Did you mean 'files'?"):
        tfds_folder(name, f"{tmp_path}/fils")
    with says(f"data.manual_dir='{tmp_path}' has no sst2/train.tsv, and no sst2/train.tsv.gz."):
        datasets.read_text(tmp_path, "sst2/train.tsv")

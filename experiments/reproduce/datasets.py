"""Published data sets as TFDS builders, for those who have the files: `data.manual_dir` names the folder they are in.

`data.source="tfds:experiments.reproduce.datasets:Sst2"`. Files may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tfm_jax.data.records import MADE_OF, found_file
from tfm_jax.data.splits import Keep
from tfm_jax.errors import UserError
from tfm_jax.files import digest

Rows = Iterator[dict[str, Any]]


class _Files(tfds.core.GeneratorBasedBuilder):
    """Records of files that TFDS does not download, in the files' order.

    Attributes:
      files: by split, files below the folder, the function that reads records from their texts, and which are kept.
      columns: what a record has, by field.
    """

    VERSION = tfds.core.Version("1.0.0")
    files: Mapping[str, tuple[Sequence[str], Callable[..., Rows], Callable[[str], bool]]]
    columns: Mapping[str, Any]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict(self.columns))
        about = tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True, metadata=about)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        folder = Path(dl_manager.manual_dir)
        names = {name for names, _, _ in self.files.values() for name in names}
        self.info.metadata[MADE_OF] = {name: digest(_found(folder, name)) for name in sorted(names)}
        return {split: self._generate_examples(folder, *how) for split, how in self.files.items()}

    def _generate_examples(
        self, folder: Path, names: Sequence[str], read: Callable[..., Rows], keep: Callable[[str], bool]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        texts = [read_text(folder, name) for name in names]
        kept = (row for i, row in enumerate(read(*texts)) if keep(str(i)))
        yield from enumerate(kept)


def read_text(folder: Path, name: str) -> str:
    """A file below the folder, gzipped or not."""
    path = _found(folder, name)
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")


def _found(folder: Path, name: str) -> Path:
    path = found_file(folder, name)
    if path is None:
        raise UserError(f"data.manual_dir={str(folder)!r} has no {name}, and no {name}.gz.")
    return path


def _all(place: str) -> bool:
    return True


# Of training records without a validation split of their own, by a hash of their place.
_HELD_OUT, _NOT_HELD_OUT = Keep("validation", 0.02), Keep("train", 0.02)


def _sentence(*classes: str) -> dict[str, Any]:
    return {"sentence": tfds.features.Text(), "label": tfds.features.ClassLabel(names=list(classes))}


def _sst2(text: str) -> Rows:
    for row in csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        yield {"sentence": row["sentence"], "label": int(row["label"])}


class Sst2(_Files):
    """SST-2 as in GLUE (Socher et al. 2013, Wang et al. 2019).

    `test` is GLUE's dev set, whose labels are public; `validation` is 2 % of the training set, to choose settings by. Most of that
    set are phrases of sentences that are in it too, so what is held out is not unseen, and scores of it are higher.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = "sst2/train.tsv and sst2/dev.tsv of GLUE: sentence and label, with a header."
    files = {  # noqa: RUF012 - read only
        "train": (["sst2/train.tsv"], _sst2, _NOT_HELD_OUT),
        "validation": (["sst2/train.tsv"], _sst2, _HELD_OUT),
        "test": (["sst2/dev.tsv"], _sst2, _all),
    }

    columns = _sentence("negative", "positive")


def _cola(*texts: str) -> Rows:
    for text in texts:
        for row in csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {"sentence": row[3], "label": int(row[1])}


class Cola(_Files):
    """CoLA's public files (Warstadt et al. 2019); `test` is GLUE's dev set: the in-domain one and the out-of-domain one."""

    VERSION = tfds.core.Version("1.1.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "cola/in_domain_train.tsv, in_domain_dev.tsv and out_of_domain_dev.tsv of the authors' release."
    )
    files = {  # noqa: RUF012 - read only
        "train": (["cola/in_domain_train.tsv"], _cola, _NOT_HELD_OUT),
        "validation": (["cola/in_domain_train.tsv"], _cola, _HELD_OUT),
        "test": (["cola/in_domain_dev.tsv", "cola/out_of_domain_dev.tsv"], _cola, _all),
    }

    columns = _sentence("unacceptable", "acceptable")


def _stsb(text: str) -> Rows:
    for first, second, score in csv.reader(io.StringIO(text)):
        yield {"sentence1": first, "sentence2": second, "score": float(score)}


class Stsb(_Files):
    """The STS Benchmark (Cer et al. 2017): pairs of sentences and how similar they are, 0 to 5."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "stsb/stsb-en-train.csv, stsb-en-dev.csv and stsb-en-test.csv: sentence, sentence, score."
    )
    files = {  # noqa: RUF012 - read only
        "train": (["stsb/stsb-en-train.csv"], _stsb, _all),
        "validation": (["stsb/stsb-en-dev.csv"], _stsb, _all),
        "test": (["stsb/stsb-en-test.csv"], _stsb, _all),
    }

    columns = {  # noqa: RUF012 - read only
        "sentence1": tfds.features.Text(),
        "sentence2": tfds.features.Text(),
        "score": tfds.features.Scalar(np.float32),
    }


def lines(text: str) -> list[str]:
    """Those of a file: `str.splitlines` cuts at marks that a sentence, or a string of JSON, may have inside."""
    found = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in found]


def _aligned(english: str, german: str) -> Rows:
    first, second = lines(english), lines(german)
    if len(first) != len(second):
        raise UserError(f"multi30k: {len(first)} English lines, but {len(second)} German ones; they must be aligned.")
    for en, de in zip(first, second, strict=True):
        yield {"en": en, "de": de}


def _both(name: str) -> list[str]:
    return [f"multi30k/{name}.en", f"multi30k/{name}.de"]


class Multi30k(_Files):
    """Multi30k, task 1 (Elliott et al. 2016): captions in English and German; `test` is test_2016_flickr."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "multi30k/train.en, train.de, val.en, val.de and the test sets' files of the authors' release, task 1, raw."
    )
    files = {  # noqa: RUF012 - read only
        "train": (_both("train"), _aligned, _all),
        "validation": (_both("val"), _aligned, _all),
        "test": (_both("test_2016_flickr"), _aligned, _all),
    }
    columns = {"en": tfds.features.Text(), "de": tfds.features.Text()}  # noqa: RUF012 - read only


class Multi30kFlickr2017(Multi30k):
    """The same with test_2017_flickr as `test`."""

    files = {**Multi30k.files, "test": (_both("test_2017_flickr"), _aligned, _all)}  # noqa: RUF012 - read only


class Multi30kCoco2017(Multi30k):
    """The same with test_2017_mscoco as `test`."""

    files = {**Multi30k.files, "test": (_both("test_2017_mscoco"), _aligned, _all)}  # noqa: RUF012 - read only


def _squad(text: str) -> Rows:
    """The nested form of SQuAD 1.1, a record for each question."""
    for article in json.loads(text)["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = {
                    "text": [answer["text"] for answer in asked["answers"]],
                    "answer_start": [answer["answer_start"] for answer in asked["answers"]],
                }
                yield {
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": answers,
                }


_QUESTIONS = {
    "title": tfds.features.Text(),
    "context": tfds.features.Text(),
    "question": tfds.features.Text(),
    "answers": tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32}),
}


def _sites(held_out: bool) -> Callable[[str], Rows]:
    """The questions on every fifth site, or on the others."""

    def read(text: str) -> Rows:
        sites: dict[str, int] = {}
        for row in _squad(text):
            number = sites.setdefault(row["title"], len(sites))
            if (number % 5 == 4) == held_out:
                yield row

    return read


class PolicyQa(_Files):
    """Questions on the privacy policies of web sites (Ahmad et al. 2020).

    `train` is the published dev file but for every fifth site, which is `validation`; `test` is the published one.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = "policyqa/dev.json and policyqa/test.json of the authors' release."
    files = {  # noqa: RUF012 - read only
        "train": (["policyqa/dev.json"], _sites(False), _all),
        "validation": (["policyqa/dev.json"], _sites(True), _all),
        "test": (["policyqa/test.json"], _squad, _all),
    }
    columns = _QUESTIONS


class XquadEn(_Files):
    """XQuAD in English (Artetxe et al. 2020), for evaluation only: one split, to be read with `data.split="all"`."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "xquad/xquad.en.json of the authors' release."
    files = {"train": (["xquad/xquad.en.json"], _squad, _all)}  # noqa: RUF012 - read only
    columns = _QUESTIONS


def _abstracts(text: str) -> Rows:
    for line in lines(text):
        row = json.loads(line)
        yield {"source": " ".join(row["source"]), "target": row["target"][0], "references": row["target"]}


class SciTldr(_Files):
    """SciTLDR-A (Cachola et al. 2020): abstracts of papers and what they say in one sentence, `references` being all of them."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "scitldr/train.jsonl, dev.jsonl and test.jsonl of the authors' release, SciTLDR-A."
    files = {  # noqa: RUF012 - read only
        "train": (["scitldr/train.jsonl"], _abstracts, _all),
        "validation": (["scitldr/dev.jsonl"], _abstracts, _all),
        "test": (["scitldr/test.jsonl"], _abstracts, _all),
    }
    columns = {  # noqa: RUF012 - read only
        "source": tfds.features.Text(),
        "target": tfds.features.Text(),
        "references": tfds.features.Sequence(tfds.features.Text()),
    }


def _one(text: str) -> Rows:
    yield {"text": text}


class WikiText2(_Files):
    """WikiText-2, the version of word tokens (Merity et al. 2017); each split is one text."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "wikitext2/wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens."
    files = {  # noqa: RUF012 - read only
        "train": (["wikitext2/wiki.train.tokens"], _one, _all),
        "validation": (["wikitext2/wiki.valid.tokens"], _one, _all),
        "test": (["wikitext2/wiki.test.tokens"], _one, _all),
    }
    columns = {"text": tfds.features.Text()}  # noqa: RUF012 - read only


def _books(text: str) -> Rows:
    for line in lines(text):
        row = json.loads(line)
        yield {"title": row["title"], "text": row["text"]}


class Books19c(_Files):
    """Novels of the 19th century in English, split by book."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "books19c/train.jsonl, valid.jsonl and test.jsonl: a book a line, with the fields title and text."
    )
    files = {  # noqa: RUF012 - read only
        "train": (["books19c/train.jsonl"], _books, _all),
        "validation": (["books19c/valid.jsonl"], _books, _all),
        "test": (["books19c/test.jsonl"], _books, _all),
    }
    columns = {"title": tfds.features.Text(), "text": tfds.features.Text()}  # noqa: RUF012 - read only

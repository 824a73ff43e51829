"""Tagged words: targets at first tokens against a slow version, a tagger that learns, entities by hand, bad input."""

import json

import numpy as np
import pytest

from experiments import predict
from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.data.tags import make
from tfm_jax.evals import entities
from tfm_jax.train.run import train

pytest.importorskip("seqeval")

NAMES, PLACES, REST = ["anna", "ben", "carla"], ["rome", "new york", "oslo"], ["went", "to", "and", "saw", "the"]


def sentences(count, seed):
    draw, rows = np.random.default_rng(seed), []
    for _ in range(count):
        words, tags = [], []
        for _ in range(int(draw.integers(3, 12))):
            kind = int(draw.integers(3))
            found = str(draw.choice((NAMES, PLACES, REST)[kind])).split()
            words += found
            tags += [["B-PER"], ["B-LOC", "I-LOC"], ["O"]][kind][: len(found)]
        rows.append({"words": words, "tags": tags})
    return rows


def write(folder, **splits):
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}/*.jsonl"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tags"), train=sentences(300, 0), valid=sentences(30, 1))


@pytest.mark.parametrize("tokenizer", ["bytes", "wordpiece:60", "bpe:300"])
def test_first_tokens_have_their_words_tags(source, tokenizer):
    data, rows = make(source=source, tokenizer=tokenizer, seq_len=48, batch_size=4), sentences(30, 1)
    held, codec = data.evals("validation", 4), data.tokenizer
    names, order, cut = sorted({"O", "B-PER", "B-LOC", "I-LOC"}), held.places.order, 0
    assert data.sizes == {"classes": 4}
    for step in range(held.num_batches):
        batch = held.batch_at(step)
        for i in range(4):
            place = 4 * step + i
            if place >= len(rows):
                assert not batch["weights"][i].any()
                continue
            row = rows[order[place]]
            at = np.flatnonzero(batch["weights"][i])
            assert [names[t] for t in batch["targets"][i][at]] == row["tags"][: len(at)]
            text = batch["inputs"]["tokens"][i][batch["inputs"]["valid"][i]]
            # From one first token to the next is a word; the last may be cut.
            words = [codec.decode(text[a:b]).strip() for a, b in zip(at, [*at[1:], len(text) - 1], strict=True)]
            assert words[:-1] == row["words"][: len(at)][:-1] and row["words"][len(at) - 1].startswith(words[-1])
            cut += len(row["words"]) - len(at)
    assert (cut > 0) == (tokenizer == "bytes")


@pytest.mark.journey
def test_a_tagger_learns(source, tmp_path):
    config = configs.resolve(
        {
            "model": {"name": "bert", "variant": "mini", "layers": 1, "width": 32, "heads": 2, "outputs": ("tags",)},
            "data": {"name": "tags", "source": source, "tokenizer": "wordpiece:60", "seq_len": 48, "batch_size": 16},
            "optim": {"lr": 1e-2, "warmup_steps": 5},
            "train": {"steps": 60},
            "evals": {"validation": {"split": "validation"}, "entities": {"name": "entities"}},
            "log": {"tensorboard": False},
        }
    )
    result = train(config, tmp_path).result
    assert result["eval/entities/f1"] > 0.95 and result["eval/entities/sentences"] == 30
    assert result["eval/validation/accuracy"] > 0.95
    # What is written to a file is what was scored, line by line that of the source's.
    assert predict.main([f"--run={tmp_path}", f"--to={tmp_path}/tags.jsonl"]) == 0
    found = [json.loads(line)["tags"] for line in (tmp_path / "tags.jsonl").read_text().splitlines()]
    with open(source.removeprefix("jsonl:").replace("*", "valid")) as rows:
        wanted = [json.loads(row)["tags"] for row in rows]
    words = [["O" if tag is None else tag for tag in tags] for tags in found]
    assert entities.scored(wanted, words)["f1"] == pytest.approx(result["eval/entities/f1"])


def test_entities_by_hand():
    """Two of three found are right, of four that there are."""
    wanted = [["B-PER", "O", "B-LOC", "I-LOC"], ["B-PER", "B-PER"]]
    found = [["B-PER", "O", "B-LOC", "O"], ["B-PER", "O"]]
    got = entities.scored(wanted, found)
    assert got == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7})
    # As CoNLL's script: an entity may begin without its B.
    assert entities.scored([["O", "B-PER", "I-PER"]], [["O", "I-PER", "I-PER"]])["f1"] == 1.0


def test_bad_input(tmp_path):
    good = {"words": ["a", "b"], "tags": ["O", "B-X"]}

    def made(*rows, valid=good, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        source = write(folder, train=rows, valid=[valid])
        return folder, lambda: make(source=source, tokenizer="bytes", **changes)

    folder, call = made({**good, "tags": ["O"]})
    with says(f"{folder}/train.jsonl, line 1: 2 words, but 1 tags."):
        call()
    with says("data.batch_size=0: must be at least 1."):
        make(source="stdlib", batch_size=0)
    with says("data.source='stdlib' has no fields: tags need jsonl:GLOB, tfds:NAME or hf:DIR."):
        make(source="stdlib")
    folder, call = made(good, valid={**good, "tags": ["O", "B-Y"]})
    with says(
        f"{folder}/valid.jsonl, line 1: 'B-Y' in the field 'tags' is no tag of the train split or of data.names. Did you mean 'B-X'?"
    ):
        call().evals("validation", 1)
    # Of another coding, if it is one.
    folder, call = made(good, valid={**good, "tags": [0, 1]})
    with says(
        f"{folder}/valid.jsonl, line 1: 0 in the field 'tags' is no tag of the train split or of data.names. Valid: B-X, O."
    ):
        call().evals("validation", 1)
    # A test set that nobody can tag is in nobody's way.
    assert made(good, valid={"words": ["a"]})[1]().train.batch_at(0)["weights"].sum() == 2 * 32
    for tag in (["O"], {"O": 1}, 1.5, None):
        folder, call = made(good, {**good, "tags": ["O", tag]})
        with says(f"{folder}/train.jsonl, line 2: {tag!r} in the field 'tags' is neither a name nor a whole number."):
            call()
    folder, call = made(good, {**good, "tags": ["O", 1]})
    with says(
        f"{folder}/train.jsonl, line 2: 1 in the field 'tags' stands beside 'O': tags are all names or all numbers."
    ):
        call()
    with says("data.names=('O', 'B-X', 'B-X'): 'B-X' stands there twice. Name each tag once."):
        made(good, names=("O", "B-X", "B-X"))[1]()
    folder, call = made({"words": "a b", "tags": ["O"]})
    with says(f"{folder}/train.jsonl, line 1: the field 'words' is a str, not a list."):
        call()
    # Two letters are no tags of two words.
    for value, kind in ((None, "NoneType"), (3, "int"), ("OO", "str")):
        folder, call = made(good, {**good, "tags": value})
        with says(f"{folder}/train.jsonl, line 2: the field 'tags' is a {kind}, not a list."):
            call()
    folder, call = made({**good, "tags": [0, 1]}, valid={**good, "tags": [0, 1]})
    with says(
        f"data.source='jsonl:{folder}/*.jsonl': the tags in the field 'tags' are numbers; name them: data.names."
    ):
        call()
    _, call = made({**good, "tags": [0, 1]}, valid={**good, "tags": [0, 1]}, names=["O", "B-X"])
    assert call().evals("validation", 1).batch_at(0)["targets"][0].sum() == 1

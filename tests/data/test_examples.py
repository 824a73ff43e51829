"""Labelled texts: rows against a slow version and against the tokenizer library's own truncation; order; bad input."""

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from tests.errors import says
from tfm_jax.data.examples import Training, make
from tfm_jax.data.rows import POOL, width_for
from tfm_jax.data.tokenizers import read_json_tokenizer
from tfm_jax.data.types import Frame
from tfm_jax.data.vocabularies import byte_tokenizer
from tfm_jax.tasks.base import targets_of

WORDS = ["the", "whale", "ship", "sea", "sails", "swims", "on", "in", "and", "a"]
DRAW = np.random.default_rng(0)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(longest):
    return " ".join(DRAW.choice(WORDS, DRAW.integers(0, longest)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`train.jsonl` of 300 records with two texts, a class by name, by number, and a number; 40 in `valid.jsonl`."""
    base = tmp_path_factory.mktemp("examples")
    for name, count in (("train", 300), ("valid", 40)):
        rows = [
            {
                "text": sentence(40),
                "other": sentence(60),
                "mood": ("good", "bad", "none")[i % 3],
                "class": i % 4,
                "score": i / 7,
                "place": i,
            }
            for i in range(count)
        ]
        write(base / f"{name}.jsonl", rows)
    return base


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tokenizer file with BERT's marks."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    engine = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*marks, *WORDS])}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens(marks)
    engine.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path = tmp_path_factory.mktemp("bert") / "tokenizer.json"
    path.write_text(engine.to_str())
    return path


def records(folder, split="train"):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def opened(folder, bert, **settings):
    return make(source=f"jsonl:{folder}/*.jsonl", tokenizer=f"file:{bert}", **settings)


@pytest.mark.parametrize("pair", [None, "other"])
@pytest.mark.parametrize("seq_len", [16, 24, 33])
def test_rows_are_what_the_tokenizer_library_makes(folder, bert, pair, seq_len):
    data = opened(folder, bert, pair=pair, label="mood", seq_len=seq_len, batch_size=8)
    engine = Tokenizer.from_file(str(bert))
    engine.enable_truncation(seq_len, strategy="longest_first")
    found = data.evals("train", 8)
    rows, widths = records(folder), set()
    assert data.sizes == {"classes": 3} | ({} if pair is None else {"types": 2})
    for step in range(found.num_batches):
        batch, (index, inside) = found.batch_at(step), found.places.at(step)
        widths.add(batch["inputs"]["tokens"].shape[1])
        for row, place in enumerate(index[inside]):
            texts = [rows[place]["text"]] + ([] if pair is None else [rows[place]["other"]])
            want = engine.encode(*texts)
            size = len(want.ids)
            assert batch["inputs"]["tokens"][row, :size].tolist() == want.ids
            np.testing.assert_array_equal(
                batch["inputs"]["valid"][row], np.arange(batch["inputs"]["valid"].shape[1]) < size
            )
            if pair is not None:
                assert batch["inputs"]["token_types"][row, :size].tolist() == want.type_ids
            assert batch["targets"][row] == ["bad", "good", "none"].index(rows[place]["mood"])
    assert max(widths) <= seq_len and (len(widths) > 1 or seq_len < 32)


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [
        (64, {1: 8, 8: 8, 9: 16, 16: 16, 17: 24, 24: 24, 25: 32, 33: 48, 49: 64, 64: 64}),
        (33, {3: 8, 9: 16, 17: 24, 25: 33}),
        (20, {8: 10, 11: 20}),
        (5, {1: 5, 5: 5}),
    ],
)
def test_widths(limit, wanted):
    assert {longest: width_for(longest, limit) for longest in wanted} == wanted


def test_every_example_comes_once_an_epoch_and_rows_are_of_the_whole_batch(folder, bert):
    data = opened(folder, bert, label="place", kind="number", batch_size=7, seq_len=64)
    assert isinstance(data.train, Training) and data.sizes == {"classes": 1}
    batches = [data.train.batch_at(step) for step in range(2 * 300 // 7)]
    seen = np.concatenate([batch["targets"] for batch in batches]).astype(int)
    # Pools of 112 examples do not end with the epoch of 300; two epochs are 5.4 pools.
    counts = np.bincount(seen, minlength=300)
    assert len(seen) == 595 and counts.min() >= 1 and counts.max() <= 3 and np.mean(counts == 2) > 0.8
    lengths = [batch["inputs"]["valid"].sum(1) for batch in batches]
    assert np.mean([x.max() - x.min() for x in lengths]) < 0.35 * np.ptp(np.concatenate(lengths))
    for step in (0, 7, POOL + 3):
        whole, part = data.train.batch_at(step), data.train.batch_at(step, slice(1, 4))
        for name in whole["inputs"]:
            np.testing.assert_array_equal(whole["inputs"][name][1:4], part["inputs"][name])
        np.testing.assert_array_equal(whole["targets"][1:4], part["targets"])
        again = opened(folder, bert, label="place", kind="number", batch_size=7, seq_len=64).train.batch_at(step)
        np.testing.assert_array_equal(whole["inputs"]["tokens"], again["inputs"]["tokens"])
    other = opened(folder, bert, label="place", kind="number", batch_size=7, seq_len=64, seed=1).train.batch_at(0)
    assert not np.array_equal(np.sort(other["targets"]), np.sort(batches[0]["targets"]))


@pytest.mark.parametrize("batch_size", [16, 70])
def test_no_example_stands_beside_itself(folder, bert, batch_size):
    """But in the one batch of a pool in which an epoch ends and the next begins, and there by chance alone."""
    data = opened(folder, bert, label="place", kind="number", batch_size=batch_size, seq_len=64)
    batches = [data.train.batch_at(step)["targets"] for step in range(4 * POOL)]
    double = [len(batch) - len(set(batch)) for batch in batches]
    ends = 4 * POOL * batch_size // 300
    assert sum(number > 0 for number in double) <= ends and max(double) < batch_size / 4


def test_a_pass_has_every_example_once(folder, bert):
    data = opened(folder, bert, label="place", kind="number", batch_size=64)
    found = data.evals("validation", 16)
    batches = [found.batch_at(i) for i in range(found.num_batches)]
    weights = np.concatenate([b["weights"] for b in batches])
    targets = np.concatenate([b["targets"] for b in batches])
    assert sorted(targets[weights > 0].astype(int).tolist()) == list(range(40)) and weights.sum() == 40


def test_a_tokenizer_without_marks_frames_with_its_end(folder, tmp_path):
    assert byte_tokenizer().frame() == Frame([256], [256], [256], False)
    data = make(source=f"jsonl:{folder}/*.jsonl", tokenizer="bytes", pair="other", label="class", seq_len=512)
    row = records(folder)[data.evals("train", 1).places.at(200)[0][0]]
    batch = data.evals("train", 1).batch_at(200)["inputs"]
    want = [256, *row["text"].encode(), 256, *row["other"].encode(), 256]
    assert batch["tokens"][0, : len(want)].tolist() == want and "token_types" not in batch


def test_both_texts_are_of_one_tokenizer_that_has_read_both(tmp_path):
    rows = [{"text": f"abc {i}", "other": f"xyz {i}", "label": i % 2} for i in range(40)]
    for name in ("train", "valid"):
        write(tmp_path / f"{name}.jsonl", rows)
    data = make(source=f"jsonl:{tmp_path}/*.jsonl", tokenizer="chars", pair="other")
    batch = data.evals("train", 1).batch_at(0)["inputs"]
    shown = data.tokenizer.decode(batch["tokens"][0][batch["valid"][0]])
    assert "abc" in shown and "xyz" in shown and "\ufffd" not in shown


def test_marks_of_roberta(bert, tmp_path):
    engine = Tokenizer.from_file(str(bert))
    engine.add_special_tokens(["<s>", "</s>"])
    ids = {mark: engine.token_to_id(mark) for mark in ("<s>", "</s>")}
    engine.post_processor = RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    found = read_json_tokenizer(tmp_path / "tokenizer.json").frame()
    first, last = ids["<s>"], ids["</s>"]
    assert found == Frame([first], [last, last], [last], False)


def test_a_text_that_spells_the_end_mark(tmp_path):
    """Where the mark is a piece of the vocabulary, as T5's and ALBERT's are: its document would be two."""
    pieces = [("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in "\u2581abcde")]
    engine = Tokenizer(models.Unigram(pieces, 1))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.add_special_tokens(["</s>", "<unk>"])
    engine.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 0)])
    (tmp_path / "tokenizer.json").write_text(engine.to_str())
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(("abc", "<s>a</s>", "de"))]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "valid.jsonl", rows[:1])
    common = dict(tokenizer=f"file:{tmp_path}/tokenizer.json", cache_dir=str(tmp_path / "cache"), seq_len=16)
    with says(
        f"data.source='jsonl:{tmp_path}/*.jsonl': the text '<s>a</s>' of the split 'train' has '</s>' in it, which this tokenizer reads as"
        " the end of a text. Take it out."
    ):
        make(source=f"jsonl:{tmp_path}/*.jsonl", **common)
    write(tmp_path / "train.jsonl", [rows[0], rows[2]])
    make(source=f"jsonl:{tmp_path}/*.jsonl", **common)


def test_predictions_are_logits_of_each_example(folder, bert, tmp_path):
    file = tmp_path / "told.npy"
    logits = DRAW.normal(size=(300, 3))
    np.save(file, logits)
    data = opened(folder, bert, label="mood", predictions=str(file), batch_size=5, seq_len=24)
    batch, (index, _) = data.evals("train", 5).batch_at(2), data.evals("train", 5).places.at(2)
    np.testing.assert_array_equal(batch["teacher"], logits[index].astype(np.float32))
    np.save(file, np.where(np.arange(300)[:, None] == 7, np.nan, logits))
    with says(f"data.predictions={str(file)!r}: row 7 has a number that is not finite."):
        opened(folder, bert, label="mood", predictions=str(file))
    np.save(file, logits[:200])
    with says(f"data.predictions={str(file)!r} is (200, 3), and the train split has 300 examples."):
        opened(folder, bert, label="mood", predictions=str(file))
    lines = tmp_path / "told.jsonl"
    lines.write_text('{"label": "good"}\n' * 300)
    with says(f"data.predictions={str(lines)!r} is no array: python -m experiments.predict --to FILE.npy writes one."):
        opened(folder, bert, label="mood", predictions=str(lines))
    np.save(file, logits[:, 0])
    with says(
        f"data.predictions={str(file)!r} holds numbers (300,), and a student learns from logits (N, C). One that is"
        " to predict numbers learns from the teacher itself: task.teacher=RUN."
    ):
        opened(folder, bert, label="mood", predictions=str(file))


def test_bad_input_is_named(folder, bert, tmp_path):
    with says("data.source='stdlib' has no fields: examples need jsonl:GLOB, tfds:NAME or hf:DIR."):
        make(source="stdlib")
    with says(f"{folder}/train.jsonl, line 1: no field 'mod'. Did you mean 'mood'?"):
        opened(folder, bert, label="mod")
    with says(
        f"{folder}/train.jsonl, line 2: {1 / 7} in the field 'score' is not a whole number; is it a number to predict"
        " (data.kind=number)?"
    ):
        opened(folder, bert, label="score")
    with says(f"{folder}/train.jsonl, line 1: the field 'mood' is 'good', not a finite number (float32)."):
        opened(folder, bert, label="mood", kind="number")
    with says("data.seq_len=4: the marks alone take 3, and each text at least one more."):
        opened(folder, bert, pair="other", label="mood", seq_len=4)
    rows = records(folder)
    write(tmp_path / "train.jsonl", rows[:9])
    write(tmp_path / "valid.jsonl", [rows[0], {**rows[1], "mood": "god"}])
    with says(
        f"{tmp_path}/valid.jsonl, line 2: 'god' in the field 'mood' is none of the classes, which"
        " are the train split's or data.names. Did you mean 'good'?"
    ):
        opened(tmp_path, bert, label="mood").evals("validation", None)
    # GLUE's test sets have labels that are none: nobody is in the way of what nobody asks for.
    assert opened(tmp_path, bert, label="mood").evals("train", 9).batch_at(0)["targets"].shape == (9,)
    write(tmp_path / "train.jsonl", [rows[0], {**rows[1], "class": -1, "place": "x", "mood": ["x"]}])
    with says(f"{tmp_path}/train.jsonl, line 2: -1 in the field 'class' is a class below 0."):
        opened(tmp_path, bert, label="class")
    with says(
        f"{tmp_path}/train.jsonl, line 2: 'x' in the field 'place' stands beside 0: classes are all names or all numbers."
    ):
        opened(tmp_path, bert, label="place")
    with says(f"{tmp_path}/train.jsonl, line 2: the field 'mood' is a list, not a label."):
        opened(tmp_path, bert, label="mood")


def test_classes_in_a_given_order(folder):
    """As a model that came with names of its own has them."""
    common = {"source": f"jsonl:{folder}/*.jsonl", "label": "mood", "tokenizer": "bytes", "seq_len": 64}
    order = ["none", "good", "bad"]
    own, given = make(**common), make(**common, names=order)
    a, b = (data.evals("validation", 40).batch_at(0)["targets"] for data in (own, given))
    assert [sorted(order)[i] for i in a] == [order[i] for i in b] and own.fingerprint != given.fingerprint
    with says("data.names=('x',): a number has no classes. Leave it out."):
        make(**{**common, "label": "score", "kind": "number"}, names=["x"])


def test_pairs_that_stay_apart(folder, bert):
    """Each text is what it would be alone, in rows of one length, whatever is predicted."""
    common = dict(source=f"jsonl:{folder}/*.jsonl", tokenizer=f"file:{bert}", batch_size=8, cache_dir=str(folder))
    both = make(**common, pair="other", pair_as="apart", label="score", kind="number", seq_len=48)
    alone = [make(**common, text=text, label="score", kind="number", seq_len=48) for text in ("text", "other")]
    assert both.sizes == {"classes": 1}
    for step in range(5):
        batch = both.train.batch_at(step)
        widths = {x.shape for name in ("inputs", "other") for x in batch[name].values()}
        assert len(widths) == 1
        (shape,) = widths
        assert batch["other"].keys() == batch["inputs"].keys() == {"tokens", "valid"}
        for name, data in zip(("inputs", "other"), alone, strict=True):
            rows = data.evals("train", 1)
            for row, target in enumerate(batch["targets"]):
                (place,) = (i for i in range(rows.num_batches) if rows.batch_at(i)["targets"][0] == target)
                want = rows.batch_at(place)["inputs"]
                count = int(want["valid"].sum())
                assert batch[name]["valid"][row].sum() == count <= shape[1]
                np.testing.assert_array_equal(batch[name]["tokens"][row, :count], want["tokens"][0, :count])
    part = both.train.batch_at(3, slice(2, 5))
    np.testing.assert_array_equal(part["other"]["tokens"], both.train.batch_at(3)["other"]["tokens"][2:5])
    unlabelled = make(**common, pair="other", pair_as="apart", label=None, seq_len=48)
    assert unlabelled.sizes == {} and unlabelled.fingerprint != both.fingerprint
    assert unlabelled.train.batch_at(0).keys() == {"inputs", "other", "weights"}
    with says("data.pair_as='apart': there is no second text. Set data.pair=FIELD."):
        make(**common, pair_as="apart")


def test_texts_without_labels(folder, bert):
    """The rows of labelled ones, without targets: a task that needs them says so."""
    labelled, plain = (opened(folder, bert, label=label, batch_size=5, seq_len=64) for label in ("place", None))
    assert plain.sizes == plain.filled_in == {} and len(plain.train.examples) == len(labelled.train.examples)
    for step in range(3):
        have, want = plain.train.batch_at(step), labelled.train.batch_at(step)
        assert have.keys() == {"inputs", "weights"}
        np.testing.assert_array_equal(have["inputs"]["tokens"], want["inputs"]["tokens"])
    with says(
        "This data has no labels to train or to score by: data.label=None is for `python -m experiments.predict`. Name the"
        " field."
    ):
        targets_of(have)


def test_a_run_keeps_the_names_of_its_classes(folder, bert, tmp_path):
    """So that other data, with fewer of them, has the same numbers for them."""
    common = dict(tokenizer=f"file:{bert}", seq_len=48, batch_size=8, cache_dir=str(folder))
    own = make(source=f"jsonl:{folder}/*.jsonl", label="mood", **common)
    assert own.filled_in == {"names": ["bad", "good", "none"]}
    write(tmp_path / "train.jsonl", [{"text": "the sea", "mood": "none"}, {"text": "a ship", "mood": "good"}] * 8)
    write(tmp_path / "valid.jsonl", [{"text": "the sea", "mood": "none"}])
    other = make(source=f"jsonl:{tmp_path}/*.jsonl", label="mood", **common, **own.filled_in)
    assert other.evals("validation", 1).batch_at(0)["targets"].tolist() == [2] and other.sizes == own.sizes
    numbered = make(source=f"jsonl:{folder}/*.jsonl", label="class", names=["a", "b", "c", "d"], **common)
    assert {int(x) for x in numbered.train.batch_at(0)["targets"]} <= {0, 1, 2, 3}
    write(tmp_path / "valid.jsonl", [{"text": "the sea", "mood": "nine"}])
    with says(
        f"{tmp_path}/valid.jsonl, line 1: 'nine' in the field 'mood' is none of the classes, which"
        " are the train split's or data.names. Did you mean 'none'?"
    ):
        make(source=f"jsonl:{tmp_path}/*.jsonl", label="mood", **common).evals("validation", None)
    write(tmp_path / "train.jsonl", [{"text": "the sea", "mood": 1.5}])
    for value in (math.nan, math.inf, -math.inf, -1e39, 10**400):
        write(tmp_path / "valid.jsonl", [{"text": "the sea", "mood": 3e38}, {"text": "the sea", "mood": value}])
        with says(f"{tmp_path}/valid.jsonl, line 2: the field 'mood' is {value!r}, not a finite number (float32)."):
            make(source=f"jsonl:{tmp_path}/*.jsonl", label="mood", kind="number", **common).evals("validation", None)


def test_names_that_are_numbers_are_no_places(tmp_path):
    """Label 3 of the names 1, 2, 3 is the last one; label 0 is none, though there is a place 0."""

    def targets(labels, names):
        for split in ("train", "valid"):
            write(tmp_path / f"{split}.jsonl", [{"text": "the sea", "label": label} for label in labels])
        data = make(source=f"jsonl:{tmp_path}/*.jsonl", tokenizer="bytes", names=names, seq_len=16)
        return data.evals("validation", len(labels)).batch_at(0)["targets"].tolist()

    assert targets([3, 1, 2], (1, 2, 3)) == [2, 0, 1] and targets([1, -1, 1.0], (-1, 1)) == [1, 0, 1]
    assert targets([3, 1, 2, "1"], ("1", "2", "3")) == [2, 0, 1, 0] and targets([1, "nan"], ("good", "nan")) == [1, 1]
    assert targets(["b", 0, 1], ("a", "b")) == [1, 0, 1] and targets([1, 0], (0, 1)) == [1, 0]
    for names, hint in (
        ((1, 2, 3), "1, 2, 3"),
        (("1", "2", "3"), "1, 2, 3"),
        ((-1, 1), "-1, 1"),
        (("low", 2), "2, low"),
    ):
        with says(
            f"{tmp_path}/train.jsonl, line 2: 0 in the field 'label' is none of the classes, which are the train split's or"
            f" data.names. Valid: {hint}."
        ):
            targets([names[-1], 0], names)
    with says("data.names=('a', 'b', 'a'): 'a' stands there twice. Name each class once."):
        targets(["a", "b"], ("a", "b", "a"))
    with says("data.names=(1, 1.0): 1.0 stands there twice. Name each class once."):
        targets([1], (1, 1.0))

"""Questions: windows against a slow version, targets that spell the answer, the recipe's smoke form, bad input."""

import json

import jax
import numpy as np
import pytest

from experiments import predict
from tests.data.test_examples import bert  # noqa: F401 - a fixture
from tests.errors import says
from tests.test_configs import FOLDER
from tfm_jax import config as configs
from tfm_jax.data.questions import make
from tfm_jax.train.run import train

WORDS = ["the", "whale", "ship", "sea", "sails", "swims", "on", "in", "and", "a"]


def write(folder, **splits):
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder}/*.jsonl"


def record(question, words, first, last):
    context = " ".join(words)
    start = len(" ".join([*words[:first], ""]))
    text = " ".join(words[first : last + 1])
    return {"question": question, "context": context, "answers": {"text": [text], "answer_start": [start]}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    draw, rows = np.random.default_rng(0), {"train": [], "valid": []}
    for split, count in (("train", 60), ("valid", 20)):
        for _ in range(count):
            words = list(draw.choice(WORDS, draw.integers(1, 70)))
            first = int(draw.integers(len(words)))
            last = min(len(words) - 1, first + int(draw.integers(4)))
            rows[split].append(record(" ".join(draw.choice(WORDS, draw.integers(1, 9))), words, first, last))
    return write(tmp_path_factory.mktemp("questions"), **rows), rows


def test_windows_against_a_slow_version(source, bert):  # noqa: F811
    data = make(source=source[0], tokenizer=f"file:{bert}", seq_len=32, overlap=5, longest_question=6, batch_size=4)
    rows, codec = source[1]["valid"], data.tokenizer
    want = []
    for row in rows:
        question = codec.encode_batch([row["question"]])[0].tolist()[:6]
        words = row["context"].split()
        context = codec.encode_batch([row["context"]])[0].tolist()
        first = row["context"][: row["answers"]["answer_start"][0]].count(" ")
        last = first + row["answers"]["text"][0].count(" ")
        assert len(words) == len(context)
        room, start = 32 - 3 - len(question), 0
        while True:
            piece = context[start : start + room]
            tokens = [2, *question, 3, *piece, 3]
            at = len(question) + 2 - start
            held = start <= first and last < start + room
            want.append((tokens, [0] * (len(question) + 2) + [1] * (len(piece) + 1),
                         [at + first, at + last] if held else [0, 0]))  # fmt: skip
            if start + room >= len(context):
                break
            start += room - 5
    held = data.evals("validation", 4)
    found = []
    for step in range(held.num_batches):
        batch = held.batch_at(step)
        for i in range(4):
            if batch["weights"][i]:
                valid = batch["inputs"]["valid"][i]
                found.append((batch["inputs"]["tokens"][i][valid].tolist(), batch["inputs"]["token_types"][i][valid].tolist(),
                              batch["targets"][i].tolist()))  # fmt: skip
    assert sorted(found) == sorted(want) and len(want) > len(rows) and data.sizes == {"types": 2}
    assert data.facts["validation"] == {"questions": 20} and data.facts["train"]["questions"] == 60
    assert data.facts["train"]["examples"] == len(data.train.examples) > 60


def test_where_the_context_stands(source, bert):  # noqa: F811
    held = make(source=source[0], tokenizer=f"file:{bert}", seq_len=32, overlap=5, longest_question=6).evals(
        "validation", 4
    )
    for step in range(held.num_batches):
        batch = held.batch_at(step)
        for row, (owner, first, places) in enumerate(held.shown(step)):
            start, stop = batch["targets"][row]
            if stop:
                text = held.text(owner, int(places[start - first, 0]), int(places[stop - first, 1]))
                assert text == held.references[owner][0]


def test_answers_are_found_by_the_recipes_smoke_form(tmp_path):
    """The number among words and letters."""
    draw, rows = np.random.default_rng(0), {"train": [], "valid": []}
    for split, count in (("train", 400), ("valid", 40)):
        for _ in range(count):
            words = ["x"] * int(draw.integers(2, 12))
            sought = {"number": str(draw.integers(8)), "letter": "pqrs"[int(draw.integers(4))]}
            for word in sought.values():
                words.insert(int(draw.integers(len(words) + 1)), word)
            place = words.index(sought["number"])
            rows[split].append(record("number", words, place, place))
    source = write(tmp_path, **rows)
    config = configs.resolve(
        configs.load(f"{FOLDER}/qa_policyqa.py:smoke"), [("data.source", source), ("log.tensorboard", "False")]
    )
    result = train(config, tmp_path / "run", devices=jax.devices()[:1]).result
    assert result["eval/validation/questions"] == 40
    assert result["eval/validation/f1"] >= result["eval/validation/exact_match"] > 80
    assert predict.main([f"--run={tmp_path}/run", f"--to={tmp_path}/run/answers.jsonl", "--split=validation"]) == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    right = [row["answers"]["text"][0] == answer for row, answer in zip(rows["valid"], answers, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(result["eval/validation/exact_match"])
    with says("--beams is of beam search, and this run makes no texts."):
        predict.main([f"--run={tmp_path}/run", f"--to={tmp_path}/run/answers.jsonl", "--beams=3"])


def test_bad_input(tmp_path, bert):  # noqa: F811
    good = record("a", ["the", "ship", "sails"], 1, 1)

    def made(row, valid=good, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        source = write(folder, train=[row, good], valid=[valid])
        return folder, lambda: make(source=source, tokenizer=f"file:{bert}", **changes)

    folder, call = made({**good, "answers": {"text": ["ship"], "answer_start": [5]}})
    with says(f"{folder}/train.jsonl, line 1: the answer 'ship' is not in its context at 5. It is at 4."):
        call()
    with says("data.longest_question=0: must be at least 1."):
        make(source="stdlib", longest_question=0)
    with says("data.source='stdlib' has no fields: questions need jsonl:GLOB, tfds:NAME or hf:DIR."):
        make(source="stdlib")
    folder, call = made({**good, "answers": {"text": [], "answer_start": []}})
    with says(f"{folder}/train.jsonl, line 1: the field 'answers' has 0 texts and 0 starts."):
        call()
    folder, call = made({**good, "answers": {"text": ["ship"], "answer_start": [None]}})
    with says(f"{folder}/train.jsonl, line 1: the field 'answers' has the start None, which is no whole number."):
        call()
    for answer, start, hint in ((" ", 3, "It is blank."), ("sloop", 4, "It is nowhere in it.")):
        folder, call = made({**good, "answers": {"text": [answer], "answer_start": [start]}})
        with says(f"{folder}/train.jsonl, line 1: the answer {answer!r} is not in its context at {start}. {hint}"):
            call()
    # A test set whose answers nobody knows is in nobody's way.
    folder, call = made(good, valid={**good, "answers": None})
    assert call().train.batch_at(0)["targets"].any()
    with says(f"{folder}/valid.jsonl, line 1: the field 'answers' is not a dict with 'text' and 'answer_start'."):
        call().evals("validation", None)
    folder, call = made({**good, "answers": "ship"})
    with says(f"{folder}/train.jsonl, line 1: the field 'answers' is not a dict with 'text' and 'answer_start'."):
        call()
    # Four characters before the end there is a word too.
    folder, call = made({**record("a", ["the", "ship"], 1, 1), "answers": {"text": ["shi"], "answer_start": [-4]}})
    with says(f"{folder}/train.jsonl, line 1: the answer 'shi' is not in its context at -4. It is at 4."):
        call()
    for key, value in (("text", "ship"), ("answer_start", 4), ("text", None)):
        folder, call = made({**good, "answers": {**good["answers"], key: value}})
        with says(f"{folder}/train.jsonl, line 1: the field 'answers' has {value!r} as {key!r}, which is no list."):
            call()
    _, call = made(good, seq_len=80, overlap=20)
    with says(
        "data.overlap=20: must be at least 0, and below the 13 tokens of a context that data.seq_len=80 leaves beside"
        " data.longest_question=64."
    ):
        call()

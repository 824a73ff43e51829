"""The harness' three questions against the model asked directly, and a small task of one's own."""

import json
import logging

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from experiments import harness as command
from experiments.generate import Loaded
from tests.errors import says
from tfm_jax.decode.sample import Sampling, generate
from tfm_jax.evals.harness import Harness
from tfm_jax.train.run import train

LENGTH = 16


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / "run"
    train(make_config(), path)
    return path


@pytest.fixture(scope="module")
def loaded(run):
    return Loaded(run)


@pytest.fixture(scope="module")
def model(loaded):
    def begins(text):
        return loaded.inputs(text, 1)[0]

    return Harness(
        loaded.model, loaded.params, loaded.tokenizer, begins=begins, end_id=loaded.end_id, max_len=LENGTH, batch_size=3
    )


def ask(kind, *questions):
    return [Instance(kind, {}, question, i) for i, question in enumerate(questions)]


@pytest.fixture(scope="module")
def ids_of(loaded):
    return lambda text: [int(i) for i in loaded.tokenizer.encode_batch([text])[0]]


@pytest.fixture(scope="module")
def log_probabilities(loaded):
    """`(ids) -> (T, V)`, of what follows each of them, in float64; padded to one shape, since no token sees later ones."""
    forward = jax.jit(lambda tokens: loaded.model.apply({"params": loaded.params}, tokens, train=False)["logits"])

    def run(ids):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(forward(padded)[0, : len(ids)], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return run


def test_log_likelihood(model, loaded, log_probabilities, ids_of):
    end = loaded.tokenizer.end_id
    # Nothing before it, a space that belongs to the answer, and a context that does not fit.
    questions = [("", "The"), ("The ", "sea"), ("The sea number 4 sees", " it")]
    for (context, answer), (found, greedy) in zip(
        questions, model.loglikelihood(ask("loglikelihood", *questions)), strict=True
    ):
        whole = [end, *ids_of(context + answer)]
        count = len(answer) + (context.endswith(" "))
        table = log_probabilities(whole[:-1][-LENGTH:])[-count:]
        assert found == pytest.approx(sum(row[i] for row, i in zip(table, whole[-count:], strict=True)), abs=1e-3)
        assert greedy == all(row.argmax() == i for row, i in zip(table, whole[-count:], strict=True))


def test_rolling(model, loaded, log_probabilities, ids_of):
    text = "The sea number 4 sees 16 of them, and no more."
    ids, end = ids_of(text), loaded.tokenizer.end_id
    want = 0.0
    for start in range(0, len(ids), LENGTH):
        part = ids[start : start + LENGTH]
        # The last window reaches back for what it has room for.
        before = [end, *ids][: start + 1][-(LENGTH - len(part) + 1) :]
        table = log_probabilities([*before, *part[:-1]])
        want += sum(row[i] for row, i in zip(table[len(before) - 1 :], part, strict=True))
    (found,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(want, abs=1e-3)


def test_generate_until(model, loaded):
    whole, _ = loaded.drawn("The ", Sampling(0.0), 8, 0)
    stop = whole[len(whole) // 2]
    questions = [("The ", {"until": [], "max_gen_toks": 8}), ("The ", {"until": stop, "max_gen_toks": 8})]
    assert model.generate_until(ask("generate_until", *questions)) == [whole, whole[: whole.index(stop)]]
    with says("A task asks for generation with num_beams, which is not known here."):
        model.generate_until(ask("generate_until", ("The ", {"num_beams": 4})))


def test_answers_beside_contexts_that_leave_no_room(model, loaded, caplog):
    """Where nothing says how long: 6 of 16 positions behind a context of 9, and no fewer than 4, for which a context of 23 is cut."""
    contexts = ["The sea ", "The ship number 7 sees "]
    want = [loaded.drawn(contexts[0], Sampling(0.0), 6, 0)[0]]
    ids = loaded.inputs(contexts[1], 1)[0][-12:]
    (made,) = generate(
        loaded.model, loaded.params, [ids], max_new=4, sampling=Sampling(0.0), end_id=loaded.end_id,
        allowed=loaded.tokenizer.vocab_size,
    )  # fmt: skip
    want.append(loaded.tokenizer.decode(made))
    with caplog.at_level(logging.WARNING):
        assert model.generate_until(ask("generate_until", *((text, {"until": []}) for text in contexts))) == want
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 contexts are cut at their beginning: with an answer they are longer than the model's 16 positions."
    ]


def test_a_question_asked_again_is_answered_anew(model):
    """As tasks do that vote over answers: the same one in each row of each batch."""
    asked = ("The ", {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    made = model.generate_until(ask("generate_until", *[asked] * 6))
    assert len(set(made)) == 6 and made == model.generate_until(ask("generate_until", *[asked] * 6))


def test_a_context_that_is_read_both_ways(loaded, ids_of):
    """A model of prefixes, of which each continuation is asked by itself, with its mask made by hand."""
    model = Harness(
        loaded.model, loaded.params, loaded.tokenizer, begins=lambda text: loaded.inputs(text, 1)[0], end_id=loaded.end_id,
        max_len=LENGTH, prefix=True, batch_size=3,
    )  # fmt: skip
    questions = [("The sea ", "is"), ("The ", "ship")]
    for (context, answer), (found, _) in zip(
        questions, model.loglikelihood(ask("loglikelihood", *questions)), strict=True
    ):
        ids = [*loaded.inputs("", 1)[0], *ids_of(context + answer)]
        count = len(ids_of(answer)) + 1  # the space is the answer's
        seen = len(ids) - count
        logits = loaded.model.apply(
            {"params": loaded.params}, np.asarray([ids[:-1]]), train=False, prefix=np.asarray([seen], np.int32)
        )["logits"][0]
        known = jax.nn.log_softmax(np.asarray(logits, np.float64))[np.arange(len(ids) - 1), ids[1:]][-count:]
        assert found == pytest.approx(float(known.sum()), rel=1e-4)
        causal = loaded.model.apply({"params": loaded.params}, np.asarray([ids[:-1]]), train=False)["logits"][0]
        assert not np.allclose(logits, causal, atol=1e-4)
    drawn = {"until": [], "max_gen_toks": 4}
    (text,) = model.generate_until(ask("generate_until", ("The sea ", drawn)))
    (ids,) = generate(
        loaded.model, loaded.params, [loaded.inputs("The sea ", 1)[0]], prefix=True, max_new=4, sampling=Sampling(0.0),
        end_id=loaded.end_id, allowed=loaded.tokenizer.vocab_size,
    )  # fmt: skip
    assert text == loaded.tokenizer.decode(ids)


def test_a_task_of_ones_own(run, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [
        {"q": f"The {word}", "a": [" number", " xqzjw!!"], "gold": i % 2}
        for i, word in enumerate(("sea", "ship", "whale"))
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    (tmp_path / "words.yaml").write_text(
        "task: words\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/test.jsonl\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: gold\ntarget_delimiter: ""\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    assert command.main([f"--run={run}", "--tasks", "words", f"--include_path={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    right = 0
    for line in questions:
        scores = [score for score, _ in model.loglikelihood(ask("loglikelihood", *((line["q"], a) for a in line["a"])))]
        right += int(np.argmax(scores)) == line["gold"]
    assert (
        found["words/acc"] == pytest.approx(right / 3)
        and json.loads((run / "harness_8_words.json").read_text()) == found
    )
    # Another task stands beside it; names that are too long for a file, or are none, too.
    (tmp_path / "more.yaml").write_text((tmp_path / "words.yaml").read_text().replace("task: words", "task: more"))
    with says("--tasks=wrds: there is no such task. Did you mean 'words'?"):
        command.main([f"--run={run}", "--tasks", "wrds", f"--include_path={tmp_path}"])
    with says(f"--include_path={tmp_path}/nowhere: there is no such folder."):
        command.main([f"--run={run}", "--tasks", "words", f"--include_path={tmp_path}/nowhere"])
    assert command.main([f"--run={run}", "--tasks", "words", "more", f"--include_path={tmp_path}"]) == 0
    # So do fewer questions of the same tasks, and another model by an average.
    flags = ["--limit=1", "--num_fewshot=0", "--average=2", "--decay=0.5"]
    assert command.main([f"--run={run}", "--tasks", "words", f"--include_path={tmp_path}", *flags]) == 0
    assert {path.name for path in run.glob("harness_*")} == {
        "harness_8_words.json",
        "harness_8_more+words.json",
        "harness_8_words_average=2_decay=0.5_num_fewshot=0_limit=1.json",
    }
    assert json.loads((run / "harness_8_words.json").read_text()) == found
    with says("--average=0: must be at least 1."):
        command.main([f"--run={run}", "--tasks", "words", "--average=0"])
    assert command.file_name(8, ["my/words.yaml"], {}) == "harness_8_my_words.yaml.json"
    several = [command.file_name(8, [f"a_task_of_many_{i}" for i in range(count)], {}) for count in (40, 41)]
    assert several[0] != several[1] and max(map(len, several)) < 255

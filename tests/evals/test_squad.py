"""SQuAD's rules on cases worked out by hand; the best span against all of them."""

import types

import numpy as np
import pytest

from tests.errors import says
from tfm_jax.evals import squad
from tfm_jax.evals.base import Context
from tfm_jax.train.build import build


@pytest.mark.parametrize(
    ("made", "wanted", "exact", "f1"),
    [
        ("The Whale!", ["a whale"], 1, 1.0),
        ("white whale", ["the whale", "a white whale, swimming"], 0, 0.8),
        ("a the an", ["whale"], 0, 0.0),
        ("", ["whale"], 0, 0.0),
        ("whale whale", ["whale"], 0, 2 / 3),
        ("state-of-the-art", ["stateoftheart"], 1, 1.0),
    ],
)
def test_scores_by_hand(made, wanted, exact, f1):
    found = squad.scored([made], [wanted])
    assert found["exact_match"] == 100 * exact and found["f1"] == pytest.approx(100 * f1)


def test_the_best_span_is_the_best_of_all():
    draw = np.random.default_rng(0)
    for n in (1, 2, 7, 20):
        logits = draw.normal(size=(n, 2)).astype(np.float32)
        every = [(logits[i, 0] + logits[j, 1], i, j) for i in range(n) for j in range(i, min(n, i + 3))]
        assert squad.best_span(logits, 3) == pytest.approx(max(every))
    assert squad.best_span(np.zeros((0, 2)), 3) is None


def test_an_answer_has_no_space_around_it(monkeypatch):
    """The offsets of byte-level tokens have the space before a word in them."""
    context = "It was Denver ."
    dataset = types.SimpleNamespace(
        references=[["Denver"]],
        shown=lambda step: [(0, 1, np.array([[0, 2], [2, 6], [6, 14], [14, 15]]))],
        text=lambda owner, start, stop: context[start:stop],
    )
    logits = np.zeros((1, 6, 2), np.float32)
    logits[0, 3] = 9.0  # the third of the context's pieces, which begin at 1
    monkeypatch.setattr(squad, "predictions", lambda *_: [(None, {"logits": logits})])
    assert context[6:14] == " Denver " and squad.answers(None, None, dataset, 30) == ["Denver"]


def test_bad_input(make_config):
    built = build(make_config())
    context = Context(built.task, built.model, built.layout, built.data, 8)
    with says("evals: squad needs questions with answers: data.name=questions."):
        squad.make(context)

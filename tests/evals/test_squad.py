"""SQuAD's rules on cases worked out by hand; the best span against all of them."""

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


def test_bad_input(make_config):
    built = build(make_config())
    context = Context(built.task, built.model, built.layout, built.data, 8)
    with says("evals: squad needs questions with answers: data.name=questions."):
        squad.make(context)

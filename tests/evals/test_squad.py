"""SQuAD's rules on cases worked out by hand and against another implementation; the best span against all of them."""

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


@pytest.mark.parity
def test_scores_are_the_official_scripts():
    reference = pytest.importorskip("transformers.data.metrics.squad_metrics")
    draw, words = np.random.default_rng(0), ["The", "whale,", "a", "ship", "an", "Sea.", "it's", "U.S."]
    for _ in range(300):
        made, wanted = (" ".join(draw.choice(words, draw.integers(1, 7))) for _ in range(2))
        assert squad.overlap(made, wanted) == pytest.approx(reference.compute_f1(wanted, made), abs=1e-12) or (
            not squad.normal(made) and not squad.normal(wanted)
        )
        assert (squad.normal(made) == squad.normal(wanted)) == reference.compute_exact(wanted, made)


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

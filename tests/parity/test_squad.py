"""Exact match and F1 beside the official script's rules, as torchmetrics has them."""

import numpy as np
import pytest

from tfm_jax.evals.squad import scored

WORDS = [
    "a",
    "The",
    "an",
    "whale",
    "whale's",
    "Ahab",
    "state-of-the-art",
    "1,000",
    "(sea)",
    "sea.",
    "é",
    "-",
    '"oil"',
    "\u2014",
]


@pytest.mark.parity
def test_random_answers():
    pytest.importorskip("torchmetrics", reason="needs the extra `parity`")
    from torchmetrics.functional.text import squad

    draw = np.random.default_rng(0)

    def text():
        # Of two answers that are nothing but articles the scripts of SQuAD 1.1 (0) and 2.0 (1) have another F1.
        return " ".join([*draw.choice(WORDS, draw.integers(0, 5)), "oil"])

    found = [text() for _ in range(500)]
    wanted = [[own if draw.random() < 0.2 else text() for _ in range(draw.integers(1, 4))] for own in found]
    theirs = squad(
        [{"prediction_text": own, "id": str(i)} for i, own in enumerate(found)],
        [
            {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(i)}
            for i, texts in enumerate(wanted)
        ],
    )
    ours = scored(found, wanted)
    assert 10 < ours["exact_match"] < ours["f1"] < 90
    for name, value in ours.items():
        assert value == pytest.approx(float(theirs[name]), abs=1e-3), name

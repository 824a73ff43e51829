"""BART."""

from ..case import Case
from .encdec import SIDES, padded_pairs, pairs

CASES: dict[str, Case] = {
    "bart": Case("BartForConditionalGeneration", "BartConfig", SIDES, padded_pairs),
    "bart_model": Case(
        "BartModel",
        "BartConfig",
        SIDES | dict(scale_embedding=True, activation_function="relu"),
        pairs,
        outputs={"last_hidden_state": "hidden"},
    ),
}

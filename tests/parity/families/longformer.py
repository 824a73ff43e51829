"""Longformer: global tokens in different numbers, one of them padding; a length that its window does not divide."""

from typing import Any

import numpy as np

from ..case import VOCAB, Arrays, Case, as_text, own_token_loss, tokens

_LENGTH = 11


def with_globals(rng: np.random.Generator) -> Arrays:
    out = {name: x[:, :_LENGTH] for name, x in tokens(rng).items()}
    chosen = np.zeros((2, _LENGTH), np.int64)
    chosen[0, [0, 5, 9]] = chosen[1, [4, 10]] = 1
    return out | {"global_attention_mask": chosen}


def ours(theirs: Arrays) -> dict[str, Any]:
    return as_text(theirs) | {"global_tokens": theirs["global_attention_mask"].astype(bool)}


_LONGFORMER = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=18, type_vocab_size=1, attention_window=4, pad_token_id=1, layer_norm_eps=1e-5,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip

CASES: dict[str, Case] = {
    "longformer": Case("LongformerForMaskedLM", "LongformerConfig", _LONGFORMER, with_globals, ours),
    # One layer, since a fixture with gradients is twice as large.
    "longformer_layer": Case(
        "LongformerForMaskedLM",
        "LongformerConfig",
        _LONGFORMER | dict(num_hidden_layers=1),
        with_globals,
        ours,
        loss=own_token_loss,
        kind="own",
    ),
    "longformer_wide": Case(
        "LongformerForMaskedLM",
        "LongformerConfig",
        _LONGFORMER | dict(num_hidden_layers=1, attention_window=32, layer_norm_eps=1e-12),
    ),
}

"""Marian; and what the encoder-decoders' cases share."""

from typing import Any

import numpy as np

from ..case import VOCAB, Arrays, Case, tokens

TARGET = 9


def pairs(rng: np.random.Generator) -> Arrays:
    """A source whose second row is padded, and a target of another length."""
    return tokens(rng) | {"decoder_input_ids": rng.integers(5, VOCAB, (2, TARGET))}


def padded_pairs(rng: np.random.Generator) -> Arrays:
    """With a target whose first row is padded at its end."""
    mask = np.ones((2, TARGET), np.int64)
    mask[0, -3:] = 0
    return pairs(rng) | {"decoder_attention_mask": mask}


def decoder_token_loss(torch: Any, out: Any, inputs: Any) -> Any:
    """Of predicting the decoder's own input."""
    return torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), inputs["decoder_input_ids"])


def _draw_logits_bias(model: Any) -> None:
    """A buffer there, which the weights' drawing leaves out."""
    import torch

    model.final_logits_bias.copy_((torch.arange(VOCAB)[None] % 7 - 3) / 4)


SIDES = dict(
    vocab_size=VOCAB, max_position_embeddings=16, d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=24,
    decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, pad_token_id=1,
    decoder_start_token_id=2,
)  # fmt: skip

CASES: dict[str, Case] = {
    "marian": Case(
        "MarianMTModel",
        "MarianConfig",
        SIDES | dict(activation_function="swish", scale_embedding=True),
        pairs,
        prepare=_draw_logits_bias,
    ),
}

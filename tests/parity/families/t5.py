"""T5, versions 1.0 and 1.1."""

from typing import Any

from ..case import VOCAB, Case
from .encdec import decoder_token_loss, padded_pairs, pairs

_T5 = dict(
    vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=20, num_layers=1, num_decoder_layers=2, num_heads=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, dropout_rate=0.0, decoder_start_token_id=0,
)  # fmt: skip


def _untie(model: Any) -> None:
    """The class ties its head when it makes a model, and not when it reads one of version 1.1."""
    import torch

    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))


CASES: dict[str, Case] = {
    "t5": Case("T5ForConditionalGeneration", "T5Config", _T5, pairs, loss=decoder_token_loss, kind="decoder"),
    "t5_v11": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        padded_pairs,
        prepare=_untie,
    ),
}

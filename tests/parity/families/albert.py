"""ALBERT."""

from ..case import VOCAB, Case, own_token_loss
from .bert import pairs

_ALBERT = dict(
    vocab_size=VOCAB, embedding_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=16,
)  # fmt: skip

CASES: dict[str, Case] = {
    "albert": Case(
        "AlbertForPreTraining",
        "AlbertConfig",
        _ALBERT | dict(classifier_dropout_prob=0.0),
        pairs,
        outputs={"prediction_logits": "logits", "sop_logits": "pair_logits"},
        loss=own_token_loss,
        kind="own",
    ),
    "albert_mlm": Case("AlbertForMaskedLM", "AlbertConfig", _ALBERT | dict(hidden_act="gelu"), pairs),
}

"""ELECTRA's two halves, with and without a projection behind the embeddings."""

from ..case import VOCAB, Case, own_token_loss
from .bert import pairs

_ELECTRA = dict(
    vocab_size=VOCAB, embedding_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip

CASES: dict[str, Case] = {
    "electra_generator": Case("ElectraForMaskedLM", "ElectraConfig", _ELECTRA, pairs),
    # One layer, since a fixture with gradients is twice as large.
    "electra_generator_layer": Case(
        "ElectraForMaskedLM",
        "ElectraConfig",
        _ELECTRA | dict(num_hidden_layers=1, embedding_size=24),
        pairs,
        loss=own_token_loss,
        kind="own",
    ),
    "electra_discriminator": Case(
        "ElectraForPreTraining",
        "ElectraConfig",
        _ELECTRA | dict(hidden_act="relu"),
        pairs,
        outputs={"logits": "replaced_logits"},
    ),
}

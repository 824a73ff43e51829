"""BERT and what is built like it."""

import numpy as np

from ..case import LENGTH, VOCAB, Arrays, Case, own_token_loss, padded_left, tokens

_BERT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def pairs(rng: np.random.Generator) -> Arrays:
    out = tokens(rng)
    return out | {"token_type_ids": (np.arange(LENGTH)[None] >= np.array([[5], [3]])).astype(np.int64)}


CASES: dict[str, Case] = {
    "bert": Case(
        "BertForPreTraining",
        "BertConfig",
        _BERT,
        pairs,
        outputs={"prediction_logits": "logits", "seq_relationship_logits": "pair_logits"},
        loss=own_token_loss,
        kind="own",
    ),
    "bert_mlm": Case("BertForMaskedLM", "BertConfig", _BERT | dict(hidden_act="gelu_new"), pairs),
    "bert_model": Case(
        "BertModel", "BertConfig", _BERT, pairs, outputs={"last_hidden_state": "states", "pooler_output": "pooled"}
    ),
    "bert_classes": Case("BertForSequenceClassification", "BertConfig", _BERT | dict(num_labels=3), pairs),
    "bert_tags": Case("BertForTokenClassification", "BertConfig", _BERT | dict(num_labels=4), pairs),
    "bert_span": Case(
        "BertForQuestionAnswering",
        "BertConfig",
        _BERT,
        pairs,
        outputs={"start_logits": "span_logits:0", "end_logits": "span_logits:1"},
    ),
    "roberta": Case(
        "RobertaForMaskedLM", "RobertaConfig", _BERT | dict(type_vocab_size=1, pad_token_id=1), padded_left
    ),
    "distilbert": Case(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(
            vocab_size=VOCAB,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
        ),
    ),
}

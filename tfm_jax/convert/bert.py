"""BERT, RoBERTa and DistilBERT in `transformers`, and `models.bert` here."""

from __future__ import annotations

from typing import Any

from tfm_jax.convert.table import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Conversion,
    Fields,
    Row,
    Section,
    each_layer,
    embedding,
    linear,
    norm,
    same,
)

_DEFAULTS = {
    "vocab_size": 30522, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip


def read_blocks(c: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields of an encoder's blocks by BERT's names; `defaults` for what a class has otherwise than BERT."""
    default = _DEFAULTS | defaults
    return {
        "width": c.take("hidden_size", default["hidden_size"]),
        "layers": c.take("num_hidden_layers", 12),
        "heads": c.take("num_attention_heads", default["num_attention_heads"]),
        "mlp_width": c.take("intermediate_size", default["intermediate_size"]),
        "activation": c.choose("hidden_act", default["hidden_act"], ACTIVATIONS),
        "norm_eps": c.take("layer_norm_eps", 1e-12),
        "init_std": c.take("initializer_range", 0.02),
        "dropout": c.take("hidden_dropout_prob", default["hidden_dropout_prob"]),
        "attention_dropout": c.take("attention_probs_dropout_prob", default["attention_probs_dropout_prob"]),
    }


def read_encoder(c: Fields, **defaults: Any) -> dict[str, Any]:
    """The fields that BERT's descendants share."""
    c.need("position_embedding_type", "absolute")
    c.need("is_decoder", False)
    c.need("add_cross_attention", False)
    c.need("tie_word_embeddings", True)
    types = c.take("type_vocab_size", 2)
    if types < 1:
        c.problems.append(
            f"type_vocab_size={types} is not supported; the class always has that table: set model.types=1 and train with it"
        )
    return read_blocks(c, **defaults) | {
        "vocab_size": c.take("vocab_size", (_DEFAULTS | defaults)["vocab_size"]),
        "max_len": c.take("max_position_embeddings", 512),
        "types": types,
    }


def write_blocks(m: Section) -> dict[str, Any]:
    return {
        "hidden_size": m["width"],
        "num_hidden_layers": m["layers"],
        "num_attention_heads": m["heads"],
        "intermediate_size": m["mlp_width"] or 4 * m["width"],
        "hidden_act": ACTIVATION_NAMES[m["activation"]],
        "layer_norm_eps": m["norm_eps"],
        "initializer_range": m["init_std"],
        "hidden_dropout_prob": m["dropout"],
        "attention_probs_dropout_prob": m["attention_dropout"],
    }


def write_encoder(m: Section) -> dict[str, Any]:
    sizes = {"vocab_size": m["vocab_size"], "max_position_embeddings": m["max_len"], "type_vocab_size": m["types"]}
    return write_blocks(m) | sizes


def embedding_rows(m: Section, prefix: str) -> list[Row]:
    ours = "embeddings/"
    kinds = embedding(f"{prefix}embeddings.token_type_embeddings", f"{ours}type_embedding")
    return [
        *embedding(f"{prefix}embeddings.word_embeddings", f"{ours}token_embedding"),
        *embedding(f"{prefix}embeddings.position_embeddings", f"{ours}position_embedding"),
        *(kinds if m["types"] else []),
        *norm(f"{prefix}embeddings.LayerNorm", f"{ours}embedding_norm"),
    ]


def layer_rows(theirs: str, ours: str) -> list[Row]:
    return [
        *linear(f"{theirs}attention.self.query", f"{ours}attention/query"),
        *linear(f"{theirs}attention.self.key", f"{ours}attention/key"),
        *linear(f"{theirs}attention.self.value", f"{ours}attention/value"),
        *linear(f"{theirs}attention.output.dense", f"{ours}attention/out"),
        *norm(f"{theirs}attention.output.LayerNorm", f"{ours}attention_norm"),
        *linear(f"{theirs}intermediate.dense", f"{ours}mlp/up"),
        *linear(f"{theirs}output.dense", f"{ours}mlp/down"),
        *norm(f"{theirs}output.LayerNorm", f"{ours}mlp_norm"),
    ]


def trunk_rows(m: Section, prefix: str) -> list[Row]:
    layers = each_layer(layer_rows(f"{prefix}encoder.layer.{{i}}.", "stack/block_{i}/"), m["layers"])
    return embedding_rows(m, prefix) + layers


def _bert(prefix: str, outputs: tuple[str, ...]) -> Any:
    def table(m: Section) -> list[Row]:
        rows = trunk_rows(m, prefix)
        if "tokens" in outputs:
            rows += linear("cls.predictions.transform.dense", "token_head/transform")
            rows += norm("cls.predictions.transform.LayerNorm", "token_head/norm")
            rows += same("cls.predictions.bias", "token_head/bias")
        if {"pooled", "pair", "classes"} & {*outputs}:
            rows += linear(f"{prefix}pooler.dense", "pooler/dense")
        if "pair" in outputs:
            rows += linear("cls.seq_relationship", "pair_head/dense")
        if {"classes", "tags"} & {*outputs}:
            rows += linear("classifier", "class_head/dense")
        if "span" in outputs:
            rows += linear("qa_outputs", "span_head/dense")
        return rows

    return table


def _roberta(m: Section) -> list[Row]:
    return trunk_rows(m, "roberta.") + roberta_head()


def roberta_head() -> list[Row]:
    return [
        *linear("lm_head.dense", "token_head/transform"),
        *norm("lm_head.layer_norm", "token_head/norm"),
        *same("lm_head.bias", "token_head/bias"),
    ]


def _read_roberta(c: Fields) -> dict[str, Any]:
    offset = c.take("pad_token_id", 1) + 1
    c.need("hidden_act", "gelu")  # its head has no other, whatever the blocks have
    section = read_encoder(c, vocab_size=50265)
    return section | {"offset": offset, "max_len": section["max_len"] - offset, "outputs": ("tokens",)}


def _write_roberta(m: Section) -> dict[str, Any]:
    return write_encoder(m) | {"max_position_embeddings": m["max_len"] + m["offset"], "pad_token_id": m["offset"] - 1}


def _read_distilbert(c: Fields) -> dict[str, Any]:
    c.ignore("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout", "tie_weights_")
    c.need("tie_word_embeddings", True)
    return {
        "vocab_size": c.take("vocab_size", 30522),
        "max_len": c.take("max_position_embeddings", 512),
        "width": c.take("dim", 768),
        "layers": c.take("n_layers", 6),
        "heads": c.take("n_heads", 12),
        "mlp_width": c.take("hidden_dim", 3072),
        "activation": c.choose("activation", "gelu", ACTIVATIONS),
        "init_std": c.take("initializer_range", 0.02),
        "dropout": c.take("dropout", 0.1),
        "attention_dropout": c.take("attention_dropout", 0.1),
        "types": 0,
        "outputs": ("tokens",),
    }


def _write_distilbert(m: Section) -> dict[str, Any]:
    return {
        "vocab_size": m["vocab_size"],
        "max_position_embeddings": m["max_len"],
        "dim": m["width"],
        "n_layers": m["layers"],
        "n_heads": m["heads"],
        "hidden_dim": m["mlp_width"] or 4 * m["width"],
        "activation": ACTIVATION_NAMES[m["activation"]],
        "initializer_range": m["init_std"],
        "dropout": m["dropout"],
        "attention_dropout": m["attention_dropout"],
    }


def _distilbert(m: Section) -> list[Row]:
    theirs, ours = "distilbert.transformer.layer.{i}.", "stack/block_{i}/"
    layer = [
        *linear(f"{theirs}attention.q_lin", f"{ours}attention/query"),
        *linear(f"{theirs}attention.k_lin", f"{ours}attention/key"),
        *linear(f"{theirs}attention.v_lin", f"{ours}attention/value"),
        *linear(f"{theirs}attention.out_lin", f"{ours}attention/out"),
        *norm(f"{theirs}sa_layer_norm", f"{ours}attention_norm"),
        *linear(f"{theirs}ffn.lin1", f"{ours}mlp/up"),
        *linear(f"{theirs}ffn.lin2", f"{ours}mlp/down"),
        *norm(f"{theirs}output_layer_norm", f"{ours}mlp_norm"),
    ]
    return [
        *embedding("distilbert.embeddings.word_embeddings", "embeddings/token_embedding"),
        *embedding("distilbert.embeddings.position_embeddings", "embeddings/position_embedding"),
        *norm("distilbert.embeddings.LayerNorm", "embeddings/embedding_norm"),
        *each_layer(layer, m["layers"]),
        *linear("vocab_transform", "token_head/transform"),
        *norm("vocab_layer_norm", "token_head/norm"),
        *same("vocab_projector.bias", "token_head/bias"),
    ]


MASKED = {"objective": "mask"}
_DATA = {"classes": {"name": "examples"}, "tags": {"name": "tags"}, "span": {"name": "questions"}}
_TASKS = {"classes": {"name": "classification"}, "span": {"name": "span_extraction"}}
POSITION_IDS = r"embeddings\.(position_ids|token_type_ids)$"


def _bert_conversion(architecture: str, prefix: str, outputs: tuple[str, ...]) -> Conversion:
    # The output layer's weight is the token table, its bias the one above.
    ties = {"cls.predictions.decoder.weight": f"{prefix}embeddings.word_embeddings.weight"}
    ties["cls.predictions.decoder.bias"] = "cls.predictions.bias"
    counted = bool({"classes", "tags"} & {*outputs})

    def read(c: Fields) -> dict[str, Any]:
        section = read_encoder(c) | {"outputs": outputs}
        if not counted:
            return section
        c.ignore("problem_type", "classifier_dropout")
        labels, count = c.take("id2label"), c.take("num_labels")
        return section | {"classes": len(labels) if labels is not None else count or 2}

    def write(m: Section) -> dict[str, Any]:
        # Several heads by name are no class of theirs.
        return write_encoder(m) | ({"num_labels": m["classes"]} if counted and isinstance(m["classes"], int) else {})

    return Conversion(
        architecture,
        "bert",
        "bert",
        read,
        write,
        _bert(prefix, outputs),
        ties=lambda m: ties if "tokens" in outputs else {},
        prefix=prefix,
        # Published files carry the heads of pretraining whichever class their config names.
        skip=(
            POSITION_IDS,
            *(() if "tokens" in outputs else (r"^cls\.predictions\.",)),
            *(() if "pair" in outputs else (r"^cls\.seq_relationship\.",)),
            *(() if {"pooled", "pair", "classes"} & {*outputs} else (r"^bert\.pooler\.",)),
        ),
        data=_DATA.get(outputs[0], MASKED),
        task=_TASKS.get(outputs[0], {}),
    )


CONVERSIONS = (
    _bert_conversion("BertForPreTraining", "bert.", ("tokens", "pair")),
    _bert_conversion("BertForMaskedLM", "bert.", ("tokens",)),
    _bert_conversion("BertModel", "", ("pooled",)),
    _bert_conversion("BertForSequenceClassification", "bert.", ("classes",)),
    _bert_conversion("BertForTokenClassification", "bert.", ("tags",)),
    _bert_conversion("BertForQuestionAnswering", "bert.", ("span",)),
    Conversion(
        "RobertaForMaskedLM",
        "roberta",
        "bert",
        _read_roberta,
        _write_roberta,
        _roberta,
        ties=lambda m: {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        prefix="roberta.",
        skip=(POSITION_IDS, r"^roberta\.pooler\."),
        data=MASKED,
    ),
    Conversion(
        "DistilBertForMaskedLM",
        "distilbert",
        "bert",
        _read_distilbert,
        _write_distilbert,
        _distilbert,
        ties=lambda m: {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
        prefix="distilbert.",
        skip=(POSITION_IDS,),
        data=MASKED,
    ),
)

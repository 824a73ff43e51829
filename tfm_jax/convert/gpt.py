"""GPT-2, Llama, Qwen3 and Mixtral in `transformers`, and `models.gpt` here."""

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
    fused,
    linear,
    norm,
    same,
)


def _read_gpt2(c: Fields) -> dict[str, Any]:
    c.need("scale_attn_weights", True)
    c.need("scale_attn_by_inverse_layer_idx", False)
    c.need("add_cross_attention", False)
    c.ignore("reorder_and_upcast_attn", "n_ctx")
    dropout = c.take("resid_pdrop", 0.1)
    c.need("embd_pdrop", dropout)
    return {
        "vocab_size": c.take("vocab_size", 50257),
        "max_len": c.take("n_positions", 1024),
        "width": c.take("n_embd", 768),
        "layers": c.take("n_layer", 12),
        "heads": c.take("n_head", 12),
        "mlp_width": c.take("n_inner"),
        "activation": c.choose("activation_function", "gelu_new", ACTIVATIONS),
        "norm_eps": c.take("layer_norm_epsilon", 1e-5),
        "init_std": c.take("initializer_range", 0.02),
        "dropout": dropout,
        "attention_dropout": c.take("attn_pdrop", 0.1),
        "output": c.choose("tie_word_embeddings", True, {True: "tied", False: "free"}),
    }


def _write_gpt2(m: Section) -> dict[str, Any]:
    return {
        "vocab_size": m["vocab_size"],
        "n_positions": m["max_len"],
        "n_embd": m["width"],
        "n_layer": m["layers"],
        "n_head": m["heads"],
        "n_inner": m["mlp_width"],
        "activation_function": ACTIVATION_NAMES[m["activation"]],
        "layer_norm_epsilon": m["norm_eps"],
        "initializer_range": m["init_std"],
        "resid_pdrop": m["dropout"],
        "embd_pdrop": m["dropout"],
        "attn_pdrop": m["attention_dropout"],
        "tie_word_embeddings": m["output"] == "tied",
    }


def _conv1d(theirs: str, ours: str) -> list[Row]:
    """GPT-2's own Linear, whose weight is (in, out)."""
    return same(f"{theirs}.weight", f"{ours}/kernel") + same(f"{theirs}.bias", f"{ours}/bias")


def _gpt2(m: Section) -> list[Row]:
    theirs, ours = "transformer.h.{i}.", "stack/block_{i}/"
    three = [f"{ours}attention/{name}" for name in ("query", "key", "value")]
    layer = [
        *norm(f"{theirs}ln_1", f"{ours}attention_norm"),
        *fused(f"{theirs}attn.c_attn.weight", [f"{name}/kernel" for name in three], axis=1),
        *fused(f"{theirs}attn.c_attn.bias", [f"{name}/bias" for name in three], axis=0),
        *_conv1d(f"{theirs}attn.c_proj", f"{ours}attention/out"),
        *norm(f"{theirs}ln_2", f"{ours}mlp_norm"),
        *_conv1d(f"{theirs}mlp.c_fc", f"{ours}mlp/up"),
        *_conv1d(f"{theirs}mlp.c_proj", f"{ours}mlp/down"),
    ]
    return [
        *embedding("transformer.wte", "token_embedding"),
        *embedding("transformer.wpe", "position_embedding"),
        *each_layer(layer, m["layers"]),
        *norm("transformer.ln_f", "stack/final_norm"),
        *([] if m["output"] == "tied" else embedding("lm_head", "unembedding")),
    ]


def _read_llama(c: Fields) -> dict[str, Any]:
    c.need("attention_bias", False)
    c.need("mlp_bias", False)
    c.ignore("pretraining_tp")
    return _read_rotary(c, vocab=32000, mlp=11008, kv_heads=None, head_dim=None, max_len=2048)


def _read_qwen3(c: Fields) -> dict[str, Any]:
    c.need("attention_bias", False)
    c.need("use_sliding_window", False)
    layers = c.take("num_hidden_layers", 32)
    c.need("layer_types", None, ["full_attention"] * layers)
    c.ignore("sliding_window", "max_window_layers")
    section = _read_rotary(c, vocab=151936, mlp=22016, kv_heads=32, head_dim=128, max_len=32768)
    return section | {"qk_norm": "head"}


def _read_mixtral(c: Fields) -> dict[str, Any]:
    c.need("sliding_window", None)
    c.need("router_jitter_noise", 0.0)
    c.ignore("output_router_logits")
    section = _read_rotary(c, vocab=32000, mlp=14336, kv_heads=8, head_dim=None, max_len=131072, eps=1e-5, theta=1e6)
    chosen = c.take("num_experts_per_tok", 2)
    return section | {
        "experts": c.take("num_local_experts", 8),
        "experts_per_token": chosen,
        # Theirs counts each of a token's choices as one, `nn.moe` as a share of the token.
        "router_balance": c.take("router_aux_loss_coef", 0.001) * chosen,
    }


def _write_mixtral(m: Section) -> dict[str, Any]:
    return _write_rotary(m) | {
        "num_local_experts": m["experts"],
        "num_experts_per_tok": m["experts_per_token"],
        "router_aux_loss_coef": m["router_balance"] / m["experts_per_token"],
    }


def _read_rotary(
    c: Fields,
    *,
    vocab: int,
    mlp: int,
    kv_heads: int | None,
    head_dim: int | None,
    max_len: int,
    eps: float = 1e-6,
    theta: float = 10_000.0,
) -> dict[str, Any]:
    width, heads = c.take("hidden_size", 4096), c.take("num_attention_heads", 32)
    length = c.take("max_position_embeddings", max_len)
    return {
        "vocab_size": c.take("vocab_size", vocab),
        "max_len": length,
        "width": width,
        "layers": c.take("num_hidden_layers", 32),
        "heads": heads,
        "kv_heads": (c.take("num_key_value_heads") if "num_key_value_heads" in c.values else kv_heads) or heads,
        "head_dim": c.take("head_dim", head_dim) or width // heads,
        "mlp_width": c.take("intermediate_size", mlp),
        "activation": c.choose("hidden_act", "silu", ACTIVATIONS),
        "norm_eps": c.take("rms_norm_eps", eps),
        "init_std": c.take("initializer_range", 0.02),
        "attention_dropout": c.take("attention_dropout", 0.0),
        "output": c.choose("tie_word_embeddings", False, {True: "tied", False: "free"}),
        "norm": "rms",
        "mlp": "gated",
        "bias": "none",
        "position": "rotary",
        **_read_rope(c, length, theta),
    }


# Kinds of scaling, and our field for each of theirs.
_ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "low_freq_factor": "rope_low_freq",
        "high_freq_factor": "rope_high_freq",
        "original_max_position_embeddings": "rope_original_len",
    },
}


def _read_rope(c: Fields, max_len: int, default: float) -> dict[str, Any]:
    """Older files have `rope_theta` and `rope_scaling`, newer ones both in `rope_parameters`; with both the older counts."""
    older, newer = c.take("rope_scaling"), c.take("rope_parameters")
    given = dict(older or newer or {})
    theta = c.take("rope_theta", default)
    out = {"rope_theta": given.pop("rope_theta", None) or theta}
    older_kind = given.pop("type", "default")
    kind = given.pop("rope_type", older_kind)
    if kind not in _ROPE:
        c.problems.append(f"rope_type={kind!r} is not supported; what is: {', '.join(map(repr, _ROPE))}")
        return out
    if kind == "llama3":
        given.setdefault("original_max_position_embeddings", max_len)
    for name, value in given.items():
        if name in _ROPE[kind]:
            out[_ROPE[kind][name]] = value
        else:
            c.problems.append(f"rope_parameters.{name}={value!r} is not supported with rope_type={kind!r}")
    return out | {"rope_scaling": "none" if kind == "default" else kind}


def _write_rotary(m: Section) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": m["rope_theta"], "rope_type": "default"}
    if m["rope_scaling"] != "none":
        rope |= {"rope_type": m["rope_scaling"], "factor": m["rope_factor"]}
    if m["rope_scaling"] == "llama3":
        rope |= {"low_freq_factor": m["rope_low_freq"], "high_freq_factor": m["rope_high_freq"]}
        rope["original_max_position_embeddings"] = m["rope_original_len"]
    return {
        "vocab_size": m["vocab_size"],
        "max_position_embeddings": m["max_len"],
        "hidden_size": m["width"],
        "num_hidden_layers": m["layers"],
        "num_attention_heads": m["heads"],
        "num_key_value_heads": m["kv_heads"] or m["heads"],
        "head_dim": m["head_dim"] or m["width"] // m["heads"],
        "intermediate_size": m["mlp_width"] or 4 * m["width"],
        "hidden_act": ACTIVATION_NAMES[m["activation"]],
        "rms_norm_eps": m["norm_eps"],
        "initializer_range": m["init_std"],
        "attention_dropout": m["attention_dropout"],
        "tie_word_embeddings": m["output"] == "tied",
        "rope_parameters": rope,
    }


def _rotary(m: Section) -> list[Row]:
    theirs, ours = "model.layers.{i}.", "stack/block_{i}/"
    layer = [
        *norm(f"{theirs}input_layernorm", f"{ours}attention_norm", bias=False),
        *norm(f"{theirs}post_attention_layernorm", f"{ours}mlp_norm", bias=False),
    ]
    for their_name, our_name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        layer += linear(f"{theirs}self_attn.{their_name}_proj", f"{ours}attention/{our_name}", bias=False)
    if m["qk_norm"] == "head":
        layer += norm(f"{theirs}self_attn.q_norm", f"{ours}attention/query_norm", bias=False)
        layer += norm(f"{theirs}self_attn.k_norm", f"{ours}attention/key_norm", bias=False)
    if m["experts"]:
        layer += linear(f"{theirs}block_sparse_moe.gate", f"{ours}mlp/router", bias=False)
        for number in range(m["experts"]):
            for their_name, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                there = f"{theirs}block_sparse_moe.experts.{number}.{their_name}"
                layer += linear(there, f"{ours}mlp/experts/expert_{number}/{name}", bias=False)
    else:
        for name in ("gate", "up", "down"):
            layer += linear(f"{theirs}mlp.{name}_proj", f"{ours}mlp/{name}", bias=False)
    return [
        *embedding("model.embed_tokens", "token_embedding"),
        *each_layer(layer, m["layers"]),
        *norm("model.norm", "stack/final_norm", bias=False),
        *([] if m["output"] == "tied" else embedding("lm_head", "unembedding")),
    ]


CONVERSIONS = (
    Conversion(
        "GPT2LMHeadModel",
        "gpt2",
        "gpt",
        _read_gpt2,
        _write_gpt2,
        _gpt2,
        ties=lambda m: {"lm_head.weight": "transformer.wte.weight"} if m["output"] == "tied" else {},
        prefix="transformer.",
        skip=(r"\.attn\.(bias|masked_bias)$",),
    ),
    *(
        Conversion(
            architecture,
            model_type,
            "gpt",
            read,
            write,
            _rotary,
            ties=lambda m: {"lm_head.weight": "model.embed_tokens.weight"} if m["output"] == "tied" else {},
            prefix="model.",
            skip=(r"rotary_emb\.inv_freq$",),
        )
        for architecture, model_type, read, write in (
            ("LlamaForCausalLM", "llama", _read_llama, _write_rotary),
            ("Qwen3ForCausalLM", "qwen3", _read_qwen3, _write_rotary),
            ("MixtralForCausalLM", "mixtral", _read_mixtral, _write_mixtral),
        )
    ),
)

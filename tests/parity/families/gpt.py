"""GPT-2, Llama, Qwen3, Mixtral."""

from ..case import VOCAB, Case, next_token_loss

_ROTARY = dict(
    vocab_size=VOCAB, max_position_embeddings=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=48, bos_token_id=0, eos_token_id=0,
)  # fmt: skip

CASES: dict[str, Case] = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        loss=next_token_loss,
        kind="next",
    ),
    "llama": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        _ROTARY | dict(rms_norm_eps=1e-5, tie_word_embeddings=False),
        loss=next_token_loss,
        kind="next",
    ),
    "llama31": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        _ROTARY
        | dict(
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8,
            ),
        ),
    ),
    "mixtral": Case(
        "MixtralForCausalLM",
        "MixtralConfig",
        _ROTARY | dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=8),
        loss=next_token_loss,
        kind="next",
    ),
    "qwen3": Case("Qwen3ForCausalLM", "Qwen3Config", _ROTARY | dict(head_dim=16, tie_word_embeddings=False)),
}  # fmt: skip

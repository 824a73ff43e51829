"""Forward and backward of every family beside its reference class in PyTorch, on equal shapes. Needs `parity`.

4 layers, 256 wide, 4 heads, MLP 1,024, batch 8; text: 128 tokens of 4,096 (Longformer: 1,024 tokens, window 128);
images: 64 x 64 in patches of 8. Float32, no dropout, the reference with its own fastest attention for the class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LAYERS, WIDTH, HEADS, MLP, VOCAB, BATCH, LENGTH = 4, 256, 4, 1024, 4096, 8, 128


@dataclass(frozen=True)
class Shape:
    """A reference class, its config class and fields, and which kind of inputs it takes."""

    architecture: str
    config: str
    fields: Mapping[str, Any]
    kind: str = "text"  # or pair (encoder and decoder), image
    length: int = LENGTH


_BERT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=MLP,
    max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
_IMAGE = {k: v for k, v in _BERT.items() if k not in ("vocab_size", "max_position_embeddings")} | dict(
    image_size=64, patch_size=8, num_channels=3, num_labels=10
)
_BART = dict(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=MLP, decoder_ffn_dim=MLP, max_position_embeddings=LENGTH,
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=1, eos_token_id=2, bos_token_id=0,
    decoder_start_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, Shape] = {
    "gpt2": Shape(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=VOCAB, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        ),
    ),
    "llama": Shape(
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=2, intermediate_size=MLP, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        ),
    ),
    "bert": Shape("BertForMaskedLM", "BertConfig", _BERT),
    "albert": Shape("AlbertForMaskedLM", "AlbertConfig", _BERT | dict(embedding_size=128)),
    "electra": Shape("ElectraForMaskedLM", "ElectraConfig", _BERT | dict(embedding_size=128)),
    "encdec": Shape("MarianMTModel", "MarianConfig", _BART | dict(decoder_start_token_id=1), "pair"),
    "bart": Shape("BartForConditionalGeneration", "BartConfig", _BART, "pair"),
    "t5": Shape(
        "T5ForConditionalGeneration",
        "T5Config",
        dict(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=MLP, num_layers=LAYERS, num_decoder_layers=LAYERS,
            num_heads=HEADS, dropout_rate=0.0, decoder_start_token_id=0,
        ),
        "pair",
    ),
    "longformer": Shape(
        "LongformerForMaskedLM",
        "LongformerConfig",
        _BERT | dict(max_position_embeddings=1026, attention_window=[128] * LAYERS, pad_token_id=1),
        length=1024,
    ),
    "vit": Shape("ViTForImageClassification", "ViTConfig", _IMAGE, "image"),
    "deit": Shape("DeiTForImageClassificationWithTeacher", "DeiTConfig", _IMAGE, "image"),
}  # fmt: skip


def _data(shape: Shape) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if shape.kind == "image":
        size = shape.fields["image_size"]
        images = random.normal(size=(BATCH, size, size, 3)).astype(np.float32)
        return {"images": images, "targets": random.integers(0, 10, BATCH)}
    draw = [random.integers(5, VOCAB, (BATCH, shape.length)) for _ in range(3)]
    return {"tokens": draw[0], "decoder_tokens": draw[1], "targets": draw[2]}


def ours(name: str) -> Callable[[], float]:
    """A function that runs forward and backward here and returns the loss."""
    import jax
    import jax.numpy as jnp

    from tfm_jax import config as configs
    from tfm_jax.convert import huggingface
    from tfm_jax.losses.cross_entropy import cross_entropy, linear_cross_entropy
    from tfm_jax.sections import build_model

    shape = FAMILIES[name]
    fields = {**shape.fields, "architectures": [shape.architecture]}
    conversion = huggingface.find(fields)
    section = huggingface.read_section(conversion, fields, where=name)
    resolved = configs.resolve({"model": section, "data": {"source": "stdlib"}, "train": {"steps": 1000}})
    model, data = build_model(resolved["model"]), _data(shape)
    inputs = {"images": jnp.asarray(data["images"])} if shape.kind == "image" else {"tokens": jnp.int32(data["tokens"])}
    if shape.kind == "pair":
        inputs["decoder_tokens"] = jnp.int32(data["decoder_tokens"])
    targets = jnp.int32(data["targets"].reshape(-1))
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.example())["params"])()

    def loss(params: Any, inputs: Any) -> jax.Array:
        out = model.apply({"params": params}, **inputs)
        if "unembedding" in out:
            hidden = out["hidden"].reshape(-1, out["hidden"].shape[-1])
            return jnp.mean(linear_cross_entropy(hidden, out["unembedding"], targets)[0])
        return jnp.mean(cross_entropy(out["logits"].reshape(-1, out["logits"].shape[-1]), targets))

    step = jax.jit(jax.value_and_grad(loss)).lower(params, inputs).compile()

    def run() -> float:
        value, gradients = step(params, inputs)
        jax.block_until_ready(gradients)
        return float(value)

    return run


def theirs(name: str) -> Callable[[], float]:
    """The same in PyTorch."""
    import torch
    import transformers

    shape, data = FAMILIES[name], _data(FAMILIES[name])
    torch.manual_seed(0)
    model = getattr(transformers, shape.architecture)(getattr(transformers, shape.config)(**shape.fields)).eval()
    if shape.kind == "image":
        inputs = {"pixel_values": torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous()}
    else:
        inputs = {"input_ids": torch.from_numpy(data["tokens"])}
    if shape.kind == "pair":
        inputs["decoder_input_ids"] = torch.from_numpy(data["decoder_tokens"])
    targets = torch.from_numpy(data["targets"].reshape(-1))

    def run() -> float:
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return float(loss.item())

    return run

"""Sides of benchmarks without training: beam search beside `transformers`, and an encoder of fewer layers beside its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

# Layers a side, width, heads, vocabulary.
LAYERS, WIDTH, HEADS, VOCAB = 3, 256, 4, 4096
ROWS, SOURCE, NEW, BEAMS, END = 32, 24, 24, 5, 2


def _sources() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (ROWS, SOURCE), dtype=np.int64)


def our_beams() -> Callable[[], float]:
    """`NEW` tokens for each of `ROWS` sources by `BEAMS` beams; random weights all but never end a text."""
    import jax

    from tfm_jax.decode.beam import beam_search
    from tfm_jax.models.bart import SPEC, Model

    spec = dataclasses.replace(SPEC, width=WIDTH, heads=HEADS)
    model = Model(spec, vocab_size=VOCAB, max_len=64, encoder_layers=LAYERS, decoder_layers=LAYERS)
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.example())["params"])()
    rows = _sources().tolist()

    def step() -> float:
        found = beam_search(
            model, params, [[END]] * ROWS, sources=rows, beams=BEAMS, max_new=NEW, stop="sure", end_id=END
        )
        return float(len(found))

    return step


def their_beams() -> Callable[[], float]:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH, max_position_embeddings=64,
        pad_token_id=1, bos_token_id=0, eos_token_id=END, decoder_start_token_id=END, forced_eos_token_id=None,
    )  # fmt: skip
    model, sources = transformers.BartForConditionalGeneration(config).eval(), torch.from_numpy(_sources())

    def step() -> float:
        with torch.no_grad():
            made = model.generate(
                sources,
                num_beams=BEAMS,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                early_stopping="never",
            )
        return float(made.shape[0])

    return step


def encoder(layers: int) -> Callable[[], float]:
    """Classes of 32 rows of 32 tokens by an encoder of MiniLM's width."""
    import jax
    import jax.numpy as jnp

    from tfm_jax.models.bert import SPEC, Model

    spec = dataclasses.replace(SPEC, width=384, heads=12, mlp_width=1536)
    model = Model(spec, vocab_size=30522, max_len=64, layers=layers, outputs=("classes",), classes=2)
    params = jax.jit(lambda: model.init(jax.random.key(0), **model.example())["params"])()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30522, (32, 32)), jnp.int32)
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)["logits"])

    def step() -> float:
        return float(run(params, tokens)[0, 0])

    return step

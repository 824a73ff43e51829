"""Decoder-only language models: the GPT-2 line and the Llama line.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Llama: Touvron et al. 2023.
B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import block
from tfm_jax.nn.attention import Context
from tfm_jax.nn.heads import unembed
from tfm_jax.nn.linear import Embedding
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.positions import Rope, rotation
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import Caches, LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule, constrain

_GPT2 = dict(vocab_size=50257, max_len=1024)
_LLAMA = dict(
    norm="rms",
    mlp="gated",
    activation="silu",
    position="rotary",
    bias="none",
    output="free",
    norm_eps=1e-5,
    max_len=4096,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | dict(layers=12, width=768, heads=12),
    "gpt2-medium": _GPT2 | dict(layers=24, width=1024, heads=16),
    "gpt2-large": _GPT2 | dict(layers=36, width=1280, heads=20),
    "gpt2-xl": _GPT2 | dict(layers=48, width=1600, heads=25),
    # nanoGPT's CPU setting: github.com/karpathy/nanoGPT, README, "i only have a macbook".
    "nano": dict(layers=4, width=128, heads=4, max_len=64, bias="none"),
    "mini": dict(layers=4, width=256, heads=4, max_len=256, bias="none"),
    "small": dict(layers=6, width=384, heads=6, max_len=256, bias="none"),
    "llama-mini": _LLAMA | dict(layers=4, width=256, heads=4, kv_heads=2, mlp_width=768, max_len=256, output="tied"),
    "tinyllama-1.1b": _LLAMA
    | dict(vocab_size=32000, layers=22, width=2048, heads=32, kv_heads=4, mlp_width=5632, max_len=2048),
    "llama2-7b": _LLAMA | dict(vocab_size=32000, layers=32, width=4096, heads=32, mlp_width=11008),
    "llama2-70b": _LLAMA | dict(vocab_size=32000, layers=80, width=8192, heads=64, kv_heads=8, mlp_width=28672),
    "llama3-8b": _LLAMA
    | dict(
        vocab_size=128256,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        mlp_width=14336,
        max_len=8192,
        rope_theta=500_000.0,
    ),
    "moe-mini": _LLAMA
    | dict(layers=4, width=256, heads=4, kv_heads=2, mlp_width=384, max_len=256, output="tied", experts=8),
    "mixtral-8x7b": _LLAMA
    | dict(
        vocab_size=32000,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        mlp_width=14336,
        max_len=32768,
        rope_theta=1_000_000.0,
        experts=8,
    ),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("next", "prefix_lm")
# What `train.mup` scales for the logits: a table of their own, or what is multiplied with the one that embeds too.
READOUT = (r"unembedding/embedding$", r"final_norm/(scale|bias)$")
RULES: tuple[Rule, ...] = (
    (r"(token_embedding|unembedding)/embedding$", ("tensor", "fsdp")),
    (r"position_embedding/embedding$", (None, "fsdp")),
    *block.RULES,
)


class Model(nn.Module):
    """Predicts the next token at every position.

    Attributes:
      block: sizes and choices of the blocks; its fields are written flat in a config.
      vocab_size: V; the data's own if None.
      max_len: longest sequence; the size of the position table for `position="learned"`.
      layers: number of blocks.
      position: `learned` adds a table to the embeddings, `rotary` turns queries and keys, or `none`.
      rope_theta, rope_scaling, ...: see `nn.positions.Rope`.
      output: `tied` uses the token table for the output too (Press and Wolf 2017), `free` has its own.
      layer_loop, remat, pipeline: see `nn.stack.Stack`.
    """

    block: BlockSpec = BlockSpec()
    vocab_size: int | None = None
    max_len: int = 256
    layers: int = 4
    position: Literal["learned", "rotary", "none"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_len: int = 8192
    output: Literal["tied", "free"] = "tied"
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_len", "layers")
        if self.position == "rotary" and self.block.key_size % 2:
            raise UserError(
                f"model.position='rotary' turns pairs, so the head size must be even; it is {self.block.key_size}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        caches: Caches | None = None,
        valid: jax.Array | None = None,
        prefix: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """Logits and what they are made of; under jit only what is used is computed.

        Args:
          tokens: (B, T) int32.
          segment_ids: (B, T) int32; positions attend within their own segment.
          positions: (B, T) int32; 0..T-1 if None. Needed with caches: where these tokens stand.
          caches: from `init_caches`, for decoding.
          valid: (B, T) bool, False for padding, which nothing attends to.
          prefix: (B,) int32, how many tokens from the first on see each other both ways; none if None.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `hidden` (B, T, D) in the compute dtype, `unembedding` (V, D), `logits` (B, T, V) float32, and
          `caches` if any were given.
        """
        spec, length = self.block, tokens.shape[1]
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set, and no data set has filled it in.")
        if length > self.max_len:
            raise UserError(f"A sequence of {length} tokens is longer than model.max_len={self.max_len}.")
        mask = Mask(causal=True, query_segments=segment_ids, key_segments=segment_ids, key_valid=valid, prefix=prefix)
        if caches is not None:
            if positions is None:
                raise ValueError("Decoding with caches needs the tokens' positions.")
            mask = Mask(causal=True, query_positions=positions, prefix=prefix)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        table = Embedding(self.vocab_size, spec.width, spec.compute_dtype, spec.init_std, name="token_embedding")
        x, turn = table(tokens), None
        if self.position == "learned":
            place = Embedding(self.max_len, spec.width, spec.compute_dtype, spec.init_std, name="position_embedding")
            x = x + jnp.broadcast_to(place(positions), x.shape)
        elif self.position == "rotary":
            turn = rotation(positions, spec.key_size, self.rope)
        if spec.dropout:
            x = nn.Dropout(spec.dropout, deterministic=not train)(x)
        x = constrain(x, ("rows", "length", "embed"))
        hidden, caches = self.stack(name="stack")(x, Context(mask, turn), caches, train=train)
        if self.output == "tied":
            unembedding = table.embedding
        else:
            free = Embedding(self.vocab_size, spec.width, spec.compute_dtype, spec.init_std, name="unembedding")
            unembedding = free.embedding
        out = unembed(spec, hidden, unembedding)
        return out if caches is None else out | {"caches": caches}

    @property
    def rope(self) -> Rope:
        stretch = (self.rope_factor, self.rope_low_freq, self.rope_high_freq, self.rope_original_len)
        return Rope(self.rope_theta, self.rope_scaling, *stretch)

    def stack(self, name: str | None = None) -> Stack:
        how = self.layer_loop, self.remat, self.pipeline
        return Stack(self.block, self.layers, *how, name=name, parent=self if name else None)

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32)}

    def init_caches(self, batch: int, length: int) -> Caches:
        """Empty key/value caches for `length` positions of `batch` sequences."""
        return self.stack().init_caches(batch, length)

    def train_flops_per_token(self, length: int) -> float:
        """Model FLOPs, forward and backward: 6 a weight plus 12 L H K T of attention, not halved for causality.

        Chowdhery et al. 2022 (PaLM), appendix B, so that MFU compares with published figures.
        """
        spec = self.block
        assert self.vocab_size is not None
        projections = spec.width * spec.key_size * (2 * spec.heads + 2 * spec.groups)
        mlp = spec.width * spec.hidden * (3 if spec.mlp == "gated" else 2)
        if spec.experts:
            mlp = mlp * spec.experts_per_token + spec.width * spec.experts
        weights = self.layers * (projections + mlp) + self.vocab_size * spec.width
        return 6.0 * weights + 12.0 * self.layers * spec.heads * spec.key_size * length

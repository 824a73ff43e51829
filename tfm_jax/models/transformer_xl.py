"""Transformer-XL: a decoder that attends to its own states of earlier segments, by distance (Dai et al. 2019).

B batch, T segment length, M memory length, D width, V vocabulary, L layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import block, relative
from tfm_jax.nn.attention import Context
from tfm_jax.nn.heads import unembed
from tfm_jax.nn.linear import Embedding
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import sinusoids
from tfm_jax.nn.relative import Memory, Relative, RelativeAttention, layer_caches, layer_states
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import Caches, LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule, constrain

# Sizes from the paper's released code. `base` and `large` are those of WikiText-103 (V = 267,735) without the adaptive
# softmax: `base` then lacks 268,968 of its 151 M parameters, and `large` has a table of V x D where the paper's, with
# adaptive embeddings, is narrower for rare words. `enwik8-...` are characters (41 M and 277 M).
VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(layers=4, width=256, heads=4, mem_len=256),
    "base": dict(layers=16, width=410, heads=10, head_dim=41, mlp_width=2100, mem_len=150),
    "large": dict(layers=18, width=1024, heads=16, mlp_width=4096, mem_len=384),
    "enwik8-12l": dict(vocab_size=204, layers=12, width=512, heads=8, mlp_width=2048, mem_len=512),
    "enwik8-24l": dict(vocab_size=204, layers=24, width=1024, heads=8, mlp_width=3072, mem_len=768),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("next",)
RULES: tuple[Rule, ...] = (
    (r"token_embedding/embedding$", ("tensor", "fsdp")),
    *relative.RULES,
    *block.RULES,
)


class Model(nn.Module):
    """Predicts the next token at every position, from the segment and a memory of the states before it.

    Attributes:
      block: sizes and choices of the blocks; its fields are written flat in a config. Attention never has biases.
      vocab_size: V; the data's own if None.
      layers: L.
      mem_len: M, the states of the past that each layer attends to; 0 for none.
      layer_loop, remat: see `nn.stack.Stack`.
    """

    block: BlockSpec = BlockSpec(norm_position="post", activation="relu", init="normal")
    vocab_size: int | None = None
    layers: int = 4
    mem_len: int = 256
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("layers", 1), ("mem_len", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"model.{name}={value}: must be at least {least}.")
        if self.block.width % 2:
            raise UserError(f"model.width={self.block.width}: sinusoids come in pairs, so it must be even.")
        if self.block.qk_norm != "none":
            raise UserError(f"model.qk_norm={self.block.qk_norm!r}: transformer_xl has none. Use 'none'.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        fresh: jax.Array | None = None,
        memory: Memory | None = None,
        valid: jax.Array | None = None,
        positions: jax.Array | None = None,
        caches: Caches | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """Logits, what they are made of, and the memory for the next segment.

        Args:
          tokens: (B, T) int32.
          fresh: (B,) bool, rows that begin a new stream: what the memory holds for them is forgotten.
          memory: of the segments before, as the last call returned it; empty if None.
          valid: (B, T) bool, False for padding, which nothing attends to, in this segment or from the next.
          positions: (B, T) int32, with `caches` only: where these tokens stand.
          caches: from `init_caches`, for decoding, instead of a memory.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `hidden` (B, T, D) in the compute dtype, `unembedding` (V, D), `logits` (B, T, V) float32, and
          `memory` if `mem_len` is above 0, or `caches` if any were given.
        """
        spec, (batch, length) = self.block, tokens.shape
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set, and no data set has filled it in.")
        decoding = caches is not None
        if decoding:
            if positions is None:
                raise ValueError("Decoding with caches needs the tokens' positions.")
            # As far back as a token of a segment surely sees.
            mask = Mask(causal=True, window=self.mem_len + 1 if self.mem_len else None, query_positions=positions)
            reach = jax.tree.leaves(caches)[0].shape[-3]
        else:
            memory = self.init_memory(batch) if memory is None else memory
            if memory is not None:
                held = memory.valid if fresh is None else memory.valid & ~fresh[:, None]
                valid = jnp.concatenate([held, jnp.ones_like(tokens, bool) if valid is None else valid], axis=1)
                caches = layer_caches(memory.states, self.layer_loop)
            mask = Mask(causal=True, offset=self.mem_len, key_valid=valid)
            reach = self.mem_len + length

        def drop(x: jax.Array) -> jax.Array:
            return nn.Dropout(spec.dropout, deterministic=not train)(x) if spec.dropout else x

        table = Embedding(self.vocab_size, spec.width, spec.compute_dtype, spec.init_std, name="token_embedding")
        x = constrain(drop(table(tokens) * spec.width**0.5), ("batch", "length", "embed"))
        init, shape = nn.initializers.normal(spec.init_std), (spec.heads, spec.key_size)
        shared = Relative(
            drop(jnp.asarray(sinusoids(reach, spec.width)[::-1])),
            self.param("content_bias", init, shape, jnp.float32),
            self.param("position_bias", init, shape, jnp.float32),
        )
        hidden, caches = self.stack(name="stack")(x, Context(mask, shared), caches, train=train)
        out = unembed(spec, drop(hidden), table.embedding)
        if decoding:
            return out | {"caches": caches}
        if caches is None:
            return out
        states = constrain(jax.lax.stop_gradient(layer_states(caches)), ("batch", None, None, None))
        assert valid is not None
        return out | {"memory": Memory(states, valid[:, length:])}

    def stack(self, name: str | None = None) -> Stack:
        return Stack(
            self.block,
            self.layers,
            self.layer_loop,
            self.remat,
            attention=RelativeAttention,
            name=name,
            parent=self if name else None,
        )

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32)}

    def init_memory(self, batch: int) -> Memory | None:
        """A memory that holds nothing; None if the model has none."""
        if not self.mem_len:
            return None
        states = jnp.zeros((batch, self.layers, self.mem_len, self.block.width), self.block.compute_dtype)
        return Memory(states, jnp.zeros((batch, self.mem_len), bool))

    def init_caches(self, batch: int, length: int) -> Caches:
        """Empty key/value caches for `length` positions of `batch` sequences."""
        return self.stack().init_caches(batch, length)

    def train_flops_per_token(self, length: int) -> float:
        """Model FLOPs, forward and backward: 6 a weight, 18 L H K S of attention over S = M + T keys and distances.

        As Chowdhery et al. 2022 (PaLM), appendix B, counts 12 L H K T, plus one more product, of queries with distances;
        and 4 a weight for keys and values of the memory, into which no gradient goes.
        """
        spec = self.block
        assert self.vocab_size is not None
        keys = 2 * spec.width * spec.key_size * spec.groups
        projections = 2 * spec.width * spec.key_size * spec.heads + keys
        mlp = spec.width * spec.hidden * (3 if spec.mlp == "gated" else 2)
        weights = self.layers * (projections + mlp) + self.vocab_size * spec.width
        attention = 18.0 * self.layers * spec.heads * spec.key_size * (self.mem_len + length)
        return 6.0 * weights + attention + 4.0 * self.layers * keys * self.mem_len / length

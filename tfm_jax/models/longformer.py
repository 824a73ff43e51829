"""Longformer: a bidirectional encoder of long documents at a cost linear in their length (Beltagy et al. 2020).

B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import block, embeddings, heads, longformer
from tfm_jax.nn.attention import Context
from tfm_jax.nn.embeddings import TextEmbedding
from tfm_jax.nn.longformer import LongformerAttention, find_globals
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(width=768, heads=12, norm_position="post", activation="gelu", norm_eps=1e-5, init="normal")
_4096 = dict(vocab_size=50265, max_len=4096, window=512)

VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(layers=4, width=256, heads=4, max_len=1024, window=128),
    "longformer-base-4096": _4096 | dict(layers=12, width=768, heads=12),
    "longformer-large-4096": _4096 | dict(layers=24, width=1024, heads=16),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("mask",)
# See `models.bert`.
READOUT = (r"token_head/norm/(scale|bias)$",)
RULES: tuple[Rule, ...] = (*embeddings.RULES, *heads.RULES, *longformer.RULES, *block.RULES)


class Model(nn.Module):
    """States of every position from those around it and from the global tokens, and what `outputs` asks for.

    Attributes:
      block: sizes and choices of the blocks; its fields are written flat in a config.
      vocab_size: V; the data's own if None.
      max_len: longest sequence; any length up to it will do.
      types: number of segments; 0 for none.
      offset: first row of the position table that is used.
      window: tokens that a token sees around it, half on each side, besides itself; even.
      max_global: most global tokens in a row; memory and time grow with it.
      outputs: see `nn.heads.predictions`; what stands on the first position wants it global (section 5).
      pooling: what `pooled` reads: the `first` position, or the `mean` of all.
      classes: how many, 1 for a number; the data's own if None.
      layers, layer_loop, remat, pipeline: see `nn.stack.Stack`.
    """

    block: BlockSpec = SPEC
    vocab_size: int | None = None
    max_len: int = 4096
    types: int = 1
    offset: int = 2
    window: int = 512
    max_global: int = 64
    layers: int = 12
    outputs: Sequence[heads.Output] = ("tokens",)
    pooling: heads.Pooling = "first"
    classes: heads.Classes = None
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_len", "max_global", "layers", "classes")
        heads.check_outputs(self.outputs, self.classes)
        if self.window < 2 or self.window % 2:
            raise UserError(f"model.window={self.window}: must be even, at least 2; half of it is on each side.")
        if self.block.groups != self.block.heads or self.block.qk_norm != "none":
            raise UserError(
                f"model.kv_heads={self.block.kv_heads}, model.qk_norm={self.block.qk_norm!r}: Longformer's attention has"
                " as many key heads as query heads, and does not normalise them."
            )
        if self.block.attention not in ("auto", "xla"):
            raise UserError(
                f"model.attention={self.block.attention!r}: Longformer's attention is its own. Use 'auto' or 'xla'."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        global_tokens: jax.Array | None = None,
        token_types: jax.Array | None = None,
        valid: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """States and logits; under jit only what is used is computed.

        Args:
          tokens: (B, T) int32.
          global_tokens: (B, T) bool, tokens that see all others and are seen by all. If None the first one where `outputs`
            have `pooled`, `pair` or `classes`, which read it, else none. Everything about a row with more than `max_global` of
            them is NaN.
          token_types: (B, T) int32, the segment of each token; 0 if None.
          valid: (B, T) bool, False for padding.
          positions: (B, T) int32; 0..T-1 if None, or with an `offset` how many valid tokens stand before.
          segment_ids: (B, T) int32; positions attend within their own document.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `states` (B, T, D), and what `nn.heads.predictions` makes for `outputs`.
        """
        spec = self.block
        if self.offset and positions is None and valid is not None:
            # As in RoBERTa, tokens are counted, not places.
            positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
        embed = TextEmbedding(spec, self.vocab_size, self.max_len, self.types, self.offset, name="embeddings")
        x, table = embed(tokens, token_types, positions, train=train)
        spots = None
        if global_tokens is None and {"pooled", "pair", "classes"} & {*self.outputs}:
            global_tokens = jnp.broadcast_to(jnp.arange(tokens.shape[1]) == 0, tokens.shape)
        if self.is_initializing() and global_tokens is None:
            # The same parameters whether or not a data set marks global tokens.
            global_tokens = jnp.zeros(tokens.shape, bool)
        if global_tokens is not None:
            chosen = global_tokens if valid is None else global_tokens & valid
            spots = find_globals(chosen, self.max_global)
            too_many = jnp.sum(chosen, axis=1) > self.max_global
            # An index is not an error under jit, and a row that lost some of its global tokens would look right.
            x = jnp.where(jnp.broadcast_to(too_many[:, None, None], x.shape), jnp.nan, x)
        mask = Mask(window=self.window // 2 + 1, key_valid=valid, query_segments=segment_ids, key_segments=segment_ids)
        how = self.layer_loop, self.remat, self.pipeline
        stack = Stack(spec, self.layers, *how, attention=LongformerAttention, name="stack")
        x, _ = stack(x, Context(mask, spots), train=train)
        return {"states": x} | heads.predictions(self, x, table, valid, train=train)

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32), "global_tokens": jnp.ones((batch, 1), bool)}

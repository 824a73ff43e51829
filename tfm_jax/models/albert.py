"""ALBERT: one block applied again and again, and a narrow token table (Lan et al. 2020).

B batch, T length, D width, E width of the token table, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.nn import block, embeddings, heads
from tfm_jax.nn.attention import Context
from tfm_jax.nn.embeddings import TextEmbedding
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(
    width=768, heads=12, norm_position="post", activation="gelu_tanh", norm_eps=1e-12, init="normal", init_std=0.02
)
_V2 = dict(vocab_size=30000, max_len=512, embedding_width=128)

VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(layers=4, width=256, heads=4, embedding_width=64, max_len=256, outputs=("tokens",)),
    "albert-base-v2": _V2 | dict(layers=12, width=768, heads=12),
    "albert-large-v2": _V2 | dict(layers=24, width=1024, heads=16),
    "albert-xlarge-v2": _V2 | dict(layers=24, width=2048, heads=16),
    "albert-xxlarge-v2": _V2 | dict(layers=12, width=4096, heads=64),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("mask", "order", "follow")
# See `models.bert`.
READOUT = (r"token_head/norm/(scale|bias)$",)
RULES: tuple[Rule, ...] = (*embeddings.RULES, *heads.RULES, *block.RULES)


class Model(nn.Module):
    """States of every position after `layers` applications of one block, and what `outputs` asks for.

    Attributes:
      block: sizes and choices of the block; its fields are written flat in a config.
      vocab_size: V; the data's own if None.
      max_len: longest sequence.
      embedding_width: E, of the tables that are summed before the projection to D.
      types: number of segments; 0 for none.
      layers: applications of the block.
      outputs: `tokens` predicts the token at each position, `pooled` is a tanh layer over the first position; over it,
        `pair` says whether two segments stand in their own order (section 3.1) and `classes` is a class of the whole, or a number;
        the others as in `models.bert`.
      pooling: what `pooled` reads: the `first` position, or the `mean` of all.
      classes: how many, 1 for a number; the data's own if None.
      layer_loop, remat: see `nn.stack.Stack`; both loops have the same parameters.
    """

    block: BlockSpec = SPEC
    vocab_size: int | None = None
    max_len: int = 512
    embedding_width: int = 128
    types: int = 2
    layers: int = 12
    outputs: Sequence[heads.Output] = ("tokens", "pair")
    pooling: heads.Pooling = "first"
    classes: heads.Classes = None
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_len", "embedding_width", "layers", "classes")
        heads.check_outputs(self.outputs, self.classes)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        token_types: jax.Array | None = None,
        valid: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """States and heads; under jit only what is used is computed.

        Args:
          tokens: (B, T) int32.
          token_types: (B, T) int32, the segment of each token; 0 if None.
          valid: (B, T) bool, False for padding.
          positions: (B, T) int32; 0..T-1 if None.
          segment_ids: (B, T) int32; positions attend within their own document.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `states` (B, T, D), and what `nn.heads.predictions` makes for `outputs`.
        """
        spec = self.block
        embed = TextEmbedding(
            spec, self.vocab_size, self.max_len, self.types, width=self.embedding_width, name="embeddings"
        )
        x, table = embed(tokens, token_types, positions, train=train)
        mask = Mask(key_valid=valid, query_segments=segment_ids, key_segments=segment_ids)
        stack = Stack(spec, self.layers, self.layer_loop, self.remat, sharing="all", name="stack")
        x, _ = stack(x, Context(mask), train=train)
        return {"states": x} | heads.predictions(self, x, table, valid, train=train)

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32)}

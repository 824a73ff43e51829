"""Bidirectional encoders: BERT, RoBERTa, DistilBERT.

BERT: Devlin et al. 2019. RoBERTa: Liu et al. 2019. DistilBERT: Sanh et al. 2019.
B batch, T length, D width, V vocabulary.
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
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(norm_position="post", activation="gelu", norm_eps=1e-12, init="normal")
_BERT = dict(vocab_size=30522, max_len=512)
_BASE = dict(layers=12, width=768, heads=12)
_LARGE = dict(layers=24, width=1024, heads=16)
_ROBERTA = dict(vocab_size=50265, max_len=512, types=1, offset=2, norm_eps=1e-5, outputs=("tokens",))

VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(layers=4, width=256, heads=4, max_len=256, outputs=("tokens",)),
    "bert-base": _BERT | _BASE,
    "bert-large": _BERT | _LARGE,
    "roberta-base": _ROBERTA | _BASE,
    "roberta-large": _ROBERTA | _LARGE,
    "distilbert-base": _BERT | _BASE | dict(layers=6, types=0, outputs=("tokens",)),
    "minilm-l6": _BERT | dict(layers=6, width=384, heads=12, mlp_width=1536, outputs=("pooled",)),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("mask", "follow", "order")
# See `models.gpt`; all other heads are kernels, known by their shapes.
READOUT = (r"token_head/norm/(scale|bias)$",)
RULES: tuple[Rule, ...] = (*embeddings.RULES, *heads.RULES, *block.RULES)


class Model(nn.Module):
    """States of every position, and what `outputs` asks for.

    Attributes:
      block: sizes and choices of the blocks; its fields are written flat in a config.
      vocab_size: V; the data's own if None.
      max_len: longest sequence.
      types: number of segments; 0 for none (DistilBERT).
      offset: first row of the position table that is used; 2 in RoBERTa.
      outputs: `tokens` predicts the token at each position, `pooled` is a tanh layer over the first position; over it,
        `pair` says whether two segments follow each other and `classes` is a class of the whole, or a number; `tags` is a class
        of each position, `span` where an answer begins and ends, `embedding` the text as a unit vector.
      pooling: what `pooled` reads: the `first` position, or the `mean` of all.
      classes: how many, 1 for a number, or such by name for a mixture of tasks; the data's own if None.
      layers, layer_loop, remat, pipeline: see `nn.stack.Stack`.
    """

    block: BlockSpec = SPEC
    vocab_size: int | None = None
    max_len: int = 512
    types: int = 2
    offset: int = 0
    layers: int = 12
    outputs: Sequence[heads.Output] = ("tokens", "pair")
    pooling: heads.Pooling = "first"
    classes: heads.Classes = None
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_len", "layers", "classes")
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
          positions: (B, T) int32; 0..T-1 if None, or with an `offset` how many valid tokens stand before.
          segment_ids: (B, T) int32; positions attend within their own document.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `states` (B, T, D), and what `nn.heads.predictions` makes for `outputs`.
        """
        spec = self.block
        if self.offset and positions is None and valid is not None:
            # RoBERTa counts tokens, not places: padding in front does not move a text.
            positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
        embed = TextEmbedding(spec, self.vocab_size, self.max_len, self.types, self.offset, name="embeddings")
        x, table = embed(tokens, token_types, positions, train=train)
        mask = Mask(key_valid=valid, query_segments=segment_ids, key_segments=segment_ids)
        stack = Stack(spec, self.layers, self.layer_loop, self.remat, self.pipeline, name="stack")
        x, _ = stack(x, Context(mask), train=train)
        return {"states": x} | heads.predictions(self, x, table, valid, train=train)

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32)}

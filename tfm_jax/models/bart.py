"""BART, Lewis et al. 2020: post-norm, learned positions, a norm on the embeddings, one token table.

B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from tfm_jax.nn import encdec
from tfm_jax.nn.encdec import EncoderDecoder, Side
from tfm_jax.nn.linear import Embedding, Norm
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(norm_position="post", activation="gelu", init="normal")
_BART = dict(vocab_size=50265, max_len=1024, dropout=0.1)

VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(width=256, heads=4, encoder_layers=3, decoder_layers=3, max_len=256),
    "bart-base": _BART | dict(width=768, heads=12, encoder_layers=6, decoder_layers=6),
    "bart-large": _BART | dict(width=1024, heads=16, encoder_layers=12, decoder_layers=12),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("continue", "span", "denoise", "prefix")
RULES: tuple[Rule, ...] = encdec.RULES


class Model(EncoderDecoder):
    """The base's fields, see `nn.encdec.EncoderDecoder`, and

    Attributes:
      offset: first row of the position tables that is used; 2 in the published models.
      embedding_scale: token vectors are multiplied by `sqrt` of the width or not (`none`).
    """

    block: BlockSpec = SPEC
    max_len: int = 1024
    offset: int = 2
    embedding_scale: Literal["sqrt", "none"] = "none"

    def embedded(self, side: Side, x: jax.Array, places: jax.Array) -> jax.Array:
        spec = self.block
        entries, name = self.max_len + self.offset, f"{side}_position_embedding"
        table = Embedding(entries, spec.width, spec.compute_dtype, spec.init_std, name=name)
        scale = spec.width**0.5 if self.embedding_scale == "sqrt" else 1.0
        x = x * scale + jnp.broadcast_to(table(places + self.offset), x.shape)
        return Norm(spec, name=f"{side}_embedding_norm")(x)

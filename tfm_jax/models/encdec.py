"""The Transformer of Vaswani et al. 2017, "Attention Is All You Need": post-norm, sinusoidal positions, one token table.

With a bias on the logits as Marian trains it (Junczys-Dowmunt et al. 2018), which the OPUS-MT translation models are.
B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import encdec
from tfm_jax.nn.encdec import EncoderDecoder, Side
from tfm_jax.nn.heads import with_bias
from tfm_jax.nn.positions import sinusoids
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(norm_position="post", activation="relu", init="xavier")
_OPUS = dict(width=512, heads=8, activation="silu", max_len=512)

# The paper's table 3; its vocabulary is the data's. Embeddings begin with a variance of 1 after their scaling by sqrt(D).
VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(width=256, heads=4, encoder_layers=3, decoder_layers=3, max_len=256, init_std=256**-0.5),
    "transformer-base": dict(width=512, heads=8, dropout=0.1, init_std=512**-0.5),
    "transformer-big": dict(width=1024, heads=16, dropout=0.3, init_std=1024**-0.5),
    # Helsinki-NLP/opus-mt-*; each pair of languages has its own vocabulary, this is en-de's.
    "opus-mt": _OPUS | dict(vocab_size=58101),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("continue", "span", "denoise", "prefix")
RULES: tuple[Rule, ...] = ((r"logits_bias$", ("tensor",)), *encdec.RULES)


class Model(EncoderDecoder):
    """The base's fields, see `nn.encdec.EncoderDecoder`, and

    Attributes:
      embedding_scale: token vectors are multiplied by `sqrt` of the width (section 3.4) or not (`none`).
    """

    block: BlockSpec = SPEC
    max_len: int = 512
    embedding_scale: Literal["sqrt", "none"] = "sqrt"

    def __post_init__(self) -> None:
        if self.block.width % 2:
            raise UserError(f"model.width={self.block.width}: sinusoidal positions need an even one.")
        super().__post_init__()

    def embedded(self, side: Side, x: jax.Array, places: jax.Array) -> jax.Array:
        table = jnp.asarray(sinusoids(self.max_len, x.shape[-1]))
        scale = x.shape[-1] ** 0.5 if self.embedding_scale == "sqrt" else 1.0
        return x * scale + jnp.broadcast_to(table[places].astype(x.dtype), x.shape)

    def predicted(self, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        bias = self.param("logits_bias", nn.initializers.zeros_init(), (table.shape[0],), jnp.float32)
        return with_bias(hidden, table, bias)

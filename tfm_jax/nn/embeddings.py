"""Embeddings of a bidirectional encoder: tokens, positions and segments, normalised. B batch, T length, D width."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn.linear import Dense, Embedding, Norm
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

RULES: tuple[Rule, ...] = (
    (r"(token_embedding|unembedding)/embedding$", ("tensor", "fsdp")),
    (r"(position|type)_embedding/embedding$", (None, "fsdp")),
    (r"embedding_projection/kernel$", ("fsdp", None)),
    (r"embedding_projection/bias$", (None,)),
)


class TextEmbedding(nn.Module):
    """The sum of a token's, a position's and a segment's vector, normalised and dropped out (Devlin et al. 2019).

    Attributes:
      vocab_size: V, None until a data set has filled it in.
      max_len: usable positions.
      types: segments; 0 for none.
      offset: first row of the position table that is used (2 in RoBERTa).
      width: of the tables; where it is not the blocks' width a projection follows (Lan et al. 2020, section 3.1).
    """

    spec: BlockSpec
    vocab_size: int | None
    max_len: int
    types: int
    offset: int = 0
    width: int | None = None

    @nn.compact
    def __call__(
        self, tokens: jax.Array, token_types: jax.Array | None, positions: jax.Array | None, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """(B, T) ids to (B, T, D), and the token table (V, width)."""
        spec, length, width = self.spec, tokens.shape[1], self.width or self.spec.width
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set, and no data set has filled it in.")
        if length > self.max_len:
            raise UserError(f"A sequence of {length} tokens is longer than model.max_len={self.max_len}.")

        def table(entries: int, name: str) -> Embedding:
            return Embedding(entries, width, spec.compute_dtype, spec.init_std, name=name)

        words = table(self.vocab_size, "token_embedding")
        x = words(tokens)
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        places = table(self.max_len + self.offset, "position_embedding")(positions + self.offset)
        x = x + jnp.broadcast_to(places, x.shape)
        if self.types:
            kinds = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + table(self.types, "type_embedding")(kinds)
        x = Norm(spec, name="embedding_norm")(x)
        if spec.dropout:
            x = nn.Dropout(spec.dropout, deterministic=not train)(x)
        if width != spec.width:
            init = nn.initializers.normal(spec.init_std)
            x = Dense(spec.width, spec.bias, spec.compute_dtype, init, name="embedding_projection")(x)
        return constrain(x, ("rows", "length", "embed")), words.embedding

"""An encoder and a decoder that attends to its states. B batch, S source length, T target length, D width, V vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import block, embeddings
from tfm_jax.nn.attention import Context
from tfm_jax.nn.block import LayerCache
from tfm_jax.nn.heads import unembed
from tfm_jax.nn.linear import Embedding
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import Caches, LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule, constrain

Side = Literal["encoder", "decoder"]

RULES: tuple[Rule, ...] = (*embeddings.RULES, *block.RULES)


class EncoderDecoder(nn.Module):
    """Predicts each token of a target from those before it and from a source (Vaswani et al. 2017).

    Both sides read one token table. A family says how a token becomes a vector (`embedded`), what is added to the scores
    (`bias`), and how states become logits (`predicted`).

    Attributes:
      block: sizes and choices of the blocks of both sides; its fields are written flat in a config.
      vocab_size: V; the data's own if None.
      max_len: longest source and longest target; None for no limit.
      encoder_layers, decoder_layers: number of blocks.
      layer_loop, remat, pipeline: see `nn.stack.Stack`.
    """

    block: BlockSpec = BlockSpec()
    vocab_size: int | None = None
    max_len: int | None = 512
    encoder_layers: int = 6
    decoder_layers: int = 6
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_len", "encoder_layers", "decoder_layers")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None,
        decoder_tokens: jax.Array,
        valid: jax.Array | None = None,
        decoder_valid: jax.Array | None = None,
        positions: jax.Array | None = None,
        caches: Caches | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """Logits and what they are made of; under jit only what is used is computed.

        Decoding: the first call has `tokens` and the caches of `init_caches`, and its output's caches hold the source's
        keys and values too; later calls have those caches, the same `valid`, and None for `tokens`.

        Args:
          tokens: (B, S) int32, the source.
          decoder_tokens: (B, T) int32, the target one place later, behind a start token.
          valid: (B, S) bool, False for padding of the source.
          decoder_valid: (B, T) bool, False for padding of the target; with caches, of their positions.
          positions: (B, T) int32 of the target; 0..T-1 if None. Needed with caches: where these tokens stand.
          caches: from `init_caches`, or of the call before, for decoding.
          train: dropout on; needs an rng named `dropout` if a rate is above 0.

        Returns:
          `hidden` (B, T, D) in the compute dtype, `unembedding` (V, D), `logits` (B, T, V) float32, and `caches` if any
          were given. Where a family adds a bias to the logits it is one more column of the two.
        """
        spec = self.block
        self._check(tokens, decoder_tokens, positions, caches)
        table = Embedding(self._entries, spec.width, spec.compute_dtype, spec.init_std, name="token_embedding")
        drop = nn.Dropout(spec.dropout, deterministic=not train) if spec.dropout else _same
        # Pre-norm stacks end in a norm whose output is dropped out too (Raffel et al. 2020, section 2.1).
        drop_last = drop if spec.norm_position == "pre" else _same

        def entered(side: Side, ids: jax.Array, places: jax.Array) -> jax.Array:
            return constrain(drop(self.embedded(side, table(ids), places)), ("rows", "length", "embed"))

        source = None
        if tokens is not None:
            places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            context = Context(Mask(key_valid=valid, bias=self.bias("encoder", places, places)))
            states, _ = self.stack("encoder", name="encoder")(entered("encoder", tokens, places), context, train=train)
            source = drop_last(states)
        places = jnp.arange(decoder_tokens.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        slots = places if caches is None else jnp.arange(_length(caches), dtype=jnp.int32)[None]
        mask = Mask(
            causal=True,
            query_positions=None if caches is None else positions,
            key_valid=decoder_valid,
            bias=self.bias("decoder", places, slots),
        )
        context = Context(mask, source=source, source_mask=Mask(key_valid=valid))
        x = entered("decoder", decoder_tokens, places)
        hidden, caches = self.stack("decoder", name="decoder")(x, context, caches, train=train)
        out = unembed(self.block, *self.predicted(drop_last(hidden), table.embedding))
        return out if caches is None else out | {"caches": caches}

    def embedded(self, side: Side, x: jax.Array, places: jax.Array) -> jax.Array:
        """Vectors (B, T, D) of tokens that stand at `places` (B or 1, T), before dropout."""
        return x

    def bias(self, side: Side, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """(B or 1, H, T, S), added to the scores of self attention between these positions, (B or 1, T) and (.., S)."""
        return None

    def predicted(self, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`hidden` and `unembedding`, whose product is the logits, from the decoder's states and the token table."""
        return hidden, table

    def stack(self, side: Side, name: str | None = None) -> Stack:
        layers = self.encoder_layers if side == "encoder" else self.decoder_layers
        how = self.layer_loop, self.remat, self.pipeline
        return Stack(self.block, layers, *how, name=name, parent=self if name else None)

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        one = jnp.zeros((batch, 1), jnp.int32)
        return {"tokens": one, "decoder_tokens": one}

    def init_caches(self, batch: int, length: int) -> Caches:
        """Empty key/value caches for `length` target positions of `batch` sequences."""
        return self.stack("decoder").init_caches(batch, length)

    @property
    def _entries(self) -> int:
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set, and no data set has filled it in.")
        return self.vocab_size

    def _check(
        self, tokens: jax.Array | None, decoder_tokens: jax.Array, positions: jax.Array | None, caches: Caches | None
    ) -> None:
        for ids in (tokens, decoder_tokens):
            if ids is not None and self.max_len is not None and ids.shape[1] > self.max_len:
                raise UserError(f"A sequence of {ids.shape[1]} tokens is longer than model.max_len={self.max_len}.")
        if caches is not None and positions is None:
            raise ValueError("Decoding with caches needs the tokens' positions.")
        if tokens is None and (caches is None or _first(caches).cross is None):
            raise ValueError("Without tokens the decoder needs caches that a call with tokens has returned.")


def _same(x: jax.Array) -> jax.Array:
    return x


def _first(caches: Caches) -> LayerCache:
    """The first layer's; all of them where they are stacked."""
    return caches if isinstance(caches, LayerCache) else caches[0]


def _length(caches: Caches) -> int:
    return int(_first(caches).own.k.shape[-3])

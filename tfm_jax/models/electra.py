"""ELECTRA: a small generator replaces tokens, a discriminator says which ones (Clark et al. 2020).

`Model` is both, for pretraining; `Generator` and `Discriminator` are its halves, whose parameters have the same paths.
B batch, T length, D width, E width of the tables, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import block, embeddings, heads
from tfm_jax.nn.attention import Context
from tfm_jax.nn.embeddings import TextEmbedding
from tfm_jax.nn.heads import TokenHead
from tfm_jax.nn.linear import ACTIVATIONS, Dense
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.spec import BlockSpec, check_sizes
from tfm_jax.nn.stack import LayerLoop, Stack
from tfm_jax.parallel.sharding import Rule

SPEC = BlockSpec(width=256, heads=4, norm_position="post", activation="gelu", norm_eps=1e-12, init="normal")
_ELECTRA = dict(vocab_size=30522, max_len=512)

# The released generators have 4 heads each, of 64; the paper's small one has a single head (its table 6).
VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(layers=4, width=256, heads=4, embedding_width=128, max_len=256),
    "electra-small": _ELECTRA | dict(layers=12, width=256, heads=4, embedding_width=128),
    "electra-base": _ELECTRA | dict(layers=12, width=768, heads=12, embedding_width=768),
    "electra-large": _ELECTRA | dict(layers=24, width=1024, heads=16, embedding_width=1024),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("mask",)
RULES: tuple[Rule, ...] = (
    (r"replaced_head/transform/kernel$", ("fsdp", None)),
    (r"replaced_head/(dense/kernel|dense/bias|transform/bias)$", (None,)),
    *embeddings.RULES,
    *heads.RULES,
    *block.RULES,
)


class _Trunk(nn.Module):
    """An encoder on embeddings of another width."""

    spec: BlockSpec
    layers: int
    layer_loop: LayerLoop
    remat: Remat
    pipeline: Pipeline | None

    def states(self, x_BTE: jax.Array, mask: Mask, *, train: bool) -> jax.Array:
        """(B, T, D), from a compact method."""
        spec, x = self.spec, x_BTE
        if x.shape[-1] != spec.width:
            init = nn.initializers.normal(spec.init_std)
            x = Dense(spec.width, spec.bias, spec.compute_dtype, init, name="embedding_projection")(x)
        stack = Stack(spec, self.layers, self.layer_loop, self.remat, self.pipeline, name="stack")
        return stack(x, Context(mask), train=train)[0]


class MaskedPredictor(_Trunk):
    """The generator without its embeddings: the token at each position."""

    @nn.compact
    def __call__(self, x_BTE: jax.Array, table_VE: jax.Array, mask: Mask, *, train: bool) -> dict[str, Any]:
        x = self.states(x_BTE, mask, train=train)
        return {"states": x} | TokenHead(self.spec, name="token_head")(x, table_VE)


class ReplacementDetector(_Trunk):
    """The discriminator without its embeddings: whether the token at each position was replaced."""

    @nn.compact
    def __call__(self, x_BTE: jax.Array, mask: Mask, *, train: bool) -> dict[str, Any]:
        x = self.states(x_BTE, mask, train=train)
        return {"states": x, "replaced_logits": ReplacedHead(self.spec, name="replaced_head")(x)}


class ReplacedHead(nn.Module):
    """act(x W + b) w + c, the logit of having been replaced, (B, T) float32."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, init = self.spec, nn.initializers.normal(self.spec.init_std)
        y = ACTIVATIONS[spec.activation](Dense(spec.width, spec.bias, spec.compute_dtype, init, name="transform")(x))
        return Dense(1, "all", spec.compute_dtype, init, name="dense")(y).astype(jnp.float32)[..., 0]


class _Electra(nn.Module):
    """What the three models share.

    Attributes:
      block: sizes and choices of the blocks; its fields are written flat in a config.
      vocab_size: V; the data's own if None.
      max_len: longest sequence.
      embedding_width: E, of the tables; a projection follows where it is not the blocks' width.
      types: number of segments; 0 for none.
      layers, layer_loop, remat, pipeline: see `nn.stack.Stack`.
    """

    block: BlockSpec = SPEC
    vocab_size: int | None = None
    max_len: int = 512
    embedding_width: int = 128
    types: int = 2
    layers: int = 12
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_len", "embedding_width", "layers")
        super().__post_init__()

    @property
    def size(self) -> tuple[int, LayerLoop, Remat, Pipeline | None]:
        """Of the trunk or trunks."""
        return self.layers, self.layer_loop, self.remat, self.pipeline

    def embedding(self) -> TextEmbedding:
        # No projection in here: generator and discriminator have one each.
        spec = self.block
        spec = dataclasses.replace(spec, width=self.embedding_width, head_dim=spec.key_size)
        return TextEmbedding(spec, self.vocab_size, self.max_len, self.types, name="embeddings")


class Generator(_Electra):
    """Predicts the token at each position; `block` is the generator's own."""

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
        """`states` (B, T, D), `hidden` (B, T, E + 1), `unembedding` (V, E + 1), `logits` (B, T, V) float32.

        The arguments are those of `models.bert`.
        """
        x, table = self.embedding()(tokens, token_types, positions, train=train)
        part = MaskedPredictor(self.block, *self.size, name="generator")
        out: dict[str, Any] = part(x, table, _mask(valid, segment_ids), train=train)
        return out

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32)}


class Discriminator(_Electra):
    """Says of each token whether it was replaced; the model that is kept after pretraining, to be given other heads.

    Attributes:
      outputs: other than `tokens`; see `nn.heads.predictions`.
      pooling: what `pooled` reads: the `first` position, or the `mean` of all.
      classes: how many, 1 for a number; the data's own if None.
    """

    outputs: Sequence[heads.Output] = ()
    pooling: heads.Pooling = "first"
    classes: heads.Classes = None

    def __post_init__(self) -> None:
        check_sizes(self, "classes")
        heads.check_outputs(self.outputs, self.classes)
        if "tokens" in self.outputs:
            raise UserError("model.outputs: a discriminator predicts no tokens; the generator does.")
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
        """`states` (B, T, D), `replaced_logits` (B, T) float32 and what `nn.heads.predictions` makes for `outputs`.

        The arguments are those of `models.bert`.
        """
        x, table = self.embedding()(tokens, token_types, positions, train=train)
        part = ReplacementDetector(self.block, *self.size, name="discriminator")
        out: dict[str, Any] = part(x, _mask(valid, segment_ids), train=train)
        return out | heads.predictions(self, out["states"], table, valid, train=train)

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        return {"tokens": jnp.zeros((batch, 1), jnp.int32)}


class Model(_Electra):
    """Generator and discriminator on the same embeddings (section 3.2); `block` is the discriminator's.

    Attributes:
      generator_heads: of the generator, which is narrower in everything by the same factor: its width and the hidden
        size of its MLP are to the discriminator's as this is to `heads`.
    """

    generator_heads: int = 4

    def __post_init__(self) -> None:
        spec, count = self.block, self.generator_heads
        if not 1 <= count <= spec.heads:
            raise UserError(f"model.generator_heads={count}: must be from 1 to model.heads={spec.heads}.")
        for name, size in (("width", spec.width), ("mlp_width", spec.hidden), ("kv_heads", spec.groups)):
            if size * count % spec.heads:
                raise UserError(
                    f"model.generator_heads={count} of model.heads={spec.heads} heads does not give a whole"
                    f" model.{name} of {size}: {size * count / spec.heads:.1f}."
                )
        super().__post_init__()

    @property
    def generator_block(self) -> BlockSpec:
        spec, heads_ = self.block, self.block.heads

        def narrow(size: int) -> int:
            return size * self.generator_heads // heads_

        return dataclasses.replace(
            spec,
            width=narrow(spec.width),
            heads=self.generator_heads,
            mlp_width=narrow(spec.hidden),
            kv_heads=narrow(spec.groups),
            head_dim=spec.key_size,
        )

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None = None,
        corrupted: jax.Array | None = None,
        token_types: jax.Array | None = None,
        valid: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Any]:
        """The generator on `tokens`, the discriminator on `corrupted`; each where it is given.

        Args:
          tokens: (B, T) int32, some of them masked.
          corrupted: (B, T) int32, some of them replaced.
          token_types, valid, positions, segment_ids, train: as in `models.bert`, for both.

        Returns:
          for `tokens`: `hidden` (B, T, E + 1), `unembedding` (V, E + 1) and `logits` (B, T, V) float32; for `corrupted`:
          `states` (B, T, D) and `replaced_logits` (B, T) float32.
        """
        if tokens is None and corrupted is None:
            raise ValueError("Neither tokens for the generator nor corrupted ones for the discriminator.")
        if self.is_initializing():
            # A batch has no corrupted tokens yet: the loss makes them.
            tokens = corrupted = corrupted if tokens is None else tokens
        embed, mask = self.embedding(), _mask(valid, segment_ids)
        out: dict[str, Any] = {}
        if tokens is not None:
            x, table = embed(tokens, token_types, positions, train=train)
            made = MaskedPredictor(self.generator_block, *self.size, name="generator")(x, table, mask, train=train)
            out |= {name: made[name] for name in ("hidden", "unembedding", "logits")}
        if corrupted is not None:
            x, _ = embed(corrupted, token_types, positions, train=train)
            out |= ReplacementDetector(self.block, *self.size, name="discriminator")(x, mask, train=train)
        return out

    def example(self, batch: int = 1) -> dict[str, Any]:
        """The smallest inputs that make every parameter."""
        tokens = jnp.zeros((batch, 1), jnp.int32)
        return {"tokens": tokens, "corrupted": tokens}


def _mask(valid: jax.Array | None, segment_ids: jax.Array | None) -> Mask:
    return Mask(key_valid=valid, query_segments=segment_ids, key_segments=segment_ids)

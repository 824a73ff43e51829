"""T5, Raffel et al. 2020, and its version 1.1 (Shazeer 2020): pre-norm, relative positions as a bias of the scores.

B batch, T queries, S keys, H heads, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tfm_jax.errors import UserError
from tfm_jax.nn import encdec
from tfm_jax.nn.encdec import EncoderDecoder, Side
from tfm_jax.nn.linear import Embedding
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

SPEC = BlockSpec(
    head_dim=64,
    norm="rms",
    norm_eps=1e-6,
    activation="relu",
    bias="none",
    attention_scale="none",
    init="fan_in",
    init_std=1.0,
)
_T5 = dict(vocab_size=32128)
_V11 = _T5 | dict(mlp="gated", activation="gelu_tanh", output="free")


def _layers(count: int) -> dict[str, int]:
    return dict(encoder_layers=count, decoder_layers=count)


VARIANTS: dict[str, dict[str, Any]] = {
    "mini": dict(width=256, heads=4, mlp_width=1024, **_layers(3)),
    "t5-small": _T5 | dict(width=512, heads=8, mlp_width=2048, **_layers(6)),
    "t5-base": _T5 | dict(width=768, heads=12, mlp_width=3072, **_layers(12)),
    "t5-large": _T5 | dict(width=1024, heads=16, mlp_width=4096, **_layers(24)),
    "t5-3b": _T5 | dict(width=1024, heads=32, head_dim=128, mlp_width=16384, **_layers(24)),
    "t5-11b": _T5 | dict(width=1024, heads=128, head_dim=128, mlp_width=65536, **_layers(24)),
    "t5-v1.1-small": _V11 | dict(width=512, heads=6, mlp_width=1024, **_layers(8)),
    "t5-v1.1-base": _V11 | dict(width=768, heads=12, mlp_width=2048, **_layers(12)),
    "t5-v1.1-large": _V11 | dict(width=1024, heads=16, mlp_width=2816, **_layers(24)),
    "t5-v1.1-xl": _V11 | dict(width=2048, heads=32, mlp_width=5120, **_layers(24)),
    "t5-v1.1-xxl": _V11 | dict(width=4096, heads=64, mlp_width=10240, **_layers(24)),
}

# Of `data.objectives`, those that make sense of it.
OBJECTIVES = ("continue", "span", "denoise", "prefix")
RULES: tuple[Rule, ...] = ((r"relative_bias/embedding$", (None, "tensor")), *encdec.RULES)


class Model(EncoderDecoder):
    """The base's fields, see `nn.encdec.EncoderDecoder`, and

    Attributes:
      relative_buckets: of distances, for each side; one bias a bucket and head, shared by the layers of a side.
      relative_max_distance: all distances from here on share a bucket.
      output: `tied` multiplies the states by the token table over sqrt(D), `free` by a table of its own (version 1.1).
    """

    block: BlockSpec = SPEC
    max_len: int | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128
    output: Literal["tied", "free"] = "tied"

    def __post_init__(self) -> None:
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise UserError(
                f"model.relative_buckets={self.relative_buckets}: a multiple of 4, since two directions halve it."
            )
        if self.relative_max_distance <= self.relative_buckets // 2:
            raise UserError(
                f"model.relative_max_distance={self.relative_max_distance}: must be larger than half of"
                f" model.relative_buckets={self.relative_buckets}, the distances that have a bucket of their own."
            )
        super().__post_init__()

    def bias(self, side: Side, queries: jax.Array, keys: jax.Array) -> jax.Array:
        sizes = self.block.heads, self.relative_buckets, self.relative_max_distance
        directions: Literal[1, 2] = 2 if side == "encoder" else 1
        relative = RelativeBias(*sizes, directions, self.block.width**-0.5, name=f"{side}_relative_bias")
        return relative(queries, keys)

    def predicted(self, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        spec = self.block
        if self.output == "tied":
            return hidden * spec.width**-0.5, table
        # The standard deviation of a linear layer, since nothing divides by sqrt(D) here.
        free = Embedding(self._entries, spec.width, spec.compute_dtype, spec.width**-0.5, name="unembedding")
        return hidden, free.embedding


class RelativeBias(nn.Module):
    """A bias for each head and bucket of distances, a table (buckets, H)."""

    heads: int
    buckets: int
    max_distance: int
    directions: Literal[1, 2]
    init_std: float

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """(B, H, T, S) float32 of positions (B, T) and (B, S), where B may be 1."""
        init = nn.initializers.normal(self.init_std)
        table = self.param("embedding", init, (self.buckets, self.heads), jnp.float32)
        offsets = keys[:, None, :] - queries[:, :, None]
        found = buckets(offsets, self.buckets, self.max_distance, directions=self.directions)
        return constrain(jnp.take(table, found, axis=0).transpose(0, 3, 1, 2), (None, "heads", None, None))


def buckets(offsets: jax.Array, count: int, max_distance: int, *, directions: Literal[1, 2]) -> jax.Array:
    """Which of `count` buckets a key's position less a query's falls into; int32 of the same shape.

    Half of a direction's buckets are for one distance each, the other half widen logarithmically up to `max_distance`.
    With one direction all keys after the query fall into the first. Raffel et al. 2020, section 2.1, and the released
    code.
    """
    count //= directions
    exact = count // 2
    distances = np.arange(max_distance + 1)
    # A table made here in float32: on the edges of the buckets another platform's logarithm would fall on either side.
    growth = np.log(np.maximum(distances, exact).astype(np.float32) / np.float32(exact))
    growth = growth / np.float32(np.log(max_distance / exact)) * np.float32(count - exact)
    wide = np.minimum(exact + growth.astype(np.int32), count - 1)
    table = jnp.asarray(np.where(distances < exact, distances, wide).astype(np.int32))
    behind = table[jnp.minimum(jnp.maximum(-offsets, 0), max_distance)]
    if directions == 1:
        return behind
    ahead = table[jnp.minimum(jnp.maximum(offsets, 0), max_distance)]
    return jnp.where(offsets > 0, count + ahead, behind)

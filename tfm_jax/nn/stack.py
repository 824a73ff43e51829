"""Blocks on top of each other, unrolled or scanned. B batch, T length, S cache length, D width, L layers."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.nn.attention import Cache
from tfm_jax.nn.block import Block
from tfm_jax.nn.linear import Norm
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import Rotation
from tfm_jax.nn.spec import BlockSpec

LayerLoop = Literal["loop", "scan"]
Remat = Literal["none", "full", "dots", "dots_batched"]
# What the backward pass keeps of a block instead of computing it again.
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_batched": jax.checkpoint_policies.dots_saveable,
}
# A cache is a tuple of L layers' caches when unrolled, one cache with a leading layer axis when scanned.
Caches = tuple[Cache, ...] | Cache


class Stack(nn.Module):
    """`layers` blocks, then a norm if they normalise their inputs.

    Attributes:
      layers: L.
      layer_loop: `loop` unrolls, parameters under `block_0`, `block_1`, ...: fastest to run. `scan` compiles one
        block, parameters under `blocks` with a leading layer axis: fastest to compile, and fewest arrays.
      remat: `none` keeps activations, `full` recomputes the block in the backward pass, `dots` keeps products with
        weights, `dots_batched` keeps the attention scores' products too.
    """

    spec: BlockSpec
    layers: int
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Mask, rotation: Rotation | None = None, caches: Caches | None = None, *, train: bool
    ) -> tuple[jax.Array, Caches | None]:
        """(B, T, D) to (B, T, D), with the caches as they are after these T positions."""
        block: Any = Block
        if self.remat != "none":
            # Inside a scan the barrier against common-subexpression elimination only costs time.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=self.layer_loop == "loop")
        std = self.spec.init_std / (2 * self.layers) ** 0.5
        if self.layer_loop == "scan":
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.layers,
            )
            x, caches = scanned(self.spec, std, train, name="blocks")(x, caches, mask, rotation)
        else:
            after = []
            for i in range(self.layers):
                cache = None if caches is None else caches[i]
                x, cache = block(self.spec, std, train, name=f"block_{i}")(x, cache, mask, rotation)
                after.append(cache)
            caches = None if caches is None else tuple(after)
        return (Norm(self.spec, name="final_norm")(x) if self.spec.norm_position == "pre" else x), caches

    def init_caches(self, batch: int, length: int) -> Caches:
        """Empty caches for `length` positions."""
        shape, dtype = (batch, length, self.spec.groups, self.spec.key_size), self.spec.compute_dtype
        if self.layer_loop == "scan":
            zeros = jnp.zeros((self.layers, *shape), dtype)
            return Cache(zeros, zeros)
        return (Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),) * self.layers

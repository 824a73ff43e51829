"""Blocks on top of each other, unrolled or scanned. B batch, T length, S cache length, D width, L layers."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.errors import UserError
from tfm_jax.nn import pipeline as pipelines
from tfm_jax.nn.attention import Attention, Cache, Context
from tfm_jax.nn.block import Block, LayerCache
from tfm_jax.nn.capture import AUXILIARY, LOOKED, SAID, say
from tfm_jax.nn.linear import Norm
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.remat import Remat
from tfm_jax.nn.remat import policy as remat_policy
from tfm_jax.nn.ring import balanced, parts, restored
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import constrain

LayerLoop = Literal["loop", "scan"]
# A tuple of L layers' caches when unrolled, one cache with a leading layer axis when scanned.
Caches = tuple[LayerCache, ...] | LayerCache


class Stack(nn.Module):
    """`layers` blocks, then a norm if they normalise their inputs.

    Attributes:
      layers: L.
      layer_loop: `loop` unrolls, parameters under `block_0`, `block_1`, ...: fastest to run. `scan` compiles one
        block, parameters under `blocks` with a leading layer axis: fastest to compile, and fewest arrays.
      remat: `none` keeps activations, `full` recomputes the block in the backward pass, `dots` keeps products with
        weights, `dots_batched` keeps the attention scores' products too; `(regex, "save" | "offload")` pairs keep activations
        by name, here or in the host's memory, and compute the rest again: see `nn.remat`.
      pipeline: see `nn.pipeline`, for scanned layers; how the same parameters are run, without which they are on one stage.
      sharing: `none`, or `all` layers are one block, under `shared_block` (Lan et al. 2020).
      attention: the module of self attention.
    """

    spec: BlockSpec
    layers: int
    layer_loop: LayerLoop = "loop"
    remat: Remat = "none"
    pipeline: Pipeline | None = None
    sharing: Literal["none", "all"] = "none"
    attention: type[Any] = Attention

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, caches: Caches | None = None, *, train: bool
    ) -> tuple[jax.Array, Caches | None]:
        """(B, T, D) to (B, T, D), with the caches as they are after these T positions.

        Where the collection `intermediates` is mutable it gets `inputs` (B, T, D), and of each block `states` (B, T, D), what
        it returns, and of `Attention` its `scores` (B, H, T, S) float32, before softmax and 0 where masked.
        """
        say(self, "inputs", x)
        x, context = self._balanced(x, context, caches)
        block: Any = Block
        if self.remat != "none":
            # Inside a scan the barrier against common-subexpression elimination only costs time.
            block = nn.remat(Block, policy=remat_policy(self.remat), prevent_cse=self.layer_loop == "loop")

        def make(name: str, block: Any = block) -> Any:
            return block(self.spec, self.layers, train, self.attention, name=name)

        shared = self.sharing == "all"
        if self.pipeline is not None and not self.is_initializing():
            if caches is not None:
                raise UserError("mesh.stage: there is no decoding on stages. Use a mesh without them: mesh.stage=1.")
            x = self._on_stages(block, x, context, self.pipeline, train)
        elif self.layer_loop == "scan":
            scanned = nn.scan(
                block,
                variable_axes={SAID: 0, LOOKED: 0, AUXILIARY: 0} | ({} if shared else {"params": 0}),
                variable_broadcast="params" if shared else False,
                split_rngs={"params": not shared, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=self.layers,
            )
            x, caches = make("shared_block" if shared else "blocks", scanned)(x, caches, context)
        else:
            after = []
            one = make("shared_block") if shared else None
            for i in range(self.layers):
                layer = make(f"block_{i}") if one is None else one
                x, cache = layer(x, None if caches is None else caches[i], context)
                after.append(cache)
            caches = None if caches is None else tuple(after)  # type: ignore[arg-type]
        x = constrain(restored(x), ("rows", "length", "embed"))
        return (Norm(self.spec, name="final_norm")(x) if self.spec.norm_position == "pre" else x), caches

    def _balanced(self, x: jax.Array, context: Context, caches: Caches | None) -> tuple[jax.Array, Context]:
        """What the blocks are given where the mesh splits the length: positions in the order of `nn.ring`."""
        split = parts(x.shape[1])
        if split == 1:
            return x, context
        why = f"mesh.context={split} splits the length of a sequence, and"
        if caches is not None:
            raise UserError(
                f"{why} neither a cache of keys and values (decoding) nor a memory of earlier segments (Transformer-XL) is split with"
                " it. Use mesh.fsdp or mesh.tensor."
            )
        if self.attention is not Attention:
            raise UserError(
                f"{why} {self.attention.__name__} finds keys by their place in the whole of it. Use mesh.fsdp or mesh.tensor."
            )

        def mask(mask: Mask) -> Mask:
            by_position = {name: a for name, a in mask.arrays().items() if a is not None and a.ndim == 2}
            return dataclasses.replace(mask, **jax.tree.map(balanced, by_position))

        shared, source = jax.tree.map(balanced, (context.shared, context.source))
        return balanced(x), Context(mask(context.mask), shared, source, mask(context.source_mask))

    def _on_stages(self, block: Any, x: jax.Array, context: Context, pipeline: Pipeline, train: bool) -> jax.Array:
        listened = [name for name in (SAID, AUXILIARY) if self.is_mutable_collection(name)]
        one = block(self.spec, self.layers, train, self.attention, parent=None)

        def layer(params: Any, x: jax.Array, context: Context, key: jax.Array | None) -> tuple[jax.Array, Any]:
            rngs = None if key is None else {"dropout": key}
            (x, _), said = one.apply({"params": params}, x, None, context, rngs=rngs, mutable=listened)
            return x, said

        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        params = self.get_variable("params", "blocks")
        x, said = pipelines.run(layer, params, x, context, key, pipeline)
        if SAID in said:
            self.put_variable(SAID, "blocks", jax.tree.map(jax.vmap(pipelines.joined, 1), said[SAID]))
        if AUXILIARY in said:
            means = jax.tree.map(lambda a: jnp.mean(a, axis=0), said[AUXILIARY])
            self.put_variable(AUXILIARY, "blocks", means)
        return x

    def init_caches(self, batch: int, length: int) -> Caches:
        """Empty caches for `length` positions."""
        shape, dtype = (batch, length, self.spec.groups, self.spec.key_size), self.spec.compute_dtype
        if self.layer_loop == "scan":
            zeros = jnp.zeros((self.layers, *shape), dtype)
            return LayerCache(Cache(zeros, zeros))
        return (LayerCache(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))),) * self.layers

"""One Transformer block: attention and MLP around a residual stream. B batch, T length, D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from tfm_jax.nn import moe
from tfm_jax.nn.attention import Attention, Cache, Context, CrossAttention, dense
from tfm_jax.nn.capture import say
from tfm_jax.nn.linear import ACTIVATIONS, Norm
from tfm_jax.nn.moe import MoE
from tfm_jax.nn.ring import restored
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

# Column-parallel into a sublayer, row-parallel out of it (Shoeybi et al. 2019), so each needs one reduction.
RULES: tuple[Rule, ...] = (
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"attention/(query|key|value)/bias$", ("tensor",)),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
    (r"mlp/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/(up|gate)/bias$", ("tensor",)),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
    (r"(norm|out|down)/(scale|bias)$", (None,)),
    *moe.RULES,
)


class MLP(nn.Module):
    """`plain`: down(act(up(x))); `gated`: down(act(gate(x)) * up(x))."""

    spec: BlockSpec
    layers: int
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, width = self.spec, x.shape[-1]
        activation = ACTIVATIONS[spec.activation]
        up = dense(spec, spec.hidden, "other", width, self.layers, "up")(x)
        if spec.mlp == "gated":
            hidden = activation(dense(spec, spec.hidden, "other", width, self.layers, "gate")(x)) * up
        else:
            hidden = activation(up)
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        if spec.mlp_dropout:
            hidden = nn.Dropout(spec.mlp_dropout, deterministic=not self.train)(hidden)
        return dense(spec, width, "residual", spec.hidden, self.layers, "down")(hidden)


class LayerCache(NamedTuple):
    """What a layer keeps between decoding steps: its own keys and values, and those of the encoder's states."""

    own: Any
    cross: Cache | None = None


class Block(nn.Module):
    """Attention, attention to an encoder's states where there are any, MLP; each `pre`: x + f(norm(x)) or `post`:
    norm(x + f(x)). The MLP is a mixture of experts where the spec has any.

    Attributes:
      layers: of the stack, for the initialisation.
      attention: the module of self attention, called as `Attention` is.
    """

    spec: BlockSpec
    layers: int
    train: bool
    attention: type[Any] = Attention

    @nn.compact
    def __call__(self, x: jax.Array, cache: LayerCache | None, context: Context) -> tuple[jax.Array, LayerCache | None]:
        """(B, T, D) and this layer's cache to the same, for `lax.scan` to carry."""
        spec = self.spec
        pre = spec.norm_position == "pre"

        def around(x: jax.Array, sublayer: Callable[[jax.Array], tuple[jax.Array, Any]], name: str) -> Any:
            norm = Norm(spec, name=name)
            y, kept = sublayer(norm(x) if pre else x)
            if spec.dropout:
                y = nn.Dropout(spec.dropout, deterministic=not self.train)(y)
            x = checkpoint_name(x + y, f"{name.removesuffix('_norm')}/residual")
            return constrain(x if pre else norm(x), ("batch", "length", "embed")), kept

        own, cross = (None, None) if cache is None else cache
        attend = self.attention(spec, self.layers, self.train, name="attention")
        x, own = around(x, lambda y: attend(y, context, own), "attention_norm")
        if context.source is not None or cross is not None:
            look = CrossAttention(spec, self.layers, self.train, name="cross_attention")
            x, cross = around(x, lambda y: look(y, context, cross), "cross_attention_norm")
        mlp = (MoE if spec.experts else MLP)(spec, self.layers, self.train, name="mlp")
        x, _ = around(x, lambda y: (mlp(y), None), "mlp_norm")
        say(self, "states", lambda: restored(x))
        return x, None if cache is None else LayerCache(own, cross)

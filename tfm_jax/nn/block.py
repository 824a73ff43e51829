"""One Transformer block: attention and MLP around a residual stream. B batch, T length, D width."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

from tfm_jax.nn.attention import Attention, Cache
from tfm_jax.nn.linear import Dense, Norm
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import Rotation
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

# Column-parallel into a sublayer, row-parallel out of it (Shoeybi et al. 2019), so each needs one reduction.
RULES: tuple[Rule, ...] = (
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor")),
    (r"attention/(query|key|value)/bias$", ("tensor",)),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
    (r"mlp/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/(up|gate)/bias$", ("tensor",)),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
    (r"(norm|out|down)/(scale|bias)$", (None,)),
)


class MLP(nn.Module):
    """`plain`: down(act(up(x))); `gated`: down(act(gate(x)) * up(x))."""

    spec: BlockSpec
    out_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        activation = ACTIVATIONS[spec.activation]

        def dense(features: int, std: float, name: str) -> Dense:
            return Dense(features, spec.bias, spec.compute_dtype, nn.initializers.normal(std), name=name)

        up = dense(spec.hidden, spec.init_std, "up")(x)
        if spec.mlp == "gated":
            hidden = activation(dense(spec.hidden, spec.init_std, "gate")(x)) * up
        else:
            hidden = activation(up)
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        return dense(x.shape[-1], self.out_std, "down")(hidden)


class Block(nn.Module):
    """Attention, then MLP; `pre`: x + f(norm(x)), `post`: norm(x + f(x))."""

    spec: BlockSpec
    out_std: float
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, mask: Mask, rotation: Rotation | None
    ) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) and this layer's cache to the same, for `lax.scan` to carry."""
        spec = self.spec
        pre = spec.norm_position == "pre"

        def add(x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
            if spec.dropout:
                y = nn.Dropout(spec.dropout, deterministic=not self.train)(y)
            x = x + y
            return constrain(x if pre else norm(x), ("batch", "length", "embed"))

        attention_norm, mlp_norm = Norm(spec, name="attention_norm"), Norm(spec, name="mlp_norm")
        attend = Attention(spec, self.out_std, self.train, name="attention")
        y, cache = attend(attention_norm(x) if pre else x, mask, rotation, cache)
        x = add(x, y, attention_norm)
        y = MLP(spec, self.out_std, name="mlp")(mlp_norm(x) if pre else x)
        return add(x, y, mlp_norm), cache

"""What stands on an encoder's states. B batch, T length, D width, E width of the token table, V vocabulary."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.nn.block import ACTIVATIONS
from tfm_jax.nn.linear import Dense, Norm, matmul
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain

RULES: tuple[Rule, ...] = (
    (r"token_head/(transform/kernel|transform/bias|bias)$", (None,)),
    (r"(pooler|pair_head)/dense/kernel$", ("fsdp", None)),
    (r"(pooler|pair_head)/dense/bias$", (None,)),
)


def unembed(hidden: jax.Array, unembedding: jax.Array) -> dict[str, Any]:
    """The outputs that losses over a vocabulary read: `hidden`, `unembedding` and their product `logits` in float32."""
    logits = matmul(hidden, unembedding.astype(hidden.dtype).T).astype(jnp.float32)
    return {"hidden": hidden, "unembedding": unembedding, "logits": constrain(logits, ("batch", "length", "vocab"))}


def with_bias(hidden: jax.Array, unembedding: jax.Array, bias_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same product with a bias: a column of ones beside the states, and the bias beside the table."""
    ones = jnp.ones((*hidden.shape[:-1], 1), hidden.dtype)
    return jnp.concatenate([hidden, ones], axis=-1), jnp.concatenate([unembedding, bias_V[:, None]], axis=-1)


class TokenHead(nn.Module):
    """Masked-token prediction: norm(act(x W + b)) times the token table, plus a bias (Devlin et al. 2019)."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array, table_VE: jax.Array) -> dict[str, Any]:
        """(B, T, D) states to `hidden` (B, T, E + 1), `unembedding` (V, E + 1) and `logits` (B, T, V) float32."""
        spec = self.spec
        init = nn.initializers.normal(spec.init_std)
        x = Dense(table_VE.shape[1], spec.bias, spec.compute_dtype, init, name="transform")(x)
        x = Norm(spec, name="norm")(ACTIVATIONS[spec.activation](x))
        bias = self.param("bias", nn.initializers.zeros_init(), (table_VE.shape[0],), jnp.float32)
        return unembed(*with_bias(x, table_VE, bias))


class Pooler(nn.Module):
    """tanh(W x + b) of the first position, (B, D)."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.spec.init_std)
        return jnp.tanh(Dense(x.shape[-1], "all", self.spec.compute_dtype, init, name="dense")(x[:, 0]))


class Classifier(nn.Module):
    """A linear layer to the logits of a few classes, in float32."""

    spec: BlockSpec
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.spec.init_std)
        return Dense(self.classes, "all", self.spec.compute_dtype, init, name="dense")(x).astype(jnp.float32)

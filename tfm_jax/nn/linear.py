"""Matrix products and norms. B batch, T length, D input width, F output width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import constrain, merged

Init = Callable[..., jax.Array]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def matmul(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """`x @ kernel` over the last dimension, (..., D) x (D, F) -> (..., F).

    Leading dimensions are merged first: with them apart, XLA's CPU backend transposes the kernel's gradient, and a
    whole train step takes 1.1 to 1.4 times as long (`experiments/benchmark.py` has the shapes).
    """
    rows = merged(x)
    y = jax.lax.dot_general(rows, kernel_DF, (((rows.ndim - 1,), (0,)), ((), ())))
    return y.reshape(*x.shape[:-1], kernel_DF.shape[-1])


class Dense(nn.Module):
    """`x W + b` in `dtype`, with float32 parameters `kernel` (D, F) and, if asked for, `bias` (F,)."""

    features: int
    bias: str
    dtype: jnp.dtype
    kernel_init: Init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.bias == "all":
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class Norm(nn.Module):
    """Layer norm or RMS norm over the last dimension, computed in float32, returned in the compute dtype."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, shape = self.spec, (1,) * (x.ndim - 1) + (-1,)
        y = x.astype(jnp.float32)
        if spec.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + spec.norm_eps)
        y = y * self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32).reshape(shape)
        if spec.norm == "layer" and spec.bias == "all":
            y = y + self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32).reshape(shape)
        return y.astype(spec.compute_dtype)


class HeadNorm(nn.Module):
    """RMS norm of each head's vector, with one scale (K,) for all heads."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x_BTHK.shape[-1],), jnp.float32)
        y = x_BTHK.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.spec.norm_eps)
        return (y * scale[None, None, None]).astype(x_BTHK.dtype)


class Embedding(nn.Module):
    """A table (V, D) in float32, looked up in `dtype`."""

    entries: int
    width: int
    dtype: Any
    init_std: float

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", nn.initializers.normal(self.init_std), (self.entries, self.width), jnp.float32
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        # Gathering rows of a table whose width is split too has no efficient program: bring the width together first.
        table = constrain(self.embedding, ("vocab", None))
        return jnp.take(table, ids, axis=0).astype(self.dtype)

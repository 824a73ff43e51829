"""Matrix products and norms. B batch, T length, D input width, F output width."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import constrain, merged

Init = Callable[..., jax.Array]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def matmul(
    x: jax.Array,
    kernel_DF: jax.Array,
    gradient_dtype: jnp.dtype | None = None,
    operand_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`x @ kernel` over the last dimension, (..., D) x (D, F) -> (..., F), in the dtype of x.

    Leading dimensions are merged first: with them apart, XLA's CPU backend transposes the kernel's gradient, and a whole train
    step takes 1.1 to 1.4 times as long (`experiments/benchmark.py` has the shapes). Of other operands it is the merged one for
    which that backend has no fast product.

    Args:
      gradient_dtype: in which the product for the kernel's gradient is given, and so summed over devices; that of x if None.
      operand_dtype: what this product and its gradients' take their operands in, where sums and results stay as they are; that
        of x if None.
    """
    operands, gradient = operand_dtype or x.dtype, gradient_dtype or x.dtype
    rows = merged(x) if operands == x.dtype else x
    if operands == gradient == x.dtype:
        y = _dot(rows, kernel_DF.astype(x.dtype), [rows.ndim - 1], [0])
    else:
        y = _mixed(rows, kernel_DF, operands, gradient)
    return y.reshape(*x.shape[:-1], kernel_DF.shape[-1])


def _dot(
    a: jax.Array, b: jax.Array, of_a: Sequence[int], of_b: Sequence[int], dtype: jnp.dtype | None = None
) -> jax.Array:
    # By this name, and not as `jax.lax.dot`, quantisation finds it: `train.quantize`.
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mixed(x: jax.Array, kernel_DF: jax.Array, operands: jnp.dtype, gradient: jnp.dtype) -> jax.Array:
    return _mixed_forward(x, kernel_DF, operands, gradient)[0]


def _mixed_forward(
    x: jax.Array, kernel_DF: jax.Array, operands: jnp.dtype, gradient: jnp.dtype
) -> tuple[jax.Array, Any]:
    given = x.astype(operands)
    return _dot(given, kernel_DF.astype(operands), [x.ndim - 1], [0], x.dtype), (given, kernel_DF)


def _mixed_backward(operands: jnp.dtype, gradient: jnp.dtype, kept: Any, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_DF = kept
    rows, given = range(x.ndim - 1), d_y.astype(operands)
    d_kernel = _dot(x, given, rows, rows, gradient)
    return _dot(given, kernel_DF.astype(operands), [x.ndim - 1], [1], d_y.dtype), d_kernel.astype(kernel_DF.dtype)


_mixed.defvjp(_mixed_forward, _mixed_backward)


class Dense(nn.Module):
    """`x W + b` in `dtype`, with float32 parameters `kernel` (D, F) and, if asked for, `bias` (F,).

    The output's name is the module's and that of the one around it: see `nn.remat`.
    """

    features: int
    bias: str
    dtype: jnp.dtype
    kernel_init: Init
    gradient_dtype: jnp.dtype | None = None
    operand_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = matmul(x.astype(self.dtype), kernel, self.gradient_dtype, self.operand_dtype)
        if self.bias == "all":
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return checkpoint_name(y, "/".join(self.path[-2:]))


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

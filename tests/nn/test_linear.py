"""Dense, norms and embeddings against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.nn.linear import Dense, Embedding, Norm, matmul
from tfm_jax.nn.spec import BlockSpec

B, T, D, F = 2, 5, 8, 6
X = jax.random.normal(jax.random.key(0), (B, T, D)) * 3 + 1
NORMAL = jax.nn.initializers.normal(0.5)


@pytest.mark.parametrize("shape", [(D,), (T, D), (B, T, D), (B, T, 2, D)])
def test_matmul_over_merged_dimensions_is_the_einsum(shape):
    x, kernel = jax.random.normal(jax.random.key(1), shape), jax.random.normal(jax.random.key(2), (D, F))
    both = [
        jax.value_and_grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, kernel)
        for f in (matmul, lambda x, w: jnp.einsum("...d,df->...f", x, w))
    ]
    assert matmul(x, kernel).shape == (*shape[:-1], F)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both)


@pytest.mark.parametrize("bias", ["all", "none"])
def test_dense(bias):
    dense = Dense(F, bias, jnp.dtype("float32"), NORMAL)
    params = dense.init(jax.random.key(3), X)["params"]
    assert set(params) == ({"kernel", "bias"} if bias == "all" else {"kernel"})
    params = jax.tree.map(lambda p: p + 0.25, params)
    want = np.einsum("btd,df->btf", X, params["kernel"]) + np.asarray(params.get("bias", np.zeros(F)))
    np.testing.assert_allclose(dense.apply({"params": params}, X), want, rtol=1e-5, atol=1e-5)


def test_gradients_of_kernels_in_float32():
    """The exact product of bfloat16 numbers, where bfloat16 leaves three digits; nothing else changes."""
    x, out = (jax.random.normal(jax.random.key(i), (512, n)).astype(jnp.bfloat16) for i, n in ((4, D), (5, F)))
    kernel = jax.random.normal(jax.random.key(6), (D, F))

    def gradients(dtype):
        both = jax.value_and_grad(lambda x, w: jnp.sum((matmul(x, w, dtype) * out).astype(jnp.float32)), argnums=(0, 1))
        program = jax.make_jaxpr(both)(x, kernel)
        products = {e.outvars[0].aval.str_short() for e in program.eqns if e.primitive.name == "dot_general"}
        return (*both(x, kernel), products)

    value, (d_x, d_kernel), products = gradients(None)
    wide_value, (wide_d_x, wide_d_kernel), wide_products = gradients(jnp.dtype("float32"))
    exact = np.asarray(x, np.float64).T @ np.asarray(out, np.float64)
    np.testing.assert_allclose(wide_d_kernel, exact, rtol=1e-4, atol=1e-3)
    assert np.max(np.abs(d_kernel - exact)) > 20 * np.max(np.abs(wide_d_kernel - exact))
    assert value == wide_value and np.array_equal(d_x, wide_d_x) and wide_d_x.dtype == jnp.bfloat16
    # What devices add up is what this product gives.
    assert f"float32[{D},{F}]" in wide_products and not any(p.startswith("float32") for p in products)


def test_products_of_bfloat16_in_a_float32_model():
    """Exact products of rounded operands, forward and for both gradients; what stays as it was is told by the dtypes."""
    narrow = jnp.dtype("bfloat16")
    x, out = (jax.random.normal(jax.random.key(i), (4, 128, n)) for i, n in ((4, D), (5, F)))
    kernel = jax.random.normal(jax.random.key(6), (D, F))

    def both(x, w):
        return jax.value_and_grad(lambda x, w: jnp.sum(matmul(x, w, None, narrow) * out), argnums=(0, 1))(x, w)

    def rounded(a):
        return np.asarray(a.astype(narrow), np.float64)

    y, (d_x, d_kernel) = matmul(x, kernel, None, narrow), both(x, kernel)[1]
    assert (y.dtype, d_x.dtype, d_kernel.dtype) == (jnp.float32,) * 3
    np.testing.assert_allclose(y, rounded(x) @ rounded(kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, rounded(out) @ rounded(kernel).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_kernel, np.einsum("btd,btf->df", rounded(x), rounded(out)), rtol=1e-5, atol=1e-4)
    program = str(jax.make_jaxpr(both)(x, kernel))
    assert program.count("dot_general") == 3 == program.count("preferred_element_type=float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_computes_in_its_dtype_and_keeps_float32_parameters(dtype):
    dense = Dense(F, "all", jnp.dtype(dtype), NORMAL)
    params = dense.init(jax.random.key(3), X)["params"]
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert dense.apply({"params": params}, X).dtype == dtype


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("bias", ["all", "none"])
def test_norm(norm, bias):
    module = Norm(BlockSpec(norm=norm, bias=bias, norm_eps=1e-3))
    params = module.init(jax.random.key(4), X)["params"]
    assert set(params) == ({"scale", "bias"} if (norm, bias) == ("layer", "all") else {"scale"})
    params = {name: jax.random.normal(jax.random.key(5 + i), (D,)) for i, name in enumerate(params)}
    x = np.asarray(X, np.float64)
    centred = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * np.asarray(params["scale"])
    want = want + np.asarray(params.get("bias", np.zeros(D)))
    np.testing.assert_allclose(module.apply({"params": params}, X), want, rtol=1e-5, atol=1e-5)


def test_norm_computes_in_float32_and_returns_the_compute_dtype():
    module = Norm(BlockSpec(norm="rms", dtype="bfloat16"))
    # The squares of these overflow float16 and lose everything but one digit in bfloat16.
    x = (X * 300).astype(jnp.bfloat16)
    out = module.apply(module.init(jax.random.key(0), x), x)
    exact = np.asarray(x, np.float64)
    want = exact / np.sqrt((exact**2).mean(-1, keepdims=True))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=2**-8)


def test_embedding_looks_rows_up_in_its_dtype():
    module = Embedding(11, D, jnp.dtype("bfloat16"), 0.02)
    ids = jnp.array([[0, 10, 3], [3, 3, 1]], jnp.int32)
    variables = module.init(jax.random.key(6), ids)
    table = variables["params"]["embedding"]
    out = module.apply(variables, ids)
    assert table.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, table[ids].astype(jnp.bfloat16))

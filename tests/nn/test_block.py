"""One block: the order of its parts, its activations, and dropout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tfm_jax.nn.attention import Attention, Context
from tfm_jax.nn.block import ACTIVATIONS, MLP, RULES, Block
from tfm_jax.nn.linear import Norm
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten

B, T, D = 2, 5, 16
X = jax.random.normal(jax.random.key(0), (B, T, D))
CAUSAL = Context(Mask(causal=True))
SLOW = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x > 0, x, 0),
}


def made(spec: BlockSpec, train: bool = False):
    block = Block(spec, 1, train)
    variables = jax.jit(lambda keys: block.init(keys, X, None, CAUSAL))(
        {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    )
    return block, variables


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-4, 4, 41)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), SLOW[name](x), atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_mlp_against_numpy(kind):
    mlp = MLP(
        BlockSpec(width=D, mlp_width=24, mlp=kind, activation="silu", bias="none", init="normal", init_std=0.5), 1
    )
    params = mlp.init(jax.random.key(3), X)["params"]
    x, w = np.asarray(X, np.float64), {name: np.asarray(p["kernel"], np.float64) for name, p in params.items()}
    assert set(w) == {"up", "down"} | ({"gate"} if kind == "gated" else set())
    hidden = SLOW["silu"](x @ w["gate"]) * (x @ w["up"]) if kind == "gated" else SLOW["silu"](x @ w["up"])
    np.testing.assert_allclose(mlp.apply({"params": params}, X), hidden @ w["down"], atol=1e-4)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_residuals_and_norms(position):
    spec = BlockSpec(width=D, heads=2, norm_position=position, init="normal", init_std=0.3)
    block, variables = made(spec)
    params = jax.tree.map(lambda p: p + 0.1, variables["params"])

    def norm(name: str, x: jax.Array) -> jax.Array:
        return Norm(spec).apply({"params": params[name]}, x)

    def attend(x: jax.Array) -> jax.Array:
        return Attention(spec, 1, False).apply({"params": params["attention"]}, x, CAUSAL, None)[0]

    def mlp(x: jax.Array) -> jax.Array:
        return MLP(spec, 1).apply({"params": params["mlp"]}, x)

    if position == "pre":
        h = X + attend(norm("attention_norm", X))
        want = h + mlp(norm("mlp_norm", h))
    else:
        h = norm("attention_norm", X + attend(X))
        want = norm("mlp_norm", h + mlp(h))
    np.testing.assert_allclose(block.apply({"params": params}, X, None, CAUSAL)[0], want, atol=1e-5)


@pytest.mark.parametrize("fields", [dict(dropout=0.5), dict(mlp_dropout=0.5), dict(attention_dropout=0.5)])
def test_dropout_only_when_training(fields):
    spec = BlockSpec(width=D, heads=2, init="normal", init_std=0.3, **fields)
    training, variables = made(spec, train=True)
    plain = Block(BlockSpec(width=D, heads=2, init="normal", init_std=0.3), 1, True)
    want = plain.apply(variables, X, None, CAUSAL)[0]
    # At train=False no rng is asked for.
    np.testing.assert_allclose(Block(spec, 1, False).apply(variables, X, None, CAUSAL)[0], want, atol=1e-6)

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        return training.apply(variables, X, None, CAUSAL, rngs={"dropout": key})[0]

    assert not np.allclose(run(jax.random.key(0)), want, atol=1e-3)
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)), atol=1e-3)
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))


def test_dropout_keeps_the_mean():
    """With a residual branch of one dropout, the mean over masks is the output without dropout."""
    spec = BlockSpec(width=D, heads=1, attention_dropout=0.3, init="normal", init_std=0.3)
    training, variables = made(spec, train=True)
    # An MLP that adds nothing leaves x + attention(x), which is linear in the dropped weights.
    variables["params"]["mlp"]["down"] = jax.tree.map(jnp.zeros_like, variables["params"]["mlp"]["down"])
    want = Block(spec, 1, False).apply(variables, X, None, CAUSAL)[0]

    @jax.jit
    @jax.vmap
    def run(key: jax.Array) -> jax.Array:
        return training.apply(variables, X, None, CAUSAL, rngs={"dropout": key})[0]

    runs = run(jax.random.split(jax.random.key(4), 4000))
    error = np.std(runs, axis=0) / np.sqrt(len(runs))
    assert np.max(np.abs(np.mean(runs, axis=0) - want) / (error + 1e-6)) < 5
    # The first query sees one key: it is kept and scaled up, or dropped.
    branch = np.asarray((runs - X[None])[:, 0, 0]) / np.asarray((want - X)[0, 0])
    np.testing.assert_allclose(np.where(branch > 0.5, 1 / 0.7, 0), branch, atol=1e-3)
    assert abs(np.mean(branch[:, 0] > 0.5) - 0.7) < 0.05


def test_bfloat16_computes_so_and_keeps_float32_parameters():
    block, variables = made(BlockSpec(width=D, heads=2, dtype="bfloat16"))
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert block.apply(variables, X.astype(jnp.bfloat16), None, CAUSAL)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("mlp", ["plain", "gated"])
def test_every_parameter_has_a_rule_of_its_rank(mlp):
    _, variables = made(BlockSpec(width=D, heads=2, mlp=mlp))
    for path, x in flatten(variables["params"]).items():
        dims = next((dims for pattern, dims in RULES if re.search(pattern, path)), None)
        assert dims is not None and len(dims) == x.ndim, path

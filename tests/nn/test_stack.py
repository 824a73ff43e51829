"""Loop, scan and every remat policy are the same function; each policy recomputes what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.nn.attention import Context
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import Rope, rotation
from tfm_jax.nn.remat import POLICIES
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import Stack

B, T, D, L = 2, 6, 16, 3
SPEC = BlockSpec(width=D, heads=4, kv_heads=2, init_std=0.3)
X = jax.random.normal(jax.random.key(0), (B, T, D))
PLACES = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
TURN = rotation(PLACES, SPEC.key_size, Rope(100.0))


def stacked(params):
    """The loop's parameters as the scan's: every block's arrays on a leading layer axis."""
    blocks = [params[f"block_{i}"] for i in range(L)]
    rest = {name: p for name, p in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}


@functools.cache
def loop_params():
    stack = Stack(SPEC, L)
    params = jax.jit(lambda key: stack.init(key, X, Context(Mask(causal=True), TURN), train=False)["params"])(
        jax.random.key(1)
    )
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda p, key: p + 0.1 * jax.random.normal(key, p.shape), params, keys)


@functools.cache
def value_and_gradients(layer_loop: str, remat: str):
    """Of the loop's parameters; gradients in the scan's layout."""
    stack = Stack(SPEC, L, layer_loop, remat)

    def run(params, x):
        out, caches = stack.apply({"params": params}, x, Context(Mask(causal=True), TURN), train=False)
        assert caches is None
        return jnp.sum(jnp.sin(out)), out

    params = loop_params() if layer_loop == "loop" else stacked(loop_params())
    (_, out), (d_params, d_x) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(params, X)
    return out, d_x, stacked(d_params) if layer_loop == "loop" else d_params


RULES = (("attention/residual", "offload"), ("mixed$|mlp/up", "save"))


@pytest.mark.parametrize("remat", ["none", *POLICIES, RULES], ids=str)
@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_every_combination_is_the_plain_loop(layer_loop, remat):
    got, want = value_and_gradients(layer_loop, remat), value_and_gradients("loop", "none")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_policies_keep_ever_less(layer_loop):
    """The number of products in the whole gradient tells what the backward pass computes again."""

    def products(remat: str) -> int:
        stack = Stack(SPEC, L, layer_loop, remat)
        params = loop_params() if layer_loop == "loop" else stacked(loop_params())

        def loss(params):
            return jnp.sum(stack.apply({"params": params}, X, Context(Mask(causal=True), TURN), train=False)[0])

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general")

    count = {remat: products(remat) for remat in ("none", *POLICIES)}
    assert count["none"] == count["dots_batched"] < count["dots"] < count["full"]


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_every_layer_draws_its_own_dropout(layer_loop):
    """Each block adds dropout(1) to zeros, so an element counts the layers that kept it: shared masks give 0 or L."""
    stack = Stack(BlockSpec(width=D, heads=4, dropout=0.5), L, layer_loop)

    @jax.jit
    def run(key):
        variables = stack.init(key, X, Context(Mask(causal=True)), train=False)

        def set_biases(path, p):
            return jnp.full(
                p.shape, float("down" in str(path) and "bias" in str(path)) if "scale" not in str(path) else 1.0
            )

        params = jax.tree_util.tree_map_with_path(set_biases, variables["params"])
        return stack.apply({"params": params}, 0 * X, Context(Mask(causal=True)), train=True, rngs={"dropout": key})[0]

    distinct = [len(np.unique(np.round(row, 3))) for row in np.asarray(run(jax.random.key(5))).reshape(-1, D)]
    assert max(distinct) > 2
    assert not np.allclose(run(jax.random.key(5)), run(jax.random.key(6)))


def test_residual_projections_start_smaller():
    spec = BlockSpec(width=128, heads=4)
    stack = Stack(spec, 8, "scan")
    init = jax.jit(lambda key: stack.init(key, jnp.ones((1, 2, 128)), Context(Mask(causal=True)), train=False))
    blocks = init(jax.random.key(7))["params"]["blocks"]
    up = blocks["mlp"]["up"]["kernel"]
    assert up.shape == (8, 128, 512) and not np.allclose(up[0], up[1])
    std = {name: float(jnp.std(p["kernel"])) for name, p in (blocks["attention"] | blocks["mlp"]).items()}
    np.testing.assert_allclose([std["query"], std["up"]], 0.02, rtol=0.02)
    np.testing.assert_allclose([std["out"], std["down"]], 0.02 / np.sqrt(2 * 8), rtol=0.02)


def test_post_norm_has_no_final_norm():
    post = BlockSpec(width=D, heads=4, norm_position="post")
    shapes = jax.eval_shape(lambda: Stack(post, 1).init(jax.random.key(0), X, Context(Mask(causal=True)), train=False))
    assert set(shapes["params"]) == {"block_0"}
    assert set(loop_params()) == {"block_0", "block_1", "block_2", "final_norm"}


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_caches_a_position_at_a_time(layer_loop):
    stack = Stack(SPEC, L, layer_loop)
    params = loop_params() if layer_loop == "loop" else stacked(loop_params())
    caches = stack.init_caches(B, T + 1)
    assert {x.shape for x in jax.tree.leaves(caches)} == {
        (B, T + 1, 2, 4) if layer_loop == "loop" else (L, B, T + 1, 2, 4)
    }

    @jax.jit
    def step(x, at, caches):
        mask = Mask(causal=True, query_positions=at)
        return stack.apply(
            {"params": params}, x, Context(mask, rotation(at, SPEC.key_size, Rope(100.0))), caches, train=False
        )

    out = []
    for t in range(T):
        x, caches = step(X[:, t : t + 1], PLACES[:, t : t + 1], caches)
        out.append(x)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), value_and_gradients("loop", "none")[0], atol=1e-4)

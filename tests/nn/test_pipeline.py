"""A pipeline is the scan of the same layers: values, gradients, what blocks say, whatever rows carry along."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.nn.attention import Context
from tfm_jax.nn.capture import collected
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.pipeline import Pipeline
from tfm_jax.nn.positions import Rope, rotation
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import Stack
from tfm_jax.parallel import mesh
from tfm_jax.paths import flatten, map_with_path

B, T, D, L = 8, 6, 16, 4
SPEC = BlockSpec(width=D, heads=4, kv_heads=2, init_std=0.3)
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (B, T, D))
SEGMENTS = jnp.cumsum(jax.random.bernoulli(KEYS[1], 0.3, (B, T)), axis=1, dtype=jnp.int32)
# Every row differs in mask, positions, bias and source.
CONTEXT = Context(
    Mask(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS,
         bias=jax.random.normal(KEYS[2], (1, 4, T, T))),
    rotation(jnp.arange(B)[:, None] + jnp.arange(T)[None], SPEC.key_size, Rope(100.0)),
    source=jax.random.normal(KEYS[3], (B, 5, D)),
    source_mask=Mask(key_valid=jnp.arange(5)[None] < 1 + jnp.arange(B)[:, None] % 5),
)  # fmt: skip


@functools.cache
def params():
    stack = Stack(SPEC, L, "scan")
    return jax.device_get(jax.jit(lambda key: stack.init(key, X, CONTEXT, train=False)["params"])(jax.random.key(1)))


def outcome(pipeline, layout=None, remat="none"):
    """Output, what was said, and gradients by parameters, x, the bias and the source."""
    stack = Stack(SPEC, L, "scan", remat, pipeline)

    def run(params, x, context):
        (out, _), said = stack.apply({"params": params}, x, context, train=False, mutable=["intermediates"])
        return jnp.sum(jnp.sin(out)), (out, said["intermediates"])

    with jax.set_mesh((layout or mesh.make(devices=jax.devices()[:1])).mesh):
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True, allow_int=True))(params(), X, CONTEXT)


@functools.cache
def plain():
    return outcome(None)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if x.dtype != jax.dtypes.float0]


WAYS = {
    "stage 2": (Pipeline(2, 4), dict(stage=2, data=2, fsdp=2), "none"),
    "stage 4": (Pipeline(4, 8), dict(stage=4, data=1, tensor=2), "full"),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_scan(way):
    pipeline, sizes, remat = WAYS[way]
    got, want = outcome(pipeline, mesh.make(**sizes), remat), plain()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert {path.rpartition("/")[2] for path in flatten(want[0][1][1])} == {"inputs", "states", "scores"}
    for a, b in zip(floats(got), floats(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_rows_that_microbatches_do_not_divide():
    """As many as do: two of three rows, and one of one."""
    stack = Stack(SPEC, L, "scan", pipeline=Pipeline(2, 4))
    for rows in (6, 1):
        context = jax.tree.map(lambda a, rows=rows: a[:rows], CONTEXT)
        got = jax.jit(stack.apply, static_argnames="train")({"params": params()}, X[:rows], context, train=False)[0]
        np.testing.assert_allclose(got, plain()[0][1][0][:rows], rtol=1e-4, atol=1e-4)


def test_every_layer_and_microbatch_draws_its_own_dropout():
    """Of a stack that adds dropout(1) to zeros L times, with nothing else in it."""
    spec = BlockSpec(width=64, heads=4, dropout=0.5)
    stack, x = Stack(spec, L, "scan", pipeline=Pipeline(2, 4)), jnp.zeros((B, T, 64))
    shapes = jax.eval_shape(lambda key: stack.init(key, x, Context(Mask()), train=False), jax.random.key(0))["params"]
    ones = {"blocks/mlp/down/bias", "final_norm/bias"}
    blank = map_with_path(lambda path, p: jnp.full(p.shape, float(path in ones or "scale" in path)), shapes)

    @functools.partial(jax.jit, static_argnames="pipeline")
    def drawn(key, pipeline):
        found = stack.clone(pipeline=pipeline).apply(
            {"params": blank}, x, Context(Mask()), train=True, rngs={"dropout": key}, mutable=["intermediates"]
        )[1]["intermediates"]["blocks"]["states"]
        # What each layer has added: 0 or 2.
        return jnp.diff(found, axis=0, prepend=0)

    added = drawn(jax.random.key(1), Pipeline(2, 4))
    assert {*np.unique(added)} == {0.0, 2.0} and abs(np.mean(added) - 1) < 0.02
    masks = {row.tobytes() for row in np.asarray(added).reshape(L * B, -1)}
    assert len(masks) == L * B
    # A function of the key, whatever the number of stages.
    np.testing.assert_array_equal(added, drawn(jax.random.key(1), Pipeline(4, 4)))
    assert not np.array_equal(added, drawn(jax.random.key(2), Pipeline(2, 4)))


def test_losses_of_mixtures_are_means_over_microbatches():
    spec = BlockSpec(width=D, heads=4, experts=4, mlp_width=8, bias="none", router_z=0.1)
    plain = Stack(spec, L, "scan")
    params = jax.jit(lambda key: plain.init(key, X, Context(Mask()), train=False)["params"])(jax.random.key(1))
    params = jax.device_get(params)

    def run(params, x, stack, weight):
        (out, _), said = stack.apply({"params": params}, x, Context(Mask()), train=True, mutable=["auxiliary"])
        assert {x.shape for x in jax.tree.leaves(said)} == {(L,)}
        said = collected(said["auxiliary"])
        return jnp.sum(jnp.sin(out)) + weight * said["loss"], said

    gradient = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=(2, 3))
    parts = [gradient(params, X[m::4], plain, 25.0) for m in range(4)]
    (value, said), grads = jax.tree.map(lambda *x: np.sum(x, axis=0), *parts)
    with jax.set_mesh(mesh.make(data=2, tensor=2, stage=2).mesh):
        got = jax.device_get(gradient(params, X, plain.clone(pipeline=Pipeline(2, 4)), 100.0))
    want = (value, jax.tree.map(lambda x: x / 4, said)), grads
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_a_bubble():
    assert Pipeline(4, 12).bubble == 3 / 15


def test_there_is_no_decoding():
    stack = Stack(SPEC, L, "scan", pipeline=Pipeline(2, 4))
    with pytest.raises(UserError, match=r"mesh\.stage: there is no decoding on stages"):
        stack.apply({"params": params()}, X[:, :1], Context(Mask()), stack.init_caches(B, T), train=False)

"""Attention: every implementation against numpy, values and gradients; and who is chosen."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.nn import attention as module
from tfm_jax.nn import splash
from tfm_jax.nn.attention import Attention, Cache, Context, attention, choose
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import Rope, rotation
from tfm_jax.nn.spec import BlockSpec

# Two blocks of `chunked`, the second one short.
B, T, H, K = 2, 70, 4, 4
VALID = jnp.arange(T)[None] < jnp.array([[T], [41]])
SEGMENTS = jnp.array([[0] * 30 + [1] * 40, [0] * 5 + [1] * 60 + [2] * 5], jnp.int32)
# Name, key heads, key length, mask. In each, every query has at least one key.
CASES = {
    "everything": (H, T, Mask()),
    "causal": (H, T, Mask(causal=True)),
    "window": (H, T, Mask(causal=True, window=9)),
    "key_valid": (2, T, Mask(key_valid=VALID)),
    "segments": (2, T, Mask(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS)),
    "one_key_head": (1, T, Mask(causal=True, key_valid=VALID)),
    "fewer_keys": (2, 33, Mask(causal=True)),
    "more_keys": (2, 90, Mask()),
    "more_keys_causal": (H, 90, Mask(causal=True, window=20)),
    "memory": (2, 90, Mask(causal=True, offset=20)),
    "memory_window": (H, 90, Mask(causal=True, offset=20, window=9)),
    "window_both_ways": (H, 90, Mask(offset=20, window=9)),
    "positions": (2, 90, Mask(causal=True, query_positions=jnp.arange(T)[None] + jnp.array([[0], [19]]))),
}


class Slow:
    """Vaswani et al. 2017, equation 1, a query at a time, and its gradient by hand."""

    def __init__(self, q, k, v, allowed, d_out):
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        self.out, self.d_q, self.d_k, self.d_v = (np.zeros(x.shape) for x in (q, q, k, v))
        for b in range(q.shape[0]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                for t in range(q.shape[1]):
                    seen = np.flatnonzero(allowed[b, t])
                    keys, values = k[b, seen, g], v[b, seen, g]
                    e = np.exp(keys @ q[b, t, h] / np.sqrt(q.shape[3]))
                    p = e / e.sum()
                    self.out[b, t, h] = p @ values
                    d = d_out[b, t, h]
                    d_p = values @ d
                    d_s = p * (d_p - p @ d_p) / np.sqrt(q.shape[3])
                    self.d_q[b, t, h] = d_s @ keys
                    self.d_k[b, seen, g] += d_s[:, None] * q[b, t, h]
                    self.d_v[b, seen, g] += p[:, None] * d


@functools.cache
def inputs(groups: int, length: int):
    shapes = ((B, T, H, K), (B, length, groups, K), (B, length, groups, K), (B, T, H, K))
    return [
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    ]


@functools.cache
def slow(name: str) -> Slow:
    groups, length, mask = CASES[name]
    block = mask.block(slice(0, T), slice(0, length))
    allowed = np.ones((B, T, length), bool) if block is None else np.broadcast_to(block, (B, T, length))
    return Slow(*inputs(groups, length)[:3], allowed, np.asarray(inputs(groups, length)[3]))


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_against_numpy(name, implementation):
    groups, length, mask = CASES[name]
    *qkv, d_out = inputs(groups, length)

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, implementation=implementation), q, k, v)
        return out, *pull(d_out)

    want = slow(name)
    for got, expected in zip(both(*qkv), (want.out, want.d_q, want.d_k, want.d_v), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_same_answer_in_bfloat16_up_to_its_precision():
    groups, length, mask = CASES["segments"]
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(groups, length))
    for implementation in ("xla", "chunked"):
        out = jax.jit(lambda *x, i=implementation: attention(*x, mask, implementation=i))(q, k, v)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), slow("segments").out, atol=0.05)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_a_query_without_keys_is_finite_and_even(implementation):
    q, k, v, _ = inputs(2, T)
    out = attention(q, k, v, Mask(key_valid=jnp.zeros((B, T), bool)), implementation=implementation)
    np.testing.assert_allclose(out[:, 0, 0], jnp.mean(v[:, :, 0], axis=1), atol=1e-5)


def test_chunked_never_touches_the_masked_half():
    """No scores for keys behind a block of queries, nor before its window."""
    q = jax.ShapeDtypeStruct((1, 256, 1, K), jnp.float32)

    def keys(mask: Mask) -> list[int]:
        jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, mask, implementation="chunked"))(q, q, q)
        return [e.outvars[0].aval.shape[-1] for e in jaxpr.eqns if e.primitive.name == "dot_general"][::2]

    assert keys(Mask(causal=True)) == [64, 128, 192, 256]
    assert keys(Mask(causal=True, window=10)) == [64, 73, 73, 73]
    assert keys(Mask()) == [256] * 4
    # Queries that stand behind 100 of the keys.
    assert keys(Mask(causal=True, offset=100)) == [164, 228, 256, 256]
    assert keys(Mask(causal=True, offset=100, window=10)) == [73, 73, 37, 1]


def test_dropout_acts_on_the_weights_of_xla():
    q, k, v, _ = inputs(H, T)
    nothing = attention(q, k, v, Mask(), implementation="xla", dropout=jnp.zeros_like)
    np.testing.assert_array_equal(nothing, jnp.zeros_like(q))


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("chunked", "model.attention='chunked' has no attention dropout. Use 'xla', or attention_dropout=0."),
        ("cudnn", "model.attention='cudnn' has no attention dropout here. Use 'xla', or attention_dropout=0."),
    ],
)
def test_fused_implementations_refuse_dropout(implementation, message):
    q, k, v, _ = inputs(H, T)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        attention(q, k, v, Mask(), implementation=implementation, dropout=lambda x: x)


@pytest.mark.parametrize(
    ("fields", "platform", "message"),
    [
        (dict(attention="chunkd"), "cpu", "model.attention='chunkd' does not exist. Did you mean 'chunked'?"),
        (dict(attention="pallas"), "cpu", "model.attention='pallas' does not exist. Valid: auto, chunked, xla."),
        (
            dict(attention="cudnn", dtype="bfloat16"),
            "cpu",
            "model.attention='cudnn' is not available on cpu. Available here: auto, xla, chunked.",
        ),
        (
            dict(attention="cudnn"),
            "gpu",
            "model.attention='cudnn' needs model.dtype='bfloat16' or 'float16'; it is 'float32'.",
        ),
        (
            dict(attention="chunked", attention_dropout=0.1),
            "cpu",
            "model.attention='chunked' has no attention dropout, but model.attention_dropout=0.1."
            " Use model.attention='xla'.",
        ),
    ],
)
def test_choose_refuses(fields, platform, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        choose(BlockSpec(**fields), platform)


@pytest.mark.parametrize(
    ("fields", "platform", "hopper", "choice"),
    [
        (dict(), "cpu", False, "chunked"),
        (dict(attention_dropout=0.1), "cpu", False, "xla"),
        (dict(dtype="bfloat16"), "gpu", True, "cudnn"),
        (dict(dtype="bfloat16"), "gpu", False, "xla"),
        (dict(dtype="float32"), "gpu", True, "xla"),
        (dict(dtype="bfloat16", attention_dropout=0.1), "gpu", True, "xla"),
        (dict(dtype="bfloat16"), "tpu", False, "splash"),
        (dict(attention="xla"), "cpu", False, "xla"),
        (dict(attention="chunked", dtype="bfloat16"), "gpu", True, "chunked"),
        (dict(attention="cudnn", dtype="bfloat16"), "gpu", False, "cudnn"),
    ],
)
def test_choose(monkeypatch, fields, platform, hopper, choice):
    monkeypatch.setattr(module, "_hopper", lambda: hopper)
    assert choose(BlockSpec(**fields), platform) == choice


def test_auto_leaves_to_the_compiler_what_splash_cannot_do(caplog):
    q = jnp.zeros((B, T, H, K))
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert choose(BlockSpec(), "tpu", unfit=splash.unfit(q, q, Mask())) == "xla"
    assert caplog.messages == ["attention: auto chose xla (splash wants lengths in multiples of 128, and one is 70)."]


def test_auto_says_once_what_it_chose(caplog):
    module._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(2):
            choose(BlockSpec(), "cpu")
        choose(BlockSpec(attention="xla"), "cpu")
    assert caplog.messages == ["attention: auto chose chunked (on CPU it leaves out the masked half)."]


SPEC = BlockSpec(width=16, heads=4, kv_heads=2, init_std=0.3)


def test_the_layer_against_numpy():
    spec = BlockSpec(width=16, heads=4, kv_heads=2, init_std=0.3)
    layer = Attention(spec, 1, train=False)
    x = jax.random.normal(jax.random.key(1), (B, 9, 16))
    params = jax.jit(layer.init)(jax.random.key(2), x, Context(Mask(causal=True)), None)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "query": {"kernel": (16, 16), "bias": (16,)},
        "key": {"kernel": (16, 8), "bias": (8,)},
        "value": {"kernel": (16, 8), "bias": (8,)},
        "out": {"kernel": (16, 16), "bias": (16,)},
    }
    params = jax.tree.map(lambda p: p + 0.05, params)
    out, cache = layer.apply({"params": params}, x, Context(Mask(causal=True)), None)

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    q, k, v = (dense(name, np.asarray(x)).reshape(B, 9, -1, 4) for name in ("query", "key", "value"))
    allowed = np.broadcast_to(np.tri(9, dtype=bool), (B, 9, 9))
    want = dense("out", Slow(q, k, v, allowed, np.zeros(q.shape)).out.reshape(B, 9, 16))
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert cache is None


def test_a_cache_filled_in_two_parts_gives_the_whole():
    layer = Attention(SPEC, 1, train=False)
    x = jax.random.normal(jax.random.key(3), (B, 6, 16))
    places = jnp.broadcast_to(jnp.arange(6)[None], (B, 6))
    turn = rotation(places, 4, Rope(100.0))
    variables = jax.jit(layer.init)(jax.random.key(4), x, Context(Mask(causal=True), turn), None)
    apply = jax.jit(layer.apply)
    whole, _ = apply(variables, x, Context(Mask(causal=True), turn), None)
    cache, parts = Cache(*jnp.zeros((2, B, 8, 2, 4))), []
    for part in (slice(0, 4), slice(4, 6)):
        at = places[:, part]
        mask = Mask(causal=True, query_positions=at)
        out, cache = apply(variables, x[:, part], Context(mask, rotation(at, 4, Rope(100.0))), cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)
    np.testing.assert_array_equal(cache.k[:, 6:], jnp.zeros((B, 2, 2, 4)))

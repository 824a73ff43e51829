"""Windowed and global attention against slow numpy, values and gradients, and a graph that does not grow with length."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.nn.attention import Context
from tfm_jax.nn.longformer import Globals, LongformerAttention, find_globals, from_globals, windowed
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.spec import BlockSpec

B, H, K = 2, 2, 4


class Setting(NamedTuple):
    length: int
    window: int  # on each side
    lengths: tuple[int, ...] = (99, 99)  # valid positions of each row
    globals_: tuple[tuple[int, ...], ...] | None = None
    documents: tuple[int, ...] | None = None  # where a row's second document begins


CASES = {
    "divides": Setting(12, 3),
    "pads": Setting(13, 4),
    "one": Setting(7, 1),
    "short": Setting(5, 8),
    "single": Setting(1, 2),
    "padding": Setting(13, 3, (13, 6)),
    "nothing valid": Setting(9, 2, (9, 0)),
    "globals": Setting(13, 3, globals_=((0, 5, 12), (7,))),
    "globals and padding": Setting(14, 2, (14, 9), ((0, 1, 2, 13), (3, 8, 11))),
    "no globals in one row": Setting(10, 2, (10, 7), ((), (0, 6))),
    "documents": Setting(13, 3, (13, 11), None, (5, 8)),
    "module": Setting(11, 2, (11, 8), ((0, 6), (3,))),
    "documents and globals": Setting(13, 2, (13, 11), ((0, 6), (2, 9, 10)), (5, 8)),
}


class Inputs(NamedTuple):
    mask: Mask
    globals_: Globals | None
    seen: np.ndarray  # (B, T, T) bool, by ordinary queries
    all_seen: np.ndarray  # (B, T, T) bool, by global ones
    is_global: np.ndarray  # (B, T) bool


@functools.cache
def setting(name: str) -> Inputs:
    case = CASES[name]
    t = case.length
    valid = np.arange(t)[None] < np.array(case.lengths)[:, None]
    chosen = np.zeros((B, t), bool)
    for b, places in enumerate(case.globals_ or ()):
        chosen[b, list(places)] = True
    chosen &= valid
    segments = None if case.documents is None else (np.arange(t)[None] >= np.array(case.documents)[:, None])
    all_seen = np.zeros((B, t, t), bool)
    seen = np.zeros((B, t, t), bool)
    for b in range(B):
        for q in range(t):
            for s in range(t):
                all_seen[b, q, s] = valid[b, s] and (segments is None or segments[b, q] == segments[b, s])
                seen[b, q, s] = all_seen[b, q, s] and (abs(q - s) <= case.window or chosen[b, s])
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    mask = Mask(
        window=case.window + 1,
        key_valid=None if valid.all() else jnp.asarray(valid),
        query_segments=ids,
        key_segments=ids,
    )
    globals_ = None if case.globals_ is None else find_globals(jnp.asarray(chosen), 5)
    return Inputs(mask, globals_, seen, all_seen, chosen)


def slow(q, k, v, allowed, d_out):
    """Softmax attention of numpy, one query after another, and its gradients for this output gradient."""
    out, d_q, d_k, d_v = (np.zeros(x.shape, np.float64) for x in (q, q, k, v))
    for b, t, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(allowed[b, t])
        if not len(keys):
            continue
        scores = k[b, keys, h] @ q[b, t, h]
        w = np.exp(scores - scores.max())
        w /= w.sum()
        out[b, t, h] = w @ v[b, keys, h]
        d_w = v[b, keys, h] @ d_out[b, t, h]
        d_s = w * (d_w - w @ d_w)
        d_q[b, t, h] = d_s @ k[b, keys, h]
        d_k[b, keys, h] += d_s[:, None] * q[b, t, h][None]
        d_v[b, keys, h] += w[:, None] * d_out[b, t, h][None]
    return out, d_q, d_k, d_v


@functools.cache
def arrays(length: int):
    keys = jax.random.split(jax.random.key(3), 4)
    return tuple(np.asarray(jax.random.normal(key, (B, length, H, K))) for key in keys)


@pytest.mark.parametrize("name", CASES)
def test_windowed_against_numpy(name):
    case = setting(name)
    q, k, v, d_out = arrays(CASES[name].length)
    some = case.seen.any(axis=2)  # what padding that sees nothing computes is nobody's business
    d_out = d_out * some[:, :, None, None]

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(lambda *x: windowed(*x, case.mask, case.globals_), q, k, v)
        return out, *pull(jnp.asarray(d_out))

    want = slow(q, k, v, case.seen, d_out)
    got = both(q, k, v)
    np.testing.assert_allclose(np.asarray(got[0])[some], want[0][some], atol=2e-5)
    for x, expected in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.globals_ is not None])
def test_from_globals_against_numpy(name):
    case = setting(name)
    q, k, v, d_out = arrays(CASES[name].length)
    index, present = np.asarray(case.globals_.place), np.asarray(case.globals_.present)
    rows = np.arange(B)[:, None]
    d_some = np.where(present[:, :, None, None], d_out[rows, index], 0)

    @jax.jit
    def both(q, k, v):
        out, pull = jax.vjp(lambda *x: from_globals(*x, case.mask, case.globals_), q, k, v)
        return out, *pull(jnp.asarray(d_some, jnp.float32))

    d_full = np.zeros(d_out.shape)
    d_full[rows, index] = d_some
    want = slow(q, k, v, case.all_seen & case.is_global[:, :, None], d_full)
    got = both(q[rows, index], k, v)
    np.testing.assert_allclose(np.asarray(got[0])[present], want[0][rows, index][present], atol=2e-5)
    np.testing.assert_allclose(got[1], want[1][rows, index], atol=2e-5)
    for x, expected in zip(got[2:], want[2:], strict=True):
        np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.parametrize("most", [1, 3, 9])
def test_find_globals(most):
    chosen = np.array([[0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
    found = find_globals(jnp.asarray(chosen), most)
    assert found.place.shape == found.present.shape == (3, min(most, 7))
    for row, index, present in zip(chosen, np.asarray(found.place), np.asarray(found.present), strict=True):
        want = np.flatnonzero(row)[:most]
        np.testing.assert_array_equal(index[: len(want)], want)
        assert present.sum() == len(want) and present[: len(want)].all()
        assert len(set(index.tolist())) == len(index)


def test_the_module_mixes_both():
    """A global token's output is made with its own projections, any other's with the ordinary ones."""
    t, width = 11, 8
    spec = BlockSpec(width=width, heads=H)
    module = LongformerAttention(spec, 1, False)
    x = jax.random.normal(jax.random.key(0), (B, t, width))
    inputs = setting("module")
    context = Context(inputs.mask, inputs.globals_)
    params = module.init(jax.random.key(1), x, context, None)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    got, _ = jax.jit(module.apply)({"params": params}, x, context, None)

    def projected(name):
        made = np.asarray(x) @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        return made.reshape(B, t, H, -1)

    ordinary = [projected(name) for name in ("query", "key", "value")]
    own = [projected(f"{name}_global") for name in ("query", "key", "value")]
    zero = np.zeros(ordinary[0].shape)
    scale = (width // H) ** -0.5
    near = slow(ordinary[0] * scale, *ordinary[1:], inputs.seen, zero)[0]
    far = slow(own[0] * scale, *own[1:], inputs.all_seen, zero)[0]
    mixed = np.where(inputs.is_global[:, :, None, None], far, near).reshape(B, t, width)
    want = mixed @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    shown = np.arange(t)[None] < np.array(CASES["module"].lengths)[:, None]
    np.testing.assert_allclose(np.asarray(got)[shown], want[shown], atol=2e-5)


def test_graph_and_scores_do_not_grow_with_the_square_of_the_length():
    mask, places = Mask(window=9), jnp.zeros((1, 4), jnp.int32)

    def traced(length: int):
        shape = jax.ShapeDtypeStruct((1, length, 1, K), jnp.float32)
        spots = Globals(places, jnp.ones((1, 4), bool))
        jaxpr = jax.make_jaxpr(jax.grad(lambda q, k, v: jnp.sum(windowed(q, k, v, mask, spots))))(shape, shape, shape)
        sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        return len(jaxpr.eqns), max(sizes)

    small, large = traced(64), traced(4096)
    assert small[0] == large[0]
    assert large[1] == 64 * small[1] == 4096 * 24


def test_bfloat16():
    case = setting("globals and padding")
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays(14))
    got = windowed(q, k, v, case.mask, case.globals_)
    assert got.dtype == jnp.bfloat16
    want = windowed(*(x.astype(jnp.float32) for x in (q, k, v)), case.mask, case.globals_)
    shown = np.arange(14)[None] < np.array([14, 9])[:, None]
    np.testing.assert_allclose(np.asarray(got, np.float32)[shown], np.asarray(want)[shown], atol=0.05)


def test_dropout_acts_on_the_weights_of_both():
    case = setting("globals")
    q, k, v, _ = arrays(13)
    np.testing.assert_array_equal(windowed(q, k, v, case.mask, case.globals_, jnp.zeros_like), np.zeros_like(q))
    rows = np.arange(B)[:, None]
    out = from_globals(q[rows, case.globals_.place], k, v, case.mask, case.globals_, jnp.zeros_like)
    np.testing.assert_array_equal(out, np.zeros(out.shape))

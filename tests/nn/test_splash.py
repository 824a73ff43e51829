"""The TPU's kernel, interpreted on a CPU, against plain attention; and what it is not for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.nn import splash
from tfm_jax.nn.attention import attention
from tfm_jax.nn.masks import Mask
from tfm_jax.parallel import mesh
from tfm_jax.parallel.flops import count

B, T, H, G, K = 2, 256, 4, 2, 16
VALID = jnp.arange(T)[None] < jnp.array([[T], [150]])
SEGMENTS = jnp.array([[0] * 100 + [1] * 156, [0] * 5 + [1] * 200 + [2] * 51], jnp.int32)
# The second is on a mesh, whose devices have one key head for two or four.
CASES = {
    "packed": (Mask(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS, key_valid=VALID), None),
    "window": (Mask(causal=True, window=140), dict(data=2, tensor=4)),
    "padded": (Mask(key_valid=VALID), None),
}


@pytest.mark.parametrize("name", CASES)
def test_against_plain_attention(name, monkeypatch):
    monkeypatch.setattr(splash, "TILE", 128)
    mask, sizes = CASES[name]
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K))
    *qkv, d_out = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True))

    def both(implementation, q, k, v):
        out, pull = jax.vjp(lambda *x: attention(*x, mask, implementation=implementation), q, k, v)
        # What padding, in a document of its own, sees is up to each.
        return out, *pull(d_out * (1.0 if mask.key_valid is None else VALID[..., None, None]))

    want = jax.jit(functools.partial(both, "xla"))(*qkv)
    layout = mesh.make(**(sizes or dict(data=1)), devices=jax.devices() if sizes else jax.devices()[:1])
    with jax.set_mesh(layout.mesh):
        got = jax.jit(functools.partial(both, "splash"))(*qkv)
    seen = np.ones((B, T), bool) if mask.key_valid is None else np.asarray(VALID)
    np.testing.assert_allclose(np.asarray(got[0])[seen], np.asarray(want[0])[seen], atol=2e-5)
    for have, expected in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(have, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("length", "mask", "reason"),
    [
        (200, Mask(), "splash wants lengths in multiples of 128, and one is 200"),
        (T, Mask(bias=jnp.zeros((1, H, T, T))), "splash adds no bias to the scores"),
        (
            T,
            Mask(causal=True, prefix=jnp.array([3, 9])),
            "splash has one mask for all rows, segments and padding apart",
        ),
    ],
)
def test_what_it_is_not_for(length, mask, reason):
    q = jnp.zeros((B, length, H, K))
    with says(f"model.attention='splash' is not for this: {reason}. Use 'auto'."):
        attention(q, q, q, mask, implementation="splash")


@pytest.mark.parametrize(("length", "tiles"), [(1024, 2), (640, 5), (128, 1)])
def test_its_flops(length, tiles):
    """Forward two products of all queries with all keys, of which a causal mask leaves the tiles on and below the diagonal."""
    q, k = jnp.zeros((B, length, H, K)), jnp.zeros((B, length, G, K))
    mask = Mask(causal=True)
    traced = jax.make_jaxpr(functools.partial(attention, mask=mask, implementation="splash"))(q, k, k)
    whole = 2 * 2 * B * H * length**2 * K
    assert count(traced) == count(traced, weights=False) == whole
    assert count(traced, seen=splash.seen(length)) == pytest.approx(whole * tiles * (tiles + 1) / 2 / tiles**2)

"""Ring attention on 8 simulated devices against whole attention on one: values, gradients, what is computed and what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.models import longformer, t5, transformer_xl
from tfm_jax.nn import ring
from tfm_jax.nn.attention import attention, check, choose
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.ring import balanced, restored
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel import mesh
from tfm_jax.parallel.flops import count

B, T, H, G, K = 2, 32, 4, 2, 4
VALID = jnp.arange(T)[None] < jnp.array([[T], [20]])
SEGMENTS = jnp.array([[0] * 10 + [1] * 22, [0] * 5 + [1] * 20 + [2] * 7], jnp.int32)
# Mask and mesh. In each, every query has at least one key; a window of 5 leaves out every other turn of four.
CASES = {
    "packed": (Mask(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS), dict(data=2, context=4)),
    "window": (Mask(window=5), dict(data=1, fsdp=2, context=4)),
    "prefix": (Mask(causal=True, prefix=jnp.array([9, 20]), key_valid=VALID), dict(data=1, context=2, tensor=4)),
}


@functools.cache
def inputs():
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K), (B, T, H, K))
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)]


def in_ring(q, k, v, mask):
    """Ring attention of arrays that are in order."""
    own = {name: balanced(x) for name, x in mask.arrays().items() if x is not None and x.ndim == 2}
    out = attention(*map(balanced, (q, k, v)), dataclasses.replace(mask, **own), implementation="ring")
    return restored(out)


@pytest.mark.parametrize("name", CASES)
def test_against_whole_attention(name):
    *qkv, d_out = inputs()
    mask, sizes = CASES[name]

    def both(function, q, k, v, mask):
        out, pull = jax.vjp(lambda *x: function(*x, mask), q, k, v)
        return out, *pull(d_out)

    want = jax.jit(functools.partial(both, functools.partial(attention, implementation="xla")))(*qkv, mask)
    layout = mesh.make(**sizes)
    with jax.set_mesh(layout.mesh):
        got = jax.jit(functools.partial(both, in_ring))(*qkv, mask)
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(have), expected, atol=5e-6)


def test_the_order():
    """Device j of n holds blocks j and 2n-1-j, and back again."""
    x = jnp.arange(2 * 16 * 3).reshape(2, 16, 3)
    with jax.set_mesh(mesh.make(data=2, context=4).mesh):
        there, back = jax.jit(lambda x: (balanced(x), restored(balanced(x))))(x)
    blocks = [0, 7, 1, 6, 2, 5, 3, 4]
    want = np.concatenate([np.arange(2 * b, 2 * b + 2) for b in blocks])
    np.testing.assert_array_equal(there, np.asarray(x)[:, want])
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(balanced(x), x)  # without a mesh


def traced(length, n, mask):
    """The jaxpr of the gradient of attention over a length on n devices."""
    x = jax.ShapeDtypeStruct((1, length, 1, K), jnp.float32)
    with jax.set_mesh(mesh.make(data=1, context=n, devices=jax.devices()[:n]).mesh):
        return jax.make_jaxpr(jax.grad(lambda q, k, v: jnp.sum(in_ring(q, k, v, mask)), (0, 1, 2)))(x, x, x)


def test_every_device_does_the_same_half():
    """Of 4n pairs of blocks a device works on 2n+1 under a causal mask, with two products forward and five backward."""
    n = 4
    whole = n * 4 * n * (2 + 5) * 2 * K * (64 // (2 * n)) ** 2
    assert count(traced(64, n, Mask())) == whole
    assert count(traced(64, n, Mask(causal=True))) == whole * (2 * n + 1) / (4 * n)


def test_memory_grows_with_the_length_and_not_its_square():
    def largest(jaxpr):
        inner = [
            sub
            for e in jaxpr.eqns
            for p in e.params.values()
            for sub in jax.tree.leaves(p, is_leaf=is_jaxpr)
            if is_jaxpr(sub)
        ]
        own = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        return max([*own, *(largest(getattr(sub, "jaxpr", sub)) for sub in inner)])

    def is_jaxpr(x):
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    mask = Mask(causal=True)
    sizes = [largest(traced(length, 2, mask).jaxpr) for length in (4096, 8192)]
    # Scores of some queries with a block of keys.
    assert sizes == [ring.QUERIES * 1024, ring.QUERIES * 2048]


def test_turns_that_a_window_hides_are_left_out():
    for n in (2, 4, 8):
        for size in (1, 3):
            for window in range(1, 2 * n * size + 1):
                seen = set()
                for j in range(n):
                    for turn in range(n):
                        i = (j - turn) % n
                        blocks = [(a, b) for a in (j, 2 * n - 1 - j) for b in (i, 2 * n - 1 - i)]
                        near = min(max(abs(a - b) * size - size + 1, 0) for a, b in blocks)
                        seen |= {turn} if near < window else set()
                worked = {t for first, last in ring._runs(n, size, window) for t in range(first, last + 1)}
                assert worked == seen, (n, size, window)


def test_what_has_no_ring_is_refused():
    spec, tokens = dict(width=16, heads=2), jnp.zeros((1, 16), jnp.int32)
    xl = transformer_xl.Model(BlockSpec(**spec), 9, layers=1, mem_len=4)
    why = "mesh.context=2 splits the length of a sequence, and"
    instead = "Use mesh.fsdp or mesh.tensor."
    refused = [
        (t5.Model(dataclasses.replace(t5.SPEC, **spec), 9, encoder_layers=1, decoder_layers=1), {"decoder_tokens": tokens},
         f"mesh.context=2 splits the length, and ring attention has no bias of scores, as relative positions are (T5). {instead}"),
        (xl, {}, f"{why} neither a cache of keys and values (decoding) nor a memory of earlier segments (Transformer-XL) is split"
         f" with it. {instead}"),
        (dataclasses.replace(xl, mem_len=0), {}, f"{why} RelativeAttention finds keys by their place in the whole of it. {instead}"),
        (longformer.Model(BlockSpec(**spec), 9, layers=1), {},
         f"{why} LongformerAttention finds keys by their place in the whole of it. {instead}"),
    ]  # fmt: skip
    with jax.set_mesh(mesh.make(data=4, context=2).mesh):
        for model, more, message in refused:
            with pytest.raises(UserError) as caught:
                jax.eval_shape(lambda model=model, more=more: model.init(jax.random.key(0), tokens, **more))
            assert str(caught.value) == message
        with says("mesh.context=2 splits a sequence into 4 blocks, and 6 positions are not a multiple of that. Nearest that are:"
                  " 4, 8."):  # fmt: skip
            balanced(jnp.zeros((1, 6)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(attention="chunked"),
            "mesh.context=2 splits the length, and model.attention='chunked' needs it whole. Use model.attention='auto', which is"
            " ring attention there.",
        ),
        (
            dict(attention_dropout=0.1),
            "mesh.context=2 splits the length, and ring attention has no attention dropout, but model.attention_dropout=0.1."
            " Set it to 0.",
        ),
        (dict(attention="ring"), "model.attention='ring' does not exist. Valid: auto, chunked, xla."),
    ],
)
def test_choice(fields, message):
    assert choose(BlockSpec(), "cpu", split=2) == "ring"
    with says(message):
        check(BlockSpec(**fields), "cpu", split=2)

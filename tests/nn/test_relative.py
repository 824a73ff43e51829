"""Relative attention against the paper's equations, one (query, key) at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.nn.attention import Cache, Context
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.positions import sinusoids
from tfm_jax.nn.relative import Relative, RelativeAttention, gather, layer_caches, layer_states, shift
from tfm_jax.nn.spec import BlockSpec

B, T, M, D, H, K = 2, 5, 4, 12, 2, 3
S = M + T
SPEC = BlockSpec(width=D, heads=H, head_dim=K, bias="all", init="normal", init_std=0.4)
KEYS = jax.random.split(jax.random.key(0), 6)
X, MEMORY, D_OUT = (jax.random.normal(k, (B, n, D)) for k, n in zip(KEYS[:3], (T, M, T), strict=True))
U, V = (jax.random.normal(k, (H, K)) for k in KEYS[3:5])
# Row 0 remembers two states, row 1 four; the last position of row 0 is padding.
VALID = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 9], bool)
MASK = Mask(causal=True, offset=M, key_valid=VALID)
LAYER = RelativeAttention(SPEC, 1, train=False)


def relative(length, u=U, v=V):
    return Relative(jnp.asarray(sinusoids(length, D)[::-1]), u, v)


PARAMS = jax.jit(LAYER.init)(KEYS[5], X, Context(MASK, relative(S)), MEMORY)["params"]


def slow(kernels, x, memory, u, v, valid, scale=K**-0.5):
    """Section 3.3: A_ij = E_i W_q W_k E_j (a) + E_i W_q W_R R_{i-j} (b) + u W_k E_j (c) + v W_R R_{i-j} (d)."""
    x, memory, u, v = (np.asarray(a, np.float64) for a in (x, memory, u, v))
    w = {name: np.asarray(kernels[name]["kernel"], np.float64) for name in kernels}
    out = np.zeros((B, T, D))
    for b in range(B):
        states = np.concatenate([memory[b], x[b]])
        for t in range(T):
            heads = []
            for h in range(H):
                own = slice(h * K, (h + 1) * K)
                q = x[b, t] @ w["query"][:, own]
                scores, values = [], []
                for j in range(M + t + 1):
                    if not valid[b, j]:
                        continue
                    distance = M + t - j
                    # sin(d / 10000^(2i/D)) for all i, then the cosines.
                    angles = [distance / 10_000 ** (2 * i / D) for i in range(D // 2)]
                    r = np.array([np.sin(a) for a in angles] + [np.cos(a) for a in angles]) @ w["position"][:, own]
                    k = states[j] @ w["key"][:, own]
                    scores.append((q @ k + q @ r + u[h] @ k + v[h] @ r) * scale)
                    values.append(states[j] @ w["value"][:, own])
                e = np.exp(scores - np.max(scores)) if scores else np.zeros(0)
                heads.append(e / e.sum() @ np.array(values))
            out[b, t] = np.concatenate(heads) @ w["out"]
    return out


def apply(params, x, memory, u, v, layer=LAYER):
    return layer.apply({"params": params}, x, Context(MASK, relative(S, u, v)), memory)


def test_parameters_have_no_biases():
    assert jax.tree.map(jnp.shape, PARAMS) == {
        "query": {"kernel": (D, H * K)},
        "key": {"kernel": (D, H * K)},
        "value": {"kernel": (D, H * K)},
        "position": {"kernel": (D, H * K)},
        "out": {"kernel": (H * K, D)},
    }


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("scale", ["sqrt", "none"])
def test_the_four_terms(implementation, scale):
    spec = BlockSpec(**{**SPEC.__dict__, "attention": implementation, "attention_scale": scale})
    out, kept = jax.jit(lambda: apply(PARAMS, X, MEMORY, U, V, RelativeAttention(spec, 1, train=False)))()
    want = slow(PARAMS, X, MEMORY, U, V, VALID, K**-0.5 if scale == "sqrt" else 1.0)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_array_equal(kept, np.concatenate([MEMORY, X], axis=1)[:, -M:])


def test_gradients_against_finite_differences():
    """Along one random direction of all inputs at once, and nothing into the memory."""
    inputs = (PARAMS, X, MEMORY, U, V)
    gradient = jax.jit(jax.grad(lambda *a: jnp.sum(apply(*a)[0] * D_OUT), argnums=(0, 1, 2, 3, 4)))(*inputs)
    assert not np.any(gradient[2])
    leaves, structure = jax.tree.flatten(inputs)
    draw = np.random.default_rng(1)
    for _ in range(3):
        ways = [draw.normal(size=x.shape) for x in leaves]
        ways[next(i for i, x in enumerate(leaves) if x is MEMORY)][:] = 0

        def at(step, ways=ways):
            moved = [np.asarray(x, np.float64) + step * way for x, way in zip(leaves, ways, strict=True)]
            return np.sum(slow(*jax.tree.unflatten(structure, moved), VALID) * np.asarray(D_OUT))

        want = (at(1e-5) - at(-1e-5)) / 2e-5
        got = sum(np.sum(np.asarray(g) * way) for g, way in zip(jax.tree.leaves(gradient), ways, strict=True))
        assert got == pytest.approx(want, rel=1e-4)


def test_shift_and_gather_bring_distances_under_their_keys():
    columns = jnp.broadcast_to(jnp.arange(S - 1, -1, -1.0)[None, None, None], (B, H, T, S))
    shifted, places = shift(columns), jnp.broadcast_to(M + jnp.arange(T)[None], (B, T))
    gathered = gather(columns, places)
    for t in range(T):
        for j in range(M + t + 1):
            assert np.all(shifted[:, :, t, j] == M + t - j) and np.all(gathered[:, :, t, j] == M + t - j)
    rows = gather(columns, jnp.array([[0, 3, 3, 8, 5], [8, 0, 1, 2, 7]]))
    assert rows[1, 0, 0, 2] == 6 and rows[0, 1, 2, 1] == 2 and rows[0, 0, 4, 5] == 0


def test_no_memory_is_plain_causal_attention():
    mask = Mask(causal=True)
    out, kept = LAYER.apply({"params": PARAMS}, X, Context(mask, relative(T)), None)
    none = jnp.concatenate([jnp.zeros((B, M), bool), jnp.ones((B, T), bool)], axis=1)
    np.testing.assert_allclose(out, slow(PARAMS, X, MEMORY, U, V, none), atol=1e-5)
    assert kept is None


def test_a_cache_filled_in_two_parts_gives_the_whole():
    whole, _ = LAYER.apply({"params": PARAMS}, X, Context(Mask(causal=True), relative(T)), None)
    cache, parts = Cache(*jnp.zeros((2, B, 7, H, K))), []
    for part in (slice(0, 3), slice(3, 5)):
        places = jnp.broadcast_to(jnp.arange(T)[None, part], (B, part.stop - part.start))
        context = Context(Mask(causal=True, query_positions=places), relative(7))
        out, cache = LAYER.apply({"params": PARAMS}, X[:, part], context, cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_a_memory_is_the_same_array_in_both_layouts(layer_loop):
    states = jax.random.normal(KEYS[0], (B, 3, M, D))
    caches = layer_caches(states, layer_loop)
    second = caches.own[1] if layer_loop == "scan" else caches[1].own
    np.testing.assert_array_equal(second, states[:, 1])
    np.testing.assert_array_equal(layer_states(caches), states)

"""Transformer-XL against the paper's equations over explicit pairs of positions, and what a memory must and must not do."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.decode.sample import Sampling, generate
from tfm_jax.errors import UserError
from tfm_jax.models.transformer_xl import RULES, VARIANTS, Model
from tfm_jax.nn.relative import Memory
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

V, T, B, L, D, H, K = 29, 4, 2, 2, 16, 4, 4
SPEC = BlockSpec(width=D, heads=H, norm_position="post", activation="relu", init="normal", init_std=0.3)
TOKENS = jax.random.randint(jax.random.key(0), (B, 4 * T), 0, V)
SEGMENTS = [TOKENS[:, i : i + T] for i in range(0, 4 * T, T)]
FAR = 4 * T


def model(mem_len=T, loop="loop", **fields):
    return Model(dataclasses.replace(SPEC, **fields), V, L, mem_len, loop)


@functools.cache
def params_of(norm_position="post"):
    made = jax.jit(model(norm_position=norm_position).init)(jax.random.key(1), SEGMENTS[0])["params"]
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(made)))
    keys = jax.tree.unflatten(jax.tree.structure(made), list(keys))
    return jax.tree.map(lambda p, key: p + 0.1 * jax.random.normal(key, p.shape), made, keys)


def scanned(params):
    blocks = [params["stack"][f"block_{i}"] for i in range(L)]
    stack = {name: p for name, p in params["stack"].items() if not name.startswith("block_")}
    return params | {"stack": stack | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


@functools.cache
def applied(made):
    return jax.jit(lambda params, tokens, **inputs: made.apply({"params": params}, tokens, **inputs))


def in_segments(made, params, segments=tuple(range(4)), memory=None):
    """Logits of some segments in turn, and the memory behind them."""
    out = []
    for i in segments:
        found = applied(made)(params, SEGMENTS[i], memory=memory)
        out.append(found["logits"])
        memory = found["memory"]
    return jnp.concatenate(out, axis=1), memory


def slow(params, tokens, pasts, reach, norm_position="post", window=None):
    """Section 3: logits of one segment, and each layer's past with it; a position sees `reach` of the past."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"][None, None] + p["bias"][None, None]

    def kernel(p, *shape):
        return p["kernel"].reshape(shape)

    table, length = params["token_embedding"]["embedding"], tokens.shape[1]
    h, after, pre = table[tokens] * jnp.sqrt(float(D)), [], norm_position == "pre"
    for i in range(L):
        layer = params["stack"][f"block_{i}"]
        a = layer["attention"]
        x = norm(h, layer["attention_norm"]) if pre else h
        states = jnp.concatenate([pasts[i], x], axis=1)
        size = states.shape[1]
        q = jnp.einsum("btd,dhk->bthk", x, kernel(a["query"], D, H, K))
        k, v = (jnp.einsum("bsd,dhk->bshk", states, kernel(a[n], D, H, K)) for n in ("key", "value"))
        distance = np.arange(size - length, size)[:, None] - np.arange(size)[None]
        angle = distance[:, :, None] / 10_000 ** (np.arange(0, D, 2) / D)[None, None]
        r = jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=-1), jnp.float32)
        r = jnp.einsum("tsd,dhk->tshk", r, kernel(a["position"], D, H, K))
        u, w = params["content_bias"], params["position_bias"]
        scores = (
            jnp.einsum("bthk,bshk->bhts", q, k)
            + jnp.einsum("bthk,tshk->bhts", q, r)
            + jnp.einsum("hk,bshk->bhs", u, k)[:, :, None]
            + jnp.einsum("hk,tshk->hts", w, r)[None]
        )
        seen = (distance >= 0) & (distance < (window or size))
        scores = jnp.where(seen[None, None], scores / np.sqrt(K), -jnp.inf)
        y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v).reshape(B, length, D)
        h = h + y @ a["out"]["kernel"]
        h = h if pre else norm(h, layer["attention_norm"])
        m = layer["mlp"]
        y = norm(h, layer["mlp_norm"]) if pre else h
        y = jnp.maximum(y @ m["up"]["kernel"] + m["up"]["bias"][None, None], 0)
        h = h + y @ m["down"]["kernel"] + m["down"]["bias"][None, None]
        h = h if pre else norm(h, layer["mlp_norm"])
        after.append(jax.lax.stop_gradient(states[:, max(0, size - reach) :]))
    h = norm(h, params["stack"]["final_norm"]) if pre else h
    return h @ table.T, after


@functools.cache
def slow_segments(reach, norm_position):
    params, out, pasts = params_of(norm_position), [], [jnp.zeros((B, 0, D))] * L
    for tokens in SEGMENTS:
        logits, pasts = slow(params, tokens, pasts, reach, norm_position)
        out.append(logits)
    return jnp.concatenate(out, axis=1)


@pytest.mark.parametrize("loop", ["loop", "scan"])
@pytest.mark.parametrize(("mem_len", "norm_position"), [(T, "post"), (3, "pre"), (6, "post"), (FAR, "pre")])
def test_segments_in_turn_against_the_paper(mem_len, norm_position, loop):
    params = params_of(norm_position)
    made = model(mem_len, loop, norm_position=norm_position)
    logits, memory = in_segments(made, params if loop == "loop" else scanned(params))
    np.testing.assert_allclose(logits, slow_segments(mem_len, norm_position), atol=2e-4)
    assert memory.states.shape == (B, L, mem_len, D) and memory.valid.all()


@pytest.mark.parametrize("loop", ["loop", "scan"])
def test_gradients_against_the_paper(loop):
    """Of a loss over two segments, each of which takes its memory as given."""
    weights = jax.random.normal(jax.random.key(5), (2, B, T, V))

    def fast(params):
        made, first = model(3, loop), model(3, loop).apply({"params": params}, SEGMENTS[0])
        second = made.apply({"params": params}, SEGMENTS[1], memory=first["memory"])
        return jnp.sum(weights * jnp.stack([first["logits"], second["logits"]]))

    def naive(params):
        first, pasts = slow(params, SEGMENTS[0], [jnp.zeros((B, 0, D))] * L, 3)
        return jnp.sum(weights * jnp.stack([first, slow(params, SEGMENTS[1], pasts, 3)[0]]))

    params = params_of()
    want = jax.jit(jax.grad(naive))(params)
    got = jax.jit(jax.grad(fast))(params if loop == "loop" else scanned(params))
    want = flatten(want if loop == "loop" else scanned(want))
    for path, g in flatten(got).items():
        scale = np.max(np.abs(want[path]))
        assert scale > 1e-3, path
        np.testing.assert_allclose(g / scale, want[path] / scale, atol=2e-4, err_msg=path)


def test_a_memory_of_the_whole_past_is_full_attention():
    """All L layers exactly: each layer's memory is what it would compute again."""
    params = params_of()
    whole = applied(model(0))(params, TOKENS)["logits"]
    np.testing.assert_allclose(in_segments(model(FAR), params)[0], whole, atol=1e-4)
    np.testing.assert_allclose(whole, slow(params, TOKENS, [jnp.zeros((B, 0, D))] * L, 0)[0], atol=2e-4)
    assert np.max(np.abs(in_segments(model(T), params)[0] - whole)) > 0.01


def test_the_past_reaches_as_far_as_layers_times_memory():
    """Section 3.2, figure 2: with M = T, segment i depends on the L segments before it and on none further back."""
    params, made = params_of(), model(T)
    other = {0: SEGMENTS[0].at[:, 1:].add(1) % V}
    memories = [applied(made)(params, tokens)["memory"] for tokens in (SEGMENTS[0], other[0])]
    found = [in_segments(made, params, (1, 2, 3), memory)[0] for memory in memories]
    differ = np.max(np.abs(found[0] - found[1]), axis=(0, 2)).reshape(3, T).max(axis=1)
    assert differ[0] > 0.01 and differ[1] > 1e-3 and differ[2] == 0


def test_nothing_flows_back_into_the_memory():
    params, made = params_of(), model()
    memory = applied(made)(params, SEGMENTS[0])["memory"]

    def loss(states):
        return jnp.sum(made.apply({"params": params}, SEGMENTS[1], memory=Memory(states, memory.valid))["logits"] ** 2)

    assert not np.any(jax.jit(jax.grad(loss))(memory.states))
    assert float(loss(memory.states)) != pytest.approx(float(loss(memory.states * 2)), rel=1e-3)


def test_a_fresh_row_forgets_and_the_others_do_not():
    params, made = params_of(), model()
    memory = applied(made)(params, SEGMENTS[0])["memory"]
    got = applied(made)(params, SEGMENTS[1], memory=memory, fresh=jnp.array([True, False]))
    forgot, kept = (applied(made)(params, SEGMENTS[1], memory=m)["logits"] for m in (None, memory))
    np.testing.assert_allclose(got["logits"][0], forgot[0], atol=1e-5)
    np.testing.assert_allclose(got["logits"][1], kept[1], atol=1e-5)
    assert np.max(np.abs(forgot - kept)) > 0.01
    # A memory that is longer than a segment keeps what came before, and for a fresh row that this is nothing.
    longer = applied(model(6))(params, SEGMENTS[0])["memory"]
    valid = applied(model(6))(params, SEGMENTS[1], memory=longer, fresh=jnp.array([True, False]))["memory"].valid
    assert valid.tolist() == [[False] * 2 + [True] * 4, [True] * 6]


def test_padding_is_not_attended_to_here_or_later():
    params, made = params_of(), model(6)
    valid = jnp.arange(T)[None] < jnp.array([[2], [4]])
    memories = [
        applied(made)(params, tokens, valid=valid)["memory"]
        for tokens in (SEGMENTS[0], SEGMENTS[0].at[0, 2:].add(1) % V)
    ]
    assert memories[0].valid.tolist() == [[False, False, True, True, False, False], [False, False] + [True] * 4]
    a, b = (applied(made)(params, SEGMENTS[1], memory=m)["logits"] for m in memories)
    np.testing.assert_array_equal(a, b)


def test_no_memory_at_all():
    made = model(0)
    assert made.init_memory(2) is None
    assert set(applied(made)(params_of(), TOKENS)) == {"hidden", "unembedding", "logits"}


def test_bfloat16():
    made = model(dtype="bfloat16")
    first = applied(made)(params_of(), SEGMENTS[0])
    assert first["memory"].states.dtype == jnp.bfloat16 and first["logits"].dtype == jnp.float32
    second = applied(made)(params_of(), SEGMENTS[1], memory=first["memory"])["logits"]
    np.testing.assert_allclose(second, in_segments(model(), params_of(), (0, 1))[0][:, T:], atol=0.5)


def test_dropout_only_when_training():
    made, params = model(dropout=0.3), params_of()
    want = applied(model())(params, SEGMENTS[0])["logits"]
    np.testing.assert_allclose(applied(made)(params, SEGMENTS[0])["logits"], want, atol=1e-5)
    train = jax.jit(
        lambda key: made.apply({"params": params}, SEGMENTS[0], train=True, rngs={"dropout": key})["logits"]
    )
    assert not np.allclose(train(jax.random.key(0)), want, atol=1e-2)
    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)), atol=1e-2)


@pytest.mark.parametrize("loop", ["loop", pytest.param("scan", marks=pytest.mark.journey)])
def test_cached_decoding_looks_as_far_back_as_the_memory(loop):
    params = params_of()
    got = generate(
        model(3, loop),
        params if loop == "loop" else scanned(params),
        [row.tolist() for row in TOKENS[:, :5]],
        max_new=6,
        sampling=Sampling(temperature=0),
    )
    tokens = TOKENS[:, :5]
    for _ in range(6):
        logits, _ = slow(params, tokens, [jnp.zeros((B, 0, D))] * L, 0, window=4)
        tokens = jnp.concatenate([tokens, jnp.argmax(logits[:, -1:], axis=-1)], axis=1)
    assert got == tokens[:, 5:].tolist()


def variant(name, **fields):
    given = dict(name="transformer_xl", variant=name)
    defaults = {key: field.default for key, field in section_fields("model", given).items()}
    return build_model(defaults | given | fields)


def shapes(name, **fields):
    made = variant(name, layer_loop="scan", **fields)
    return made, jax.eval_shape(lambda: made.init(jax.random.key(0), **made.example()))["params"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Table 2 of the paper: 41 M and 277 M.
        ("enwik8-12l", 41_055_232),
        ("enwik8-24l", 277_231_616),
        # Table 1: 151 M, of which 268,968 are the adaptive softmax's biases and clusters.
        ("base", 150_838_570),
    ],
)
def test_published_parameter_counts(name, count):
    _, params = shapes(name, **({"vocab_size": 267_735} if name == "base" else {}))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    for path in flatten(params):
        assert any(re.search(pattern, path) for pattern, _ in RULES), path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_the_papers_block(name):
    made, params = shapes(name, vocab_size=V)
    spec = made.block
    assert (spec.norm_position, spec.activation, spec.init) == ("post", "relu", "normal")
    sizes = params["stack"]["blocks"]["attention"]["position"]["kernel"].shape
    assert sizes == (made.layers, spec.width, spec.heads * spec.key_size)
    assert "final_norm" not in params["stack"]


def test_flops_count_weights_attention_and_the_memory():
    made, params = shapes("enwik8-12l")
    weights = sum(
        x.size for path, x in flatten(params).items() if re.search("kernel$|token", path) and "position" not in path
    )
    assert made.train_flops_per_token(512) == 6 * weights + 18 * 12 * 512 * 1024 + 4 * 12 * 2 * 512 * 512


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(-1), "model.mem_len=-1: must be at least 0."),
        (lambda: Model(SPEC, V, 0), "model.layers=0: must be at least 1."),
        (lambda: model(width=15, heads=3), "model.width=15: sinusoids come in pairs, so it must be even."),
        (lambda: model(qk_norm="head"), "model.qk_norm='head': transformer_xl has none. Use 'none'."),
    ],
)
def test_errors(make, message):
    with says(message):
        make()


def test_a_vocabulary_is_needed():
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: Model(SPEC).init(jax.random.key(0), TOKENS))
    assert str(error.value) == "model.vocab_size is not set, and no data set has filled it in."


def test_caches_need_positions():
    with pytest.raises(ValueError) as error:
        model().apply({"params": params_of()}, TOKENS, caches=model().init_caches(2, T))
    assert str(error.value).startswith("Decoding with caches needs the tokens' positions.")

"""The GPT family: published sizes, initialisation, precision, packing, sharding rules."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.models.gpt import RULES, VARIANTS, Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.base import bind

V, T = 61, 12
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, V)
LLAMA = BlockSpec(
    width=16,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    norm="rms",
    mlp="gated",
    activation="silu",
    bias="none",
)
TINY = {
    "gpt2": Model(BlockSpec(width=16, heads=4), vocab_size=V, max_len=T, layers=2),
    "llama": Model(LLAMA, vocab_size=V, max_len=T, layers=2, position="rotary", output="free"),
}


@functools.cache
def params_of(model: Model):
    return jax.jit(lambda key: model.init(key, TOKENS)["params"])(jax.random.key(1))


@functools.cache
def applied(model: Model):
    variables = {"params": params_of(model)}
    return jax.jit(lambda tokens, **inputs: model.apply(variables, tokens, **inputs))


def variant(name: str, **fields) -> Model:
    """As a config of that variant, and these fields, would have it."""
    defaults = section_fields("model", dict(name="gpt", variant=name))
    return build_model({key: field.default for key, field in defaults.items()} | fields)


def shapes(name: str):
    model = variant(name, layer_loop="scan")
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama2-7b", 6_738_415_616),
        ("llama2-70b", 68_976_648_192),
        ("mixtral-8x7b", 46_702_792_704),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_published_parameter_counts(name, count):
    assert sum(x.size for x in jax.tree.leaves(shapes(name))) == count


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b"])
def test_every_parameter_has_a_rule(name):
    for path in flatten(shapes(name)):
        assert any(re.search(pattern, path) for pattern, _ in RULES), path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant(name, vocab_size=V)
    assert model.layers == VARIANTS[name]["layers"] and model.block.width == VARIANTS[name]["width"]


def test_initialisation_is_gpt2s():
    """Radford et al. 2019, section 2.3: std 0.02, and 0.02 / sqrt(2 L) into the residual stream."""
    model = Model(BlockSpec(width=128, heads=4), vocab_size=999, max_len=256, layers=8, layer_loop="scan")
    params = flatten(jax.jit(lambda key: model.init(key, TOKENS)["params"])(jax.random.key(2)))
    for path, x in params.items():
        if path.endswith("bias"):
            assert not np.any(x), path
        elif path.endswith("scale"):
            assert np.all(np.asarray(x) == 1), path
        else:
            residual = path.endswith(("attention/out/kernel", "mlp/down/kernel"))
            np.testing.assert_allclose(np.std(x), 0.02 / 4 if residual else 0.02, rtol=0.03, err_msg=path)
            assert abs(np.mean(x)) < 0.001, path


@pytest.mark.parametrize("name", TINY)
def test_outputs(name):
    model = TINY[name]
    out = applied(model)(TOKENS)
    assert set(out) == {"hidden", "unembedding", "logits"}
    assert (
        out["logits"].shape == (2, T, V) and out["hidden"].shape == (2, T, 16) and out["unembedding"].shape == (V, 16)
    )
    np.testing.assert_allclose(out["logits"], np.einsum("btd,vd->btv", out["hidden"], out["unembedding"]), atol=1e-5)
    table = params_of(model)["token_embedding" if name == "gpt2" else "unembedding"]["embedding"]
    np.testing.assert_array_equal(out["unembedding"], table)
    assert ("unembedding" in params_of(model)) == (name == "llama")


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_keeps_parameters_and_logits_in_float32(name):
    model = TINY[name].clone(block=dataclasses.replace(TINY[name].block, dtype="bfloat16"))
    assert {p.dtype for p in jax.tree.leaves(params_of(model))} == {jnp.dtype("float32")}
    out, exact = applied(model)(TOKENS), applied(TINY[name])(TOKENS)
    assert {key: x.dtype for key, x in out.items()} == {
        "hidden": jnp.bfloat16, "unembedding": jnp.float32, "logits": jnp.float32
    }  # fmt: skip
    np.testing.assert_allclose(out["logits"], exact["logits"], atol=0.02)

    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, TOKENS)["logits"] ** 2)))(params_of(model))
    assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", TINY)
def test_products_of_bfloat16_between_float32_activations(name):
    """The loss and its gradients are about those of float32, and no product with a kernel or a table is left in it."""
    task = token_prediction.make()
    batch = {"inputs": {"tokens": TOKENS}, "targets": TOKENS[:, ::-1], "weights": jnp.ones(TOKENS.shape)}

    def losses(model):
        def loss(params):
            return task.loss(bind(model, {}), params, {}, batch, None, True).total

        return jax.jit(jax.value_and_grad(loss)), params_of(TINY[name])

    model = TINY[name].clone(block=dataclasses.replace(TINY[name].block, matmul_dtype="bfloat16"))
    assert applied(model)(TOKENS)["logits"].dtype == jnp.float32
    (value, gradient), (exact, exact_gradient) = (f(p) for f, p in (losses(model), losses(TINY[name])))
    assert value != exact and abs(value / exact - 1) < 1e-3
    for path, g in flatten(exact_gradient).items():
        found = flatten(gradient)[path]
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - g) < 0.03 * np.linalg.norm(g) + 1e-4, path
    program = losses(model)[0].lower(params_of(TINY[name])).as_text()
    products = re.findall(r"stablehlo.dot_general .*: \((.*?), (.*?)\) -> (.*)", program)
    # Attention's, which have batches of rows and heads, are four-dimensional.
    plain = [types for types in products if max(t.count("x") for t in types[:2]) < 4]
    assert len(plain) > 20 and all("bf16" in a and "bf16" in b and "f32" in c for a, b, c in plain)


@pytest.mark.parametrize("name", TINY)
def test_the_future_is_not_seen(name):
    apply = applied(TINY[name])
    before, after = apply(TOKENS)["logits"], apply(TOKENS.at[:, 7].add(1) % V)["logits"]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_packed_documents_are_as_if_alone(name):
    apply = applied(TINY[name])
    first, second = TOKENS[:1, :5], TOKENS[1:, :7]
    row = jnp.concatenate([first, second], axis=1)
    segments = jnp.array([[0] * 5 + [1] * 7], jnp.int32)
    places = jnp.concatenate([jnp.arange(5), jnp.arange(7)])[None]
    packed = apply(row, segment_ids=segments, positions=places)["logits"]
    for part, alone in ((packed[:, :5], first), (packed[:, 5:], second)):
        # Causal, so what stands behind a document does not matter: one shape serves both.
        alone = jnp.pad(alone, ((0, 1), (0, T - alone.shape[1])))
        np.testing.assert_allclose(part, apply(alone)["logits"][:1, : part.shape[1]], atol=1e-5)


def test_dropout_only_when_training():
    model = Model(BlockSpec(width=16, heads=4, dropout=0.3), vocab_size=V, max_len=T, layers=2)
    variables = {"params": params_of(TINY["gpt2"])}
    want = applied(TINY["gpt2"])(TOKENS)["logits"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, TOKENS)["logits"], want, atol=1e-6)
    train = jax.jit(lambda key: model.apply(variables, TOKENS, train=True, rngs={"dropout": key})["logits"])
    assert not np.allclose(train(jax.random.key(0)), want, atol=1e-3)
    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)), atol=1e-3)


def test_flops_are_six_a_weight_and_attention():
    """GPT-2 small at 1024 tokens; the weights are all parameters but positions, norms and biases."""
    model = variant("gpt2")
    weights = sum(x.size for path, x in flatten(shapes("gpt2")).items() if re.search("kernel$|token_embedding", path))
    assert model.train_flops_per_token(1024) == 6 * weights + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(), "model.vocab_size is not set, and no data set has filled it in."),
        (dict(vocab_size=V, max_len=5), "A sequence of 12 tokens is longer than model.max_len=5."),
    ],
)
def test_call_errors(fields, message):
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: Model(BlockSpec(width=16), **fields).init(jax.random.key(0), TOKENS))
    assert str(error.value) == message


def test_rotary_turns_pairs():
    with pytest.raises(UserError) as error:
        Model(BlockSpec(head_dim=15), position="rotary")
    assert str(error.value) == "model.position='rotary' turns pairs, so the head size must be even; it is 15."


@pytest.mark.parametrize("field", ["vocab_size", "max_len", "layers"])
def test_sizes_are_positive(field):
    with pytest.raises(UserError) as error:
        Model(**{field: 0})
    assert str(error.value) == f"model.{field}=0: must be at least 1."


def test_caches_need_positions():
    model = TINY["gpt2"]
    with pytest.raises(ValueError) as error:
        model.apply({"params": params_of(model)}, TOKENS, caches=model.init_caches(2, T))
    assert str(error.value) == "Decoding with caches needs the tokens' positions."


@pytest.mark.parametrize("name", TINY)
def test_a_prefix_sees_all_of_itself_and_nothing_later(name):
    model = TINY[name]
    prefix = jnp.array([5, 1])
    want = applied(model)(TOKENS, prefix=prefix)["logits"]
    # A token of the prefix changes all of the row, one behind it only what follows.
    for place, first in ((4, 0), (7, 7)):
        got = applied(model)(TOKENS.at[0, place].add(1) % V, prefix=prefix)["logits"]
        changed = np.max(np.abs(got[0] - want[0]), axis=-1) > 1e-6
        np.testing.assert_array_equal(changed, np.arange(T) >= first)
    # A prefix of one token is no prefix.
    np.testing.assert_allclose(want[1], applied(model)(TOKENS)["logits"][1], atol=1e-5)

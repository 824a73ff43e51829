"""What all encoder-decoders do alike: masks, precision, dropout, rules, errors."""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

V, S, T = 31, 7, 6
FAMILIES = ["encdec", "bart", "t5"]
SOURCE, TARGET = (jax.random.randint(jax.random.key(i), (2, n), 0, V) for i, n in enumerate((S, T)))
VALID = jnp.arange(S)[None] < jnp.array([[S], [S - 3]])


@functools.cache
def made(name: str, **fields):
    tiny = dict(width=16, heads=2, mlp_width=24, encoder_layers=1, decoder_layers=2, vocab_size=V)
    if name == "t5":
        tiny |= dict(head_dim=4)
    else:
        tiny |= dict(max_len=8, init_std=0.3)
    defaults = {key: field.default for key, field in section_fields("model", {"name": name}).items()}
    return build_model(defaults | {"name": name} | tiny | fields)


@functools.cache
def params_of(name: str, layer_loop: str = "loop"):
    """Every one random, so that biases and norms take part."""
    model = made(name, layer_loop=layer_loop)
    params = jax.jit(lambda key: model.init(key, SOURCE, TARGET)["params"])(jax.random.key(2))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.tree.unflatten(tree, list(jax.random.split(jax.random.key(3), len(leaves))))
    return jax.tree.map(lambda p, key: p + 0.1 * jax.random.normal(key, p.shape), params, keys)


@functools.cache
def applied(name: str):
    variables, model = {"params": params_of(name)}, made(name)
    return jax.jit(lambda *inputs, **more: model.apply(variables, *inputs, **more))


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs(name):
    out = applied(name)(SOURCE, TARGET, VALID)
    assert set(out) == {"hidden", "unembedding", "logits"} and out["logits"].shape == (2, T, V)
    want = np.einsum("btd,vd->btv", *(np.asarray(out[key], np.float64) for key in ("hidden", "unembedding")))
    np.testing.assert_allclose(out["logits"], want, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_of_the_source_is_not_seen(name):
    apply = applied(name)
    want = apply(SOURCE, TARGET, VALID)["logits"]
    other = jnp.where(VALID, SOURCE, (SOURCE + 1) % V)
    np.testing.assert_array_equal(apply(other, TARGET, VALID)["logits"], want)
    # Alone and shorter it is the same; without `valid` it is not.
    alone = apply(SOURCE[1:, : S - 3], TARGET[1:])["logits"]
    np.testing.assert_allclose(alone, want[1:], atol=1e-4)
    assert not np.allclose(apply(SOURCE, TARGET)["logits"][1], want[1], atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_later_targets_are_not_seen_and_all_of_the_source_is(name):
    apply = applied(name)
    want = apply(SOURCE, TARGET)["logits"]
    after = apply(SOURCE, TARGET.at[:, 3].add(1) % V)["logits"]
    np.testing.assert_array_equal(after[:, :3], want[:, :3])
    assert not np.allclose(after[:, 3:], want[:, 3:], atol=1e-3)
    moved = apply(SOURCE.at[:, -1].add(1) % V, TARGET)["logits"]
    assert np.all(np.max(np.abs(moved - want), axis=-1) > 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_of_the_target_is_not_seen(name):
    apply = applied(name)
    shown = jnp.broadcast_to(jnp.arange(T)[None] != 2, (2, T))
    want = apply(SOURCE, TARGET, decoder_valid=shown)["logits"]
    got = apply(SOURCE, TARGET.at[:, 2].add(1) % V, decoder_valid=shown)["logits"]
    np.testing.assert_array_equal(got[:, 3:], want[:, 3:])


def test_a_bias_that_all_layers_share_has_the_same_gradient_in_scan_and_remat():
    """It is one array beside the stack, so that its gradient is a sum over the layers."""

    def gradients(layer_loop, remat):
        model = made("t5", layer_loop=layer_loop, remat=remat)
        params = dict(params_of("t5"))
        if layer_loop == "scan":
            for side, count in (("encoder", 1), ("decoder", 2)):
                blocks = [params[side][f"block_{i}"] for i in range(count)]
                rest = {k: p for k, p in params[side].items() if not k.startswith("block_")}
                params[side] = rest | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}

        def loss(p):
            return jnp.mean(jnp.sin(model.apply({"params": p}, SOURCE, TARGET, VALID)["logits"]))

        found = flatten(jax.jit(jax.grad(loss))(params))
        return {key: x for key, x in found.items() if "block" not in key}

    want = gradients("loop", "none")
    assert np.any(np.abs(want["decoder_relative_bias/embedding"]) > 1e-5)
    for layer_loop, remat in (("scan", "none"), ("scan", "full"), ("loop", "full")):
        got = gradients(layer_loop, remat)
        assert set(got) == set(want)
        for key in want:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_only_when_training(name):
    model, variables = made(name, dropout=0.2, mlp_dropout=0.2), {"params": params_of(name)}
    want = applied(name)(SOURCE, TARGET)["logits"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, SOURCE, TARGET)["logits"], want, atol=1e-5)
    train = jax.jit(lambda key: model.apply(variables, SOURCE, TARGET, train=True, rngs={"dropout": key})["logits"])
    assert not np.allclose(train(jax.random.key(0)), want, atol=1e-3)
    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_keeps_parameters_and_logits_in_float32(name):
    model = made(name)
    model = model.clone(block=dataclasses.replace(model.block, dtype="bfloat16"))
    out = jax.jit(model.apply)({"params": params_of(name)}, SOURCE, TARGET, VALID)
    assert out["hidden"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32
    exact = applied(name)(SOURCE, TARGET, VALID)["logits"]
    assert np.max(np.abs(out["logits"] - exact)) < 0.05 * np.max(np.abs(exact))
    assert {p.dtype for p in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), SOURCE, TARGET))} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_rule(name, layer_loop):
    rules = importlib.import_module(f"tfm_jax.models.{name}").RULES
    for path, x in flatten(params_of(name, layer_loop)).items():
        dims = next((dims for pattern, dims in rules if re.search(pattern, path)), None)
        assert dims is not None and len(dims) == x.ndim - ("/blocks/" in path), path


@pytest.mark.parametrize("name", FAMILIES)
def test_example_makes_every_parameter(name):
    model = made(name)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example(3)))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params_of(name))


@pytest.mark.parametrize("name", ["encdec", "bart"])
def test_length_is_limited(name):
    long = jnp.zeros((1, 9), jnp.int32)
    for inputs in ((long, TARGET), (SOURCE, long)):
        with pytest.raises(UserError) as error:
            applied(name)(*inputs)
        assert str(error.value) == "A sequence of 9 tokens is longer than model.max_len=8."


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("field", ["vocab_size", "encoder_layers", "decoder_layers"])
def test_sizes(name, field):
    with pytest.raises(UserError) as error:
        made(name, **{field: 0})
    assert str(error.value) == f"model.{field}=0: must be at least 1."
    with pytest.raises(UserError, match=r"^model\.vocab_size is not set"):
        jax.eval_shape(lambda: made(name, vocab_size=None).init(jax.random.key(0), SOURCE, TARGET))


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoder_needs_a_source(name, layer_loop):
    model, variables = made(name, layer_loop=layer_loop), {"params": params_of(name, layer_loop)}
    caches, message = (
        model.init_caches(2, T),
        "Without tokens the decoder needs caches that a call with tokens has returned.",
    )
    with pytest.raises(ValueError) as error:
        model.apply(variables, None, TARGET)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        model.apply(variables, None, TARGET, positions=jnp.zeros_like(TARGET), caches=caches)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        model.apply(variables, SOURCE, TARGET, caches=caches)
    assert str(error.value) == "Decoding with caches needs the tokens' positions."

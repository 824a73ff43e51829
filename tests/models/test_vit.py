"""ViT and DeiT: published sizes, patches against a convolution, positions against PyTorch, tokens, sharding rules."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.models import deit, vit
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model, section_fields

SPEC = dataclasses.replace(vit.SPEC, width=16, heads=2, mlp_width=24)
SIZES = dict(image_size=12, patch=4, channels=2, classes=7, layers=2)
TINY = {"vit": vit.Model(SPEC, **SIZES), "deit": deit.Model(SPEC, **SIZES)}
IMAGES = np.asarray(np.random.default_rng(0).normal(size=(3, 12, 12, 2)), np.float32)


@functools.cache
def params_of(name):
    """All random, biases and tokens too."""
    shapes = jax.eval_shape(lambda: TINY[name].init(jax.random.key(0), IMAGES))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@functools.cache
def applied(name):
    params = params_of(name)  # here: made while the function is traced, they would be kept as tracers
    return jax.jit(lambda images: TINY[name].apply({"params": params}, images))


def variant(family, name, **fields):
    defaults = section_fields("model", dict(name=family, variant=name))
    return build_model({key: field.default for key, field in defaults.items()} | {"name": family} | fields)


def shapes(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]


# `transformers` with 1,000 classes.
@pytest.mark.parametrize(
    ("family", "name", "count"),
    [
        ("vit", "vit-tiny-patch16-224", 5_717_416),
        ("vit", "vit-small-patch16-224", 22_050_664),
        ("vit", "vit-base-patch16-224", 86_567_656),
        ("vit", "vit-base-patch32-224", 88_224_232),
        ("vit", "vit-large-patch16-224", 304_326_632),
        ("vit", "vit-huge-patch14-224", 632_045_800),
        ("deit", "deit-tiny-distilled-patch16-224", 5_910_800),
        ("deit", "deit-small-distilled-patch16-224", 22_436_432),
        ("deit", "deit-base-distilled-patch16-224", 87_338_192),
    ],
)
def test_published_parameter_counts(family, name, count):
    made = shapes(variant(family, name, classes=1000, layer_loop="scan"))
    assert sum(x.size for x in jax.tree.leaves(made)) == count


def test_every_published_variant_is_counted():
    counted = test_published_parameter_counts.pytestmark[0].args[1]
    assert {name for _, name, _ in counted} == {*vit.VARIANTS, *deit.VARIANTS}


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_rule(name):
    for path in flatten(params_of(name)):
        assert any(re.search(pattern, path) for pattern, _ in {"vit": vit, "deit": deit}[name].RULES), path


def test_outputs_of_vit():
    out = applied("vit")(IMAGES)
    assert {key: x.shape for key, x in out.items()} == {"states": (3, 10, 16), "features": (3, 16), "logits": (3, 7)}
    np.testing.assert_array_equal(out["features"], out["states"][:, 0])
    head = jax.device_get(params_of("vit"))["head"]["dense"]
    np.testing.assert_allclose(out["logits"], np.asarray(out["features"]) @ head["kernel"] + head["bias"], atol=1e-5)


def test_outputs_of_deit():
    out, params = applied("deit")(IMAGES), jax.device_get(params_of("deit"))
    assert out["states"].shape == (3, 11, 16)
    for place, name in enumerate(("class", "distillation")):
        head = params[f"{name}_head"]["dense"]
        want = np.asarray(out["states"][:, place]) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(out[f"{name}_logits"], want, atol=1e-5)
    np.testing.assert_allclose(out["logits"], (out["class_logits"] + out["distillation_logits"]) / 2, atol=1e-6)
    np.testing.assert_array_equal(out["features"], out["states"][:, 0])


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_keeps_parameters_and_logits_in_float32(name):
    model = TINY[name].clone(block=dataclasses.replace(SPEC, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(shapes(model))} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)({"params": params_of(name)}, IMAGES)
    assert out["logits"].dtype == jnp.float32 and out["states"].dtype == jnp.bfloat16
    # Eight bits of mantissa.
    want = applied(name)(IMAGES)["logits"]
    np.testing.assert_allclose(out["logits"], want, atol=0.05 * np.max(np.abs(want)))


def test_positions_tell_patches_apart():
    """Without positions a Transformer would not see the order of the patches."""
    moved = IMAGES.copy()
    moved[:, :4, :4], moved[:, 4:8, 8:] = IMAGES[:, 4:8, 8:], IMAGES[:, :4, :4]
    params = params_of("vit")
    table = params["embeddings"]["position_embedding"]["embedding"]
    blind = params | {"embeddings": params["embeddings"] | {"position_embedding": {"embedding": 0 * table}}}
    apply = jax.jit(lambda params, images: TINY["vit"].apply({"params": params}, images)["logits"])
    np.testing.assert_allclose(apply(blind, moved), apply(blind, IMAGES), atol=1e-5)
    assert np.max(np.abs(apply(params, moved) - apply(params, IMAGES))) > 1e-2


def test_dropout_only_when_training():
    model = TINY["vit"].clone(block=dataclasses.replace(SPEC, dropout=0.3))
    variables, want = {"params": params_of("vit")}, applied("vit")(IMAGES)["logits"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, IMAGES)["logits"], want, atol=1e-5)
    train = jax.jit(lambda key: model.apply(variables, IMAGES, train=True, rngs={"dropout": key})["logits"])
    assert not np.allclose(train(jax.random.key(0)), want, atol=1e-3)
    assert not np.allclose(train(jax.random.key(0)), train(jax.random.key(1)), atol=1e-3)


@pytest.mark.parametrize("family", [vit, deit])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(patch=5), "model.patch=5 does not divide model.image_size=12. Nearest that do: 4, 6."),
        (dict(layers=0), "model.layers=0: must be at least 1."),
        (dict(classes=0), "model.classes=0: must be at least 1."),
    ],
)
def test_sizes_that_cannot_be(family, fields, message):
    with pytest.raises(UserError) as error:
        family.Model(SPEC, **(SIZES | fields))
    assert str(error.value) == message


@pytest.mark.parametrize("family", [vit, deit])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(classes=None), "model.classes is not set, and no data set has filled it in."),
        (
            dict(classes={"a": 2}),
            "model.classes={'a': 2}: several heads by name are for encoders of text (BERT, ALBERT, ELECTRA, Longformer).",
        ),
        (
            dict(image_size=16),
            "Images of 12 x 12 x 2 (height, width, channels), but model.image_size=16 and model.channels=2.",
        ),
        (
            dict(channels=3),
            "Images of 12 x 12 x 2 (height, width, channels), but model.image_size=12 and model.channels=3.",
        ),
    ],
)
def test_call_errors(family, fields, message):
    model = family.Model(BlockSpec(width=16, heads=2), **(SIZES | fields))
    with pytest.raises(UserError) as error:
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES))
    assert str(error.value) == message

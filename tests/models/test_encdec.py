"""The Transformer of 2017: published sizes, sinusoids, the scale of its embeddings, the bias on its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax import config as configs
from tfm_jax.convert import huggingface
from tfm_jax.errors import UserError
from tfm_jax.models.encdec import SPEC, VARIANTS, Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.sections import build_model

V, D = 23, 8
IDS = jnp.array([[3, 3, 3, 9, 1]], jnp.int32)


def variant(family: str, name: str, **fields):
    """As a config of that variant, and these fields, would have it."""
    section = {"name": family, "variant": name, **fields}
    return build_model(
        configs.resolve({"model": section, "data": {"source": "stdlib"}, "train": {"steps": 1}})["model"]
    )


def count(family: str, name: str, **fields) -> int:
    model = variant(family, name, layer_loop="scan", **fields)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))
    return sum(x.size for x in jax.tree.leaves(shapes))


def tiny(**fields) -> Model:
    block = BlockSpec(width=D, heads=2, norm_position="post", init="normal", init_std=0.5)
    return Model(block, V, **{"max_len": 6, "encoder_layers": 1, "decoder_layers": 1, **fields})


def params_of(model: Model):
    return jax.jit(lambda key: model.init(key, IDS, IDS)["params"])(jax.random.key(1))


def test_published_parameter_counts():
    """Theirs has 74,410,496, two tables of sinusoids included; our bias on the logits is a buffer of theirs."""
    assert count("encdec", "opus-mt") == 74_410_496 - 2 * 512 * 512 + 58_101


@pytest.mark.parametrize(("name", "millions"), [("transformer-base", 65), ("transformer-big", 213)])
def test_the_papers_sizes(name, millions):
    """Table 3, for a shared vocabulary of about 37,000 (section 5.1), which it gives no closer."""
    assert abs(count("encdec", name, vocab_size=37_000) / 1e6 - millions) < 2


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant("encdec", name, vocab_size=V)
    assert model.block.width == VARIANTS[name]["width"] and model.block.norm_position == "post"


def test_a_published_config_is_the_variant():
    """Helsinki-NLP/opus-mt-en-de's, with what else is in such files."""
    theirs = dict(
        architectures=["MarianMTModel"], model_type="marian", _num_labels=3, activation_dropout=0.0,
        activation_function="swish", add_bias_logits=False, add_final_layer_norm=False, attention_dropout=0.0,
        bad_words_ids=[[58100]], bos_token_id=0, classif_dropout=0.0, classifier_dropout=0.0, d_model=512,
        decoder_attention_heads=8, decoder_ffn_dim=2048, decoder_layerdrop=0.0, decoder_layers=6,
        decoder_start_token_id=58100, decoder_vocab_size=58101, dropout=0.1, encoder_attention_heads=8,
        encoder_ffn_dim=2048, encoder_layerdrop=0.0, encoder_layers=6, eos_token_id=0, forced_eos_token_id=0,
        id2label={"0": "LABEL_0"}, init_std=0.02, is_encoder_decoder=True, max_length=512, max_position_embeddings=512,
        normalize_before=False, normalize_embedding=False, num_beams=6, num_hidden_layers=6, pad_token_id=58100,
        scale_embedding=True, share_encoder_decoder_embeddings=True, static_position_embeddings=True, vocab_size=58101,
    )  # fmt: skip
    section = huggingface.read_section(huggingface.find(theirs), theirs, where="it")
    given = {"model": section, "data": {"source": "stdlib"}, "train": {"steps": 1}}
    got = build_model(configs.resolve(given)["model"])
    assert got == variant("encdec", "opus-mt", dropout=0.1, mlp_width=2048)


def test_embeddings_are_scaled_and_placed():
    """Section 3.4 and 3.5, by the paper's formula; its sines and cosines in turn are ours in halves."""
    x = np.random.default_rng(0).normal(size=(1, 5, D)).astype(np.float32)
    places = np.array([[0, 1, 2, 3, 5]])
    want = np.zeros((1, 5, D))
    for t, place in enumerate(places[0]):
        for i in range(D // 2):
            angle = place / 10_000 ** (2 * i / D)
            want[0, t, i] = x[0, t, i] * np.sqrt(D) + np.sin(angle)
            want[0, t, D // 2 + i] = x[0, t, D // 2 + i] * np.sqrt(D) + np.cos(angle)
    np.testing.assert_allclose(tiny().embedded("encoder", x, places), want, atol=1e-5)
    plain = tiny(embedding_scale="none").embedded("decoder", x, places)
    np.testing.assert_allclose(plain, want - x * (np.sqrt(D) - 1), atol=1e-5)


def test_bias_is_added_to_the_logits():
    model = tiny()
    params = params_of(model)
    assert not np.any(params["logits_bias"])
    bias = jnp.arange(V) / 7
    out = jax.jit(lambda p: model.apply({"params": p}, IDS, IDS))
    before, after = out(params)["logits"], out(params | {"logits_bias": bias})["logits"]
    np.testing.assert_allclose(after, before + bias[None, None], atol=1e-5)


def test_initialisation_is_glorots():
    spec = BlockSpec(width=64, heads=4, norm_position="post", init=SPEC.init)
    model = Model(spec, 99, encoder_layers=1, decoder_layers=1)
    params = jax.jit(lambda key: model.init(key, IDS, IDS)["params"])(jax.random.key(1))
    for side in ("encoder", "decoder"):
        block = params[side]["block_0"]
        np.testing.assert_allclose(np.std(block["attention"]["query"]["kernel"]), (2 / 128) ** 0.5, rtol=0.05)
        np.testing.assert_allclose(np.std(block["mlp"]["down"]["kernel"]), (2 / 320) ** 0.5, rtol=0.05)


def test_sinusoids_come_in_pairs():
    with pytest.raises(UserError) as error:
        Model(BlockSpec(width=9, heads=3))
    assert str(error.value) == "model.width=9: sinusoidal positions need an even one."

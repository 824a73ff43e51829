"""BART: published sizes, and what its embeddings are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax import config as configs
from tfm_jax.convert import huggingface
from tfm_jax.models.bart import VARIANTS, Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.sections import build_model

from .test_encdec import count, variant

V, D = 23, 8
IDS = jnp.array([[3, 3, 3, 9, 1]], jnp.int32)


@pytest.mark.parametrize(("name", "parameters"), [("bart-base", 139_420_416), ("bart-large", 406_291_456)])
def test_published_parameter_counts(name, parameters):
    assert count("bart", name) == parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant("bart", name, vocab_size=V)
    assert model.block.width == VARIANTS[name]["width"] and model.block.activation == "gelu"


def test_a_published_config_is_the_variant():
    """facebook/bart-base's, with what else is in such files; it names the class without a head."""
    theirs = dict(
        _num_labels=3, activation_dropout=0.1, activation_function="gelu", add_bias_logits=False,
        add_final_layer_norm=False, architectures=["BartModel"], attention_dropout=0.1, bos_token_id=0,
        classif_dropout=0.1, classifier_dropout=0.0, d_model=768, decoder_attention_heads=12, decoder_ffn_dim=3072,
        decoder_layerdrop=0.0, decoder_layers=6, decoder_start_token_id=2, dropout=0.1, early_stopping=True,
        encoder_attention_heads=12, encoder_ffn_dim=3072, encoder_layerdrop=0.0, encoder_layers=6, eos_token_id=2,
        forced_eos_token_id=2, forced_bos_token_id=0, gradient_checkpointing=False, id2label={"0": "LABEL_0"},
        init_std=0.02, is_encoder_decoder=True, max_position_embeddings=1024, model_type="bart",
        no_repeat_ngram_size=3, normalize_before=False, normalize_embedding=True, num_beams=4, num_hidden_layers=6,
        pad_token_id=1, scale_embedding=False, task_specific_params={}, torch_dtype="float32", use_cache=True,
        vocab_size=50265,
    )  # fmt: skip
    section = huggingface.read_section(huggingface.find(theirs), theirs, where="it")
    given = {"model": section, "data": {"source": "stdlib"}, "train": {"steps": 1}}
    got = build_model(configs.resolve(given)["model"])
    assert got == variant("bart", "bart-base", mlp_dropout=0.1, attention_dropout=0.1, mlp_width=3072)


def test_embeddings_are_placed_and_normalised():
    """norm(token + position), the first two rows of the position tables being unused, each side with its own."""
    model = Model(BlockSpec(width=D, heads=2, norm_position="post", init_std=0.5), V, 6, 1, 1)
    params = jax.jit(lambda key: model.init(key, IDS, IDS)["params"])(jax.random.key(1))
    seen = model.apply(
        {"params": params}, IDS, IDS, capture_intermediates=lambda module, _: "embedding_norm" in str(module.name)
    )[1]["intermediates"]
    x = np.asarray(params["token_embedding"]["embedding"])[np.asarray(IDS)]
    for side in ("encoder", "decoder"):
        table = np.asarray(params[f"{side}_position_embedding"]["embedding"])
        assert table.shape == (6 + 2, D)
        y = x + table[None, 2:7]
        y = y - y.mean(axis=-1, keepdims=True)
        y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(seen[f"{side}_embedding_norm"]["__call__"][0], y, atol=1e-5)
    tables = [params[f"{side}_position_embedding"]["embedding"] for side in ("encoder", "decoder")]
    assert not np.allclose(*tables)

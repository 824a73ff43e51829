"""Tensors of the reference that no parameter stands for: left out of a file, there, or not what they should be."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from tfm_jax.convert import huggingface
from tfm_jax.convert.weights import read_params
from tfm_jax.errors import UserError

from .test_families import converted, fixture, part

SINUSOIDS = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]


def read(name, weights):
    conversion, section, _, params = converted(fixture(name))
    return read_params(conversion, section, params, weights, where="it")


@pytest.mark.parametrize(("name", "tensors"), [("marian", SINUSOIDS), ("bart", ["final_logits_bias"])])
def test_may_be_left_out(name, tensors):
    weights = part(fixture(name), "weight")
    assert set(tensors) < set(weights)
    want = read(name, weights)
    got = read(name, {key: x for key, x in weights.items() if key not in tensors})
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_head_that_is_left_out_is_the_token_table():
    weights = part(fixture("t5_v11"), "weight")
    assert not np.array_equal(weights["lm_head.weight"], weights["shared.weight"])
    got = read("t5_v11", {key: x for key, x in weights.items() if key != "lm_head.weight"})
    np.testing.assert_array_equal(got["unembedding"]["embedding"], weights["shared.weight"])
    np.testing.assert_array_equal(read("t5_v11", weights)["unembedding"]["embedding"], weights["lm_head.weight"])


@pytest.mark.parametrize("dtype", [np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)])
def test_may_be_rounded(dtype):
    weights = part(fixture("marian"), "weight")
    got = read("marian", weights | {key: weights[key].astype(dtype) for key in SINUSOIDS})
    jax.tree.map(np.testing.assert_array_equal, got, read("marian", weights))


@pytest.mark.parametrize(("name", "tensor"), [("marian", SINUSOIDS[1]), ("bart", "final_logits_bias")])
def test_must_be_what_is_computed(name, tensor):
    weights = part(fixture(name), "weight")
    changed = weights[tensor].copy()
    changed[0, 3] += 0.01
    with pytest.raises(UserError) as error:
        read(name, weights | {tensor: changed})
    assert f"  {tensor}: is not what this model computes in its place" in str(error.value)


def test_interleaved_sinusoids_are_refused():
    """The order of the paper, which other libraries store."""
    weights = part(fixture("marian"), "weight")
    halves = np.split(weights[SINUSOIDS[0]], 2, axis=1)
    interleaved = np.stack(halves, axis=2).reshape(weights[SINUSOIDS[0]].shape)
    with pytest.raises(UserError, match="is not what this model computes"):
        read("marian", weights | {SINUSOIDS[0]: interleaved})


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("bart", {"decoder_ffn_dim": 28}, "decoder_ffn_dim=28 is not supported with encoder_ffn_dim=24"),
        ("bart", {"encoder_ffn_dim": None}, "decoder_ffn_dim=24 is not supported with encoder_ffn_dim=4096"),
        ("bart", {"decoder_layerdrop": 0.1}, "decoder_layerdrop=0.1 is not supported"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False is not"),
        ("marian", {"decoder_vocab_size": 60}, "decoder_vocab_size=60 is not supported"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh' is not supported"),
    ],
)
def test_fields_that_change_the_numbers_are_refused(name, changes, problem):
    """None leaves a field out, for which their class has a default."""
    config = json.loads(str(fixture(name)["config"])) | changes
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    with pytest.raises(UserError) as error:
        huggingface.read_section(huggingface.find(config), config, where="it")
    assert problem in str(error.value)

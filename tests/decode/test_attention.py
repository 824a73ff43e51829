"""What heads look at, beside softmax by hand over the scores that blocks say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.decode.attention import attention_weights, chosen
from tfm_jax.nn.capture import SAID
from tfm_jax.paths import flatten
from tfm_jax.sections import build_model

TOKENS = np.array([[3, 1, 4, 1, 5, 9]], np.int32)


@pytest.fixture(scope="module")
def gpt():
    """Keys shared by two heads each, and 11 layers; weights large enough to look somewhere."""
    sizes = {"vocab_size": 11, "layers": 11, "width": 8, "heads": 4, "kv_heads": 2, "max_len": 8}
    model = build_model({"name": "gpt", **sizes})
    params = model.init(jax.random.key(0), TOKENS, train=False)["params"]
    return model, jax.tree.map(lambda x: 3 * x, params)


def test_softmax_by_hand(gpt):
    model, params = gpt
    layers = attention_weights(model, params, {"tokens": TOKENS})
    assert [layer.where for layer in layers] == [f"stack/block_{i}/attention" for i in range(11)]
    said = flatten(model.apply({"params": params}, TOKENS, train=False, mutable=[SAID])[1][SAID])
    near = np.tril(np.ones((6, 6)))
    for layer in layers:
        scores = np.asarray(said[f"{layer.where}/scores"], np.float64)[0]
        weights = np.exp(scores) * near[None]
        np.testing.assert_allclose(layer.weights, weights / weights.sum(-1, keepdims=True), atol=1e-5)
    assert max(np.abs(layer.weights - near / near.sum(-1, keepdims=True)).max() for layer in layers) > 0.1


def test_scanned_layers_are_the_same(gpt):
    model, params = gpt
    blocks = [params["stack"][f"block_{i}"] for i in range(11)]
    rest = {key: value for key, value in params["stack"].items() if not key.startswith("block_")}
    stacked = {**params, "stack": {**rest, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}
    scanned = attention_weights(model.clone(layer_loop="scan"), stacked, {"tokens": TOKENS})
    for a, b in zip(attention_weights(model, params, {"tokens": TOKENS}), scanned, strict=True):
        np.testing.assert_allclose(a.weights, b.weights, atol=1e-5)


def test_an_encoder_decoder_looks_three_ways():
    sizes = {"vocab_size": 11, "encoder_layers": 1, "decoder_layers": 1, "width": 8, "heads": 2, "max_len": 8}
    model = build_model({"name": "bart", **sizes})
    inputs = {"tokens": TOKENS, "decoder_tokens": TOKENS[:, :3]}
    params = model.init(jax.random.key(0), **inputs, train=False)["params"]
    found = {layer.where: layer.weights.shape for layer in attention_weights(model, params, inputs)}
    assert found == {
        "decoder/block_0/attention": (2, 3, 3),
        "decoder/block_0/cross_attention": (2, 3, 6),
        "encoder/block_0/attention": (2, 6, 6),
    }


def test_chosen_heads(gpt):
    model, params = gpt
    layers = attention_weights(model, params, {"tokens": TOKENS})
    ((title, weights),) = chosen(layers, ["10.3"])
    assert title == "10.3  stack/block_10/attention"
    np.testing.assert_array_equal(weights, layers[10].weights[3])
    assert [name.split()[0] for name, _ in chosen(layers, [], most=5)] == ["0.0", "0.1", "0.2", "0.3", "1.0"]
    with says("--heads=11.0: heads are LAYER.HEAD, from 0.0 to 10.3."):
        chosen(layers, ["11.0"])

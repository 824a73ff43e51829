"""T5: published sizes, relative positions, initialisation, its two heads."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax import config as configs
from tfm_jax.convert import huggingface
from tfm_jax.errors import UserError
from tfm_jax.models.t5 import SPEC, VARIANTS, Model, RelativeBias, buckets
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.sections import build_model

from .test_encdec import count, variant

V = 23
IDS = jnp.array([[3, 5, 3, 9, 1]], jnp.int32)
TINY = BlockSpec(
    width=16, heads=2, head_dim=4, norm="rms", activation="relu", bias="none", attention_scale="none", init="fan_in"
)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("t5-large", 737_668_096),
        ("t5-3b", 2_851_598_336),
        ("t5-11b", 11_307_321_344),
        ("t5-v1.1-small", 76_961_152),
        ("t5-v1.1-base", 247_577_856),
        ("t5-v1.1-large", 783_150_080),
        ("t5-v1.1-xl", 2_849_757_184),
        ("t5-v1.1-xxl", 11_135_332_352),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert count("t5", name) == parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_model(name):
    model = variant("t5", name, vocab_size=V)
    assert model.block.width == VARIANTS[name]["width"] and model.block.attention_scale == "none"


@pytest.mark.parametrize(("name", "version"), [("t5-small", {}), ("t5-v1.1-small", {"old": 1}), ("t5-v1.1-small", {})])
def test_a_published_config_is_the_variant(name, version):
    """Of google's folders; of version 1.1 as it was written first, and as newer releases write it."""
    theirs = dict(
        architectures=["T5ForConditionalGeneration"], d_ff=2048, d_kv=64, d_model=512, decoder_start_token_id=0,
        dropout_rate=0.1, eos_token_id=1, initializer_factor=1.0, is_encoder_decoder=True, layer_norm_epsilon=1e-06,
        model_type="t5", n_positions=512, num_heads=8, num_layers=6, output_past=True, pad_token_id=0,
        relative_attention_num_buckets=32, task_specific_params={}, vocab_size=32128,
    )  # fmt: skip
    if name != "t5-small":
        theirs |= dict(d_ff=1024, num_heads=6, num_layers=8, num_decoder_layers=8, feed_forward_proj="gated-gelu")
        theirs |= dict(tie_word_embeddings=False) if version else dict(
            tie_word_embeddings=True, scale_decoder_outputs=False, dense_act_fn="gelu_new", is_gated_act=True
        )  # fmt: skip
    section = huggingface.read_section(huggingface.find(theirs), theirs, where="it")
    given = {"model": section, "data": {"source": "stdlib"}, "train": {"steps": 1}}
    got = build_model(configs.resolve(given)["model"])
    assert got == variant("t5", name, dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)


def slow_bucket(offset: int, count: int, max_distance: int, directions: int) -> int:
    """The rule of Raffel et al. 2020, section 2.1, as it is released: exact near by, then by the logarithm."""
    first = 0
    if directions == 2:
        count //= 2
        first = count if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    # Their float32 rounds edges up that fall short of a whole number by an ulp in float64.
    grown = math.log(distance / exact) / math.log(max_distance / exact) * (count - exact)
    return first + min(exact + int(grown + 1e-6), count - 1)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("count", "max_distance"), [(32, 128), (32, 256), (8, 20), (4, 5)])
def test_buckets(count, max_distance, directions):
    offsets = np.arange(-max_distance - 40, max_distance + 41)
    got = buckets(jnp.asarray(offsets), count, max_distance, directions=directions)
    np.testing.assert_array_equal(got, [slow_bucket(int(x), count, max_distance, directions) for x in offsets])


def test_the_published_buckets():
    """What `transformers` 5.23 answers for T5's own sizes, at the first distance of each bucket."""
    two = buckets(-jnp.arange(140), 32, 128, directions=2)
    one = buckets(-jnp.arange(140), 32, 128, directions=1)
    starts = [int(np.argmax(two == i)) for i in range(16)]
    assert starts == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91] and int(jnp.max(two)) == 15
    starts = [int(np.argmax(one == i)) for i in range(32)]
    assert starts == [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def tiny(**fields) -> Model:
    return Model(
        TINY, V, encoder_layers=1, decoder_layers=2, **{"relative_buckets": 8, "relative_max_distance": 12} | fields
    )


def params_of(model: Model):
    params = jax.jit(lambda key: model.init(key, IDS, IDS)["params"])(jax.random.key(1))
    for side in ("encoder", "decoder"):
        table = params[f"{side}_relative_bias"]
        table["embedding"] = 3 * jax.random.normal(jax.random.key(2), table["embedding"].shape)
    return params


def test_only_distances_count():
    model = tiny()
    variables = {"params": params_of(model)}
    places = jnp.arange(5)[None]
    run = jax.jit(lambda places: model.apply(variables, IDS, IDS, positions=places)["logits"])
    np.testing.assert_allclose(run(places + 100), run(places), atol=1e-5)
    assert not np.allclose(run(places * 2), run(places), atol=1e-3)


@pytest.mark.parametrize("directions", [1, 2])
def test_bias_is_the_buckets_own(directions):
    table = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    queries, keys = np.array([[2, 30]]), np.arange(40)[None]
    bias = RelativeBias(2, 8, 12, directions, 1.0).apply({"params": {"embedding": table}}, queries, keys)
    assert bias.shape == (1, 2, 2, 40)
    for t, query in enumerate(queries[0]):
        for s in range(40):
            row = slow_bucket(s - int(query), 8, 12, directions)
            np.testing.assert_array_equal(bias[0, :, t, s], table[row])


def test_heads():
    """Version 1.0 multiplies the states over sqrt(D) by the token table, version 1.1 by a table of its own."""
    tied, free = tiny(), tiny(output="free")
    params = params_of(tied)
    out = tied.apply({"params": params}, IDS, IDS)
    own = jax.random.normal(jax.random.key(4), (V, 16))
    other = free.apply({"params": params | {"unembedding": {"embedding": own}}}, IDS, IDS)
    np.testing.assert_array_equal(out["unembedding"], params["token_embedding"]["embedding"])
    np.testing.assert_array_equal(other["unembedding"], own)
    np.testing.assert_allclose(out["hidden"] * 4, other["hidden"], rtol=1e-5)


def test_initialisation():
    """Of the released code: what is left out of the attention's scale is in the queries."""
    block = BlockSpec(width=128, heads=4, head_dim=32, mlp_width=512, norm="rms", bias="none", mlp="gated",
                      attention_scale="none", init=SPEC.init, init_std=SPEC.init_std)  # fmt: skip
    model = Model(block, 999, encoder_layers=1, decoder_layers=1, output="free")
    params = jax.jit(lambda key: model.init(key, IDS, IDS)["params"])(jax.random.key(1))
    for side, kinds in (("encoder", ["attention"]), ("decoder", ["attention", "cross_attention"])):
        layer = params[side]["block_0"]
        for kind in kinds:
            std = {name: float(np.std(p["kernel"])) for name, p in layer[kind].items()}
            np.testing.assert_allclose(std["query"], (128 * 32) ** -0.5, rtol=0.05)
            np.testing.assert_allclose([std["key"], std["value"], std["out"]], 128**-0.5, rtol=0.05)
        std = {name: float(np.std(p["kernel"])) for name, p in layer["mlp"].items()}
        np.testing.assert_allclose([std["up"], std["gate"]], 128**-0.5, rtol=0.05)
        np.testing.assert_allclose(std["down"], 512**-0.5, rtol=0.05)
        np.testing.assert_allclose(np.std(params[f"{side}_relative_bias"]["embedding"]), 128**-0.5, rtol=0.2)
    np.testing.assert_allclose(np.std(params["token_embedding"]["embedding"]), 1, rtol=0.03)
    np.testing.assert_allclose(np.std(params["unembedding"]["embedding"]), 128**-0.5, rtol=0.03)


def test_there_is_no_longest_sequence():
    model = tiny()
    shape = jax.eval_shape(model.apply, {"params": params_of(model)}, jnp.zeros((1, 3000), jnp.int32), IDS)
    assert shape["logits"].shape == (1, 5, V)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(relative_buckets=6), "model.relative_buckets=6: a multiple of 4, since two directions halve it."),
        (
            dict(relative_max_distance=4),
            "model.relative_max_distance=4: must be larger than half of model.relative_buckets=8, the distances that"
            " have a bucket of their own.",
        ),
    ],
)
def test_errors(fields, message):
    with pytest.raises(UserError) as error:
        tiny(**fields)
    assert str(error.value) == message

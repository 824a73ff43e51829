"""muP: factors by hand, training beside multipliers that stand where the paper has them, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm_jax import config as configs
from tfm_jax.errors import UserError
from tfm_jax.nn import attention
from tfm_jax.paths import flatten, map_with_path
from tfm_jax.sections import build_model
from tfm_jax.tasks.base import bind
from tfm_jax.train import mup, optim
from tfm_jax.train.build import build
from tfm_jax.train.mup import Scale

# Four times as wide as the base: the head size too, unless there are more heads.
WIDE = {"model.width": 64, "model.heads": 2, "model.bias": "none", "train.mup": {"width": 16}, "model.vocab_size": 264}
HIDDEN, QUERY = Scale(1, 1 / 2, 1 / 4), Scale(1 / 2, 1 / 2, 1 / 4)
TABLE, NORM, READOUT = Scale(), Scale(), Scale(multiplier=1 / 4)


def scales(config):
    """By path without the stack's name."""
    mup.check(config)
    found = mup.scales(
        config, lambda model: jax.eval_shape(lambda: model.init(jax.random.key(0), **model.example()))["params"]
    )
    return {path.removeprefix("stack/"): scale for path, scale in found.items()}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"block_0/attention/query/kernel": QUERY, "block_0/attention/key/kernel": HIDDEN,
              "block_0/attention/out/kernel": HIDDEN, "block_0/mlp/up/kernel": HIDDEN, "block_0/mlp/down/kernel": HIDDEN,
              "block_0/mlp_norm/scale": NORM, "final_norm/scale": READOUT, "token_embedding/embedding": TABLE,
              "position_embedding/embedding": TABLE}),
        # More heads of one size: their scores need nothing.
        ({"model.heads": 8, "train.mup": {"width": 16, "heads": 2}}, {"block_0/attention/query/kernel": HIDDEN}),
        ({"model.layer_loop": "scan", "model.output": "free", "model.qk_norm": "head"},
         {"blocks/attention/query/kernel": HIDDEN, "blocks/attention/query_norm/scale": Scale(multiplier=1 / 2),
          "blocks/attention/key_norm/scale": NORM, "blocks/mlp/up/kernel": HIDDEN, "final_norm/scale": NORM,
          "unembedding/embedding": READOUT}),
        ({"model.experts": 4, "model.bias": "none"},
         {"block_0/mlp/experts/up/kernel": HIDDEN, "block_0/mlp/router/kernel": READOUT}),
        # An orthogonal update has the whole rank: its size goes with sqrt(fan in).
        ({"optim.name": "muon"}, {"block_0/attention/query/kernel": Scale(1 / 2, 1 / 2, 1 / 2), "final_norm/scale": READOUT,
                                  "block_0/mlp/down/kernel": Scale(1, 1 / 2, 1 / 2)}),
    ],
)  # fmt: skip
def test_factors_by_hand(make_config, changes, expected):
    """Table 8 of the paper at four times the base's width; parameters that are not listed do not matter here."""
    found = scales(configs.changed(make_config(), WIDE | changes))
    assert {path: found[path] for path in expected} == expected


def test_heads_of_an_encoder(make_config):
    """A layer to classes leads out of the width, one from pixels into it."""
    section = {
        "name": "vit",
        "width": 64,
        "heads": 4,
        "layers": 1,
        "image_size": 8,
        "patch": 4,
        "classes": 10,
        "bias": "all",
    }
    data = {"name": "synthetic", "kind": "images", "image_size": 8}
    config = {
        "model": section,
        "data": data,
        "task": {"name": "classification"},
        "train": {"steps": 1, "mup": {"width": 16}},
    }
    found = scales(configs.resolve(config))
    assert found["head/dense/kernel"] == READOUT and found["head/dense/bias"] == Scale()
    assert found["embeddings/patch_embedding/kernel"] == Scale()
    assert found["block_0/attention/query/bias"] == Scale(multiplier=1 / 2)


def test_at_the_base_nothing_changes(make_config):
    """Not one bit of the state after two steps."""
    states = []
    for sizes in (None, {"width": 16}):
        built = build(configs.changed(make_config({"mesh.data": 8}), {"train.mup": sizes}))
        with jax.set_mesh(built.layout.mesh):
            state, step = built.fresh_state(), built.jitted_step()
            for i in range(2):
                state, _ = step(state, built.batch(i))
            states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_training_is_that_of_explicit_multipliers(make_config, monkeypatch):
    """Three updates of w by AdamW written out, where logits and scores are multiplied as in the paper, give a w."""
    lr, decay = 0.02, 0.1
    constant = {"optim.lr": lr, "optim.schedule": "constant", "optim.warmup_steps": 0, "mesh.data": 1}
    config = configs.changed(make_config(), WIDE | constant | {"optim.weight_decay": decay})
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_, found=jax.devices()[:1]: found)
        built = build(config)
    with jax.set_mesh(built.layout.mesh):
        batches, state = [jax.device_get(built.batch(i)) for i in range(3)], built.fresh_state()
        step = built.jitted_step()
        begin = jax.device_get(state.params)
        for batch in batches:
            state, _ = step(state, batch)
        got = jax.device_get(state.params)

    plain = build_model(built.config["model"])
    found = scales(built.config)
    by_path = {path: found[path.removeprefix("stack/")] for path in flatten(begin)}
    w = map_with_path(lambda path, x: x / by_path[path].multiplier, begin)
    # The head size is 32, at the base 8: q k / 32 * sqrt(8).
    original = attention.attention
    monkeypatch.setattr(
        attention,
        "attention",
        lambda q, k, v, mask, *, scale, **more: original(q, k, v, mask, scale=8**0.5 / 32, **more),
    )

    @jax.jit
    def gradient(w, batch):
        def loss(w):
            logits = bind(plain, {})(w, **batch["inputs"], train=True)["logits"] / 4
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))

        return jax.grad(loss)(w)

    first, second = (jax.tree.map(np.zeros_like, w) for _ in range(2))
    for t, batch in enumerate(batches, start=1):
        g = jax.device_get(gradient(w, batch))
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x, norm=norm: x / max(1.0, norm), g)
        first = jax.tree.map(lambda m, x: 0.9 * m + 0.1 * x, first, g)
        second = jax.tree.map(lambda v, x: 0.999 * v + 0.001 * x**2, second, g)

        def update(path, x, t=t, first=first, second=second):
            m, v = flatten(first)[path] / (1 - 0.9**t), flatten(second)[path] / (1 - 0.999**t)
            decayed = decay * x if path.endswith(("kernel", "embedding")) else 0.0
            return x - lr * (by_path[path].rate * m / (np.sqrt(v) + 1e-8) + decayed)

        w = map_with_path(update, w)
    for path, x in flatten(w).items():
        want = x * by_path[path].multiplier
        moved = np.abs(want - flatten(begin)[path]).max()
        assert moved > 1e-4, path
        # Where a gradient is all but zero its sign is noise.
        assert np.mean(np.abs(flatten(got)[path] - want) > 1e-3 * moved) < 2e-3, path


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_update_changes_a_layers_output_as_much_at_any_width(name):
    """The spectral norm of a hidden kernel's first update is the base's (Yang et al. 2023, condition 1).

    For AdamW of a gradient of one rank, as that of a few tokens is; Muon's has the whole rank."""

    def norm(width):
        shapes = {"up": {"kernel": jax.ShapeDtypeStruct((width, 2 * width), jnp.float32)}}
        base = {"up": {"kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32)}}
        found = mup.from_shapes(shapes, base, orthogonal=name == "muon")
        made = optim.make(
            shapes,
            steps=1,
            name=name,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            clip_norm=None,
            scales=found,
        )
        x, y = np.random.default_rng(0).choice([-1.0, 1.0], (2, 2 * width)).astype(np.float32)
        noise = np.random.default_rng(1).standard_normal((width, 2 * width)).astype(np.float32)
        gradient = {"up": {"kernel": jnp.asarray(noise if name == "muon" else np.outer(x[:width], y))}}
        params = jax.tree.map(jnp.zeros_like, gradient)
        updates, _ = made.tx.update(gradient, made.tx.init(params), params)
        return np.linalg.norm(updates["up"]["kernel"], 2)

    # Newton's iteration leaves singular values between 0.7 and 1.2 (Jordan 2024).
    assert np.log2(norm(128) / norm(16)) / 3 == pytest.approx(0.0, abs=0.15 if name == "muon" else 1e-3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.mup": {}}, r"name the base's sizes, for instance train\.mup\.width=64"),
        ({"train.mup": {"widht": 8}}, r"train\.mup, the base: config: unknown key 'model\.widht' \(=8\)\. Did you mean 'width'\?"),
        ({"train.mup": {"width": 7}}, r"train\.mup, the base: model\.heads=2 does not divide model\.width=7"),
        ({"model.init": "xavier"}, r"model\.init='xavier' follows the width in a way of its own\. Use 'gpt2' or 'normal'"),
        ({"model.mlp_width": 48}, r"inside their blocks both have 48 \(model\.mlp_width\)\. Set train\.mup\.mlp_width too.* 12"),
        ({"model.head_dim": 8}, r"both have 16 \(model\.heads\)\. Set train\.mup\.heads too"),
        ({"model.name": "t5"}, r"model\.name='t5' does not say where its width ends\. Those that do: albert, bert, deit, gpt,"),
        ({"optim.name": "adafactor"}, r"adafactor's updates follow the parameters' own size"),
        ({"train.adapter": {"rank": 2}}, r"train\.adapter trains beside a model that has its width already"),
    ],
)  # fmt: skip
def test_what_has_no_such_parametrisation_is_refused(make_config, changes, message):
    config = make_config({"model.width": 64})
    if changes.get("model.name") == "t5":
        config["model"] = {"name": "t5"}
    with pytest.raises(UserError, match=message):
        mup.check(configs.changed(config, {"train.mup": {"width": 16}} | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.mup": {"width": 16, "layers": 2}}, "the base has other parameters: stack/block_1"),
        (
            {"train.mup": {"width": 16, "vocab_size": 100}},
            r"token_embedding/embedding is \(264, 64\), at the base \(100, 16\)",
        ),
        ({"model.norm_position": "post"}, "the model has no parameter to scale its logits by"),
    ],
)
def test_a_base_that_differs_in_more_than_widths_is_refused(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        scales(configs.changed(make_config(), WIDE | changes))

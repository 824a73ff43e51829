"""Optimizers against slow numpy, and what the patterns do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm_jax.errors import UserError
from tfm_jax.paths import flatten
from tfm_jax.train import optim

LR, DECAY, STEPS = 0.1, 0.3, 6
CONSTANT = dict(steps=STEPS, lr=LR, schedule="constant", warmup_steps=0)


def draw(seed, tree):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


SHAPES = {
    "token_embedding": {"embedding": jnp.zeros((5, 4))},
    "block_0": {"up": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}, "norm": {"scale": jnp.zeros(4)}},
}
PARAMS = draw(0, SHAPES)
GRADS = [draw(i, SHAPES) for i in range(1, STEPS + 1)]


def run(made, grads=GRADS, params=PARAMS):
    """The parameters after each update, flat, and the last optimizer state."""
    state, seen = made.tx.init(params), []
    update = jax.jit(made.tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append({path: np.asarray(x) for path, x in flatten(params).items()})
    return seen, state


def slow(rule, **changes):
    """The same in float64 numpy, one parameter after another."""
    settings = dict(decayed=r"(kernel|embedding)$", clip=1.0, factors={}, decay=DECAY) | changes
    params = {path: np.asarray(x, np.float64) for path, x in flatten(PARAMS).items()}
    memory = {path: (np.zeros(x.shape), np.zeros(x.shape)) for path, x in params.items()}
    seen = []
    for t, tree in enumerate(GRADS, start=1):
        grads = {path: np.asarray(x, np.float64) for path, x in flatten(tree).items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        if settings["clip"] is not None and norm > settings["clip"]:
            grads = {path: g * settings["clip"] / norm for path, g in grads.items()}
        for path, g in grads.items():
            update, memory[path] = rule(g, *memory[path], t)
            if re.search(settings["decayed"], path):
                update = update + settings["decay"] * params[path]
            params[path] = params[path] - LR * settings["factors"].get(path, 1.0) * update
        seen.append(dict(params))
    return seen


def adamw(g, m, v, t, b1=0.9, b2=0.999, eps=1e-8):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps), (m, v)


def lion(g, m, v, t, b1=0.9, b2=0.99):
    return np.sign(b1 * m + (1 - b1) * g), (b2 * m + (1 - b2) * g, v)


def check(found, want):
    for step, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.keys() == b.keys()
        for path in b:
            np.testing.assert_allclose(a[path], b[path], rtol=2e-5, atol=1e-5, err_msg=f"step {step}: {path}")


@pytest.mark.parametrize("clip", [1.0, None, 1e6])
def test_adamw(clip):
    found, _ = run(optim.make(PARAMS, **CONSTANT, weight_decay=DECAY, clip_norm=clip))
    check(found, slow(adamw, clip=clip))


def test_adamw_with_other_betas():
    options = {"b1": 0.8, "b2": 0.9}
    found, _ = run(optim.make(PARAMS, **CONSTANT, weight_decay=DECAY, options=options))
    check(found, slow(lambda g, m, v, t: adamw(g, m, v, t, **options)))


def test_lion():
    found, _ = run(optim.make(PARAMS, **CONSTANT, name="lion", weight_decay=DECAY))
    check(found, slow(lion))


def test_decay_mask_and_multipliers():
    factors = {"block_0/up/kernel": 0.25, "block_0/up/bias": 3.0}
    made = optim.make(
        PARAMS,
        **CONSTANT,
        weight_decay=DECAY,
        decay_pattern="scale$",
        # The first that matches wins.
        lr_multipliers=[("up/kernel", 0.25), ["block_0/up", 3]],
    )
    check(run(made)[0], slow(adamw, decayed="scale$", factors=factors))


@pytest.mark.parametrize("stacked", [False, True])
def test_rates_decay_from_layer_to_layer(stacked):
    """Three layers: 0.5 for the last one, 0.125 for the first, 0.0625 for embeddings, 1 for heads, whatever their names."""
    stack = {"blocks": {"w": jnp.zeros((3, 2))}} if stacked else {f"block_{i}": {"w": jnp.zeros(2)} for i in range(3)}
    heads = {"head": {"kernel": jnp.zeros(2)}, "unembedding": {"embedding": jnp.zeros(2)},
             "bridge": {"embeddings": {"kernel": jnp.zeros(2)}}}  # fmt: skip
    # Of two of the layers alone, where they are apart.
    beside = stack if stacked else {name: stack[name] for name in ("block_0", "block_1")}
    params = {"token_embedding": {"embedding": jnp.zeros(2)}, "stack": stack, "adapter": {"stack": beside}, **heads}
    made = optim.make(params, **CONSTANT, weight_decay=0.0, layer_decay=0.5, clip_norm=None)
    grads = jax.tree.map(jnp.ones_like, params)
    update, _ = jax.jit(made.tx.update)(grads, made.tx.init(params), params)
    # The first of Adam's updates is the gradient's sign.
    found = {path: np.asarray(x) / -LR for path, x in flatten(update).items()}
    layers = found["stack/blocks/w"] if stacked else np.stack([found[f"stack/block_{i}/w"] for i in range(3)])
    np.testing.assert_allclose(layers, np.array([[0.125] * 2, [0.25] * 2, [0.5] * 2]), rtol=1e-5)
    np.testing.assert_allclose(found["token_embedding/embedding"], 0.0625, rtol=1e-5)
    for path in flatten({"stack": beside}):
        np.testing.assert_allclose(found[f"adapter/{path}"], found[path], err_msg=path)
    for path in flatten(heads):
        np.testing.assert_allclose(found[path], 1.0, rtol=1e-5, err_msg=path)


def test_a_rate_of_what_is_frozen_is_refused():
    rates = [("block_0/up/kernel", 2.0)]
    optim.check_trained(PARAMS, rates, ["embedding$"])
    with pytest.raises(
        UserError,
        match=r"^optim\.lr_multipliers: the pattern 'block_0/up/kernel' matches only parameters that are frozen",
    ):
        optim.check_trained(PARAMS, rates, ["block_0"])


def test_the_adapters_of_what_is_decayed_are_decayed():
    kernel = {"a": jnp.ones(2), "b": jnp.ones(2)}
    params = {
        "up": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "adapter": {"up": {"kernel": kernel, "scale": kernel}},
    }
    made = optim.make(params, **CONSTANT, weight_decay=DECAY, freeze=["^up/kernel"], clip_norm=None)
    update, _ = jax.jit(made.tx.update)(jax.tree.map(jnp.zeros_like, params), made.tx.init(params), params)
    want = dict.fromkeys(flatten(params), 0.0) | {f"adapter/up/kernel/{name}": -LR * DECAY for name in "ab"}
    assert {path: pytest.approx(float(x[0]), rel=1e-6) for path, x in flatten(update).items()} == want


def test_schedule_is_applied_by_step():
    made = optim.make(PARAMS, steps=4, lr=LR, schedule="linear", warmup_steps=2, end_factor=0.0, weight_decay=0.0)
    found, _ = run(made, [GRADS[0]] * 4)
    # With one gradient over and over, Adam's update is its sign, so the differences are the learning rates.
    path = "block_0/norm/scale"
    steps = np.diff([np.asarray(flatten(PARAMS)[path]), *[f[path] for f in found]], axis=0)
    np.testing.assert_allclose(np.abs(steps), np.array([[0.05], [0.1], [0.1], [0.05]]) * np.ones((4, 4)), rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_frozen_parameters_have_no_moments_and_do_not_change(name):
    made = optim.make(PARAMS, **CONSTANT, name=name, freeze=["embedding$", "norm"], lr_multipliers=[("bias", 2.0)])
    found, state = run(made)
    start = {path: np.asarray(x) for path, x in flatten(PARAMS).items()}
    for path, value in found[-1].items():
        frozen = path.endswith(("embedding", "scale"))
        assert np.array_equal(value, start[path]) == frozen, path
    paths = list(flatten(state))
    assert not [p for p in paths if "embedding" in p or "scale" in p]
    assert [p for p in paths if p.endswith("up/kernel")]


def test_freezing_leaves_the_others_update_alone():
    """Except for the clipping, whose norm is over what is trained."""
    whole, _ = run(optim.make(PARAMS, **CONSTANT, clip_norm=None))
    part, _ = run(optim.make(PARAMS, **CONSTANT, clip_norm=None, freeze=["embedding$"]))
    np.testing.assert_allclose(part[-1]["block_0/up/kernel"], whole[-1]["block_0/up/kernel"], rtol=1e-6)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 16, 48)], ids=["wide", "tall", "scanned"])
def test_muon_orthogonalises_kernels(shape):
    params = {"up": {"kernel": jnp.zeros(shape)}, "embedding": jnp.ones((4, 3)), "norm": {"scale": jnp.ones(3)}}
    made = optim.make(params, steps=2, lr=1.0, schedule="constant", warmup_steps=0, name="muon", weight_decay=0.0)
    g = draw(3, params)
    updates, _ = made.tx.update(g, made.tx.init(params), params)
    for matrix in np.asarray(updates["up"]["kernel"]).reshape(-1, *shape[-2:]):
        matrix = matrix / (0.2 * 48**0.5)
        singular = np.linalg.svd(matrix, compute_uv=False)
        # Five Newton-Schulz iterations bring singular values near 1 and not to it (Jordan 2024).
        assert singular.min() > 0.6 and singular.max() < 1.35
        assert np.sum(matrix * np.asarray(g["up"]["kernel"]).reshape(-1, *shape[-2:])[0]) < 0 or len(shape) == 3
    # Everything else is Adam's: the sign of the first gradient.
    for path in ("embedding", "norm/scale"):
        np.testing.assert_allclose(flatten(updates)[path], -np.sign(flatten(g)[path]), rtol=1e-3)


def test_muon_treats_scanned_layers_one_by_one():
    stacked = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 12))}}
    settings = dict(steps=2, lr=1.0, schedule="constant", warmup_steps=0, name="muon", weight_decay=0.0, clip_norm=None)
    made = optim.make(stacked, **settings)
    whole = made.tx.update(stacked, made.tx.init(stacked), stacked)[0]["blocks"]["kernel"]
    for i in range(3):
        one = {"blocks": {"kernel": stacked["blocks"]["kernel"][i]}}
        alone = optim.make(one, **settings)
        update = alone.tx.update(one, alone.tx.init(one), one)[0]["blocks"]["kernel"]
        np.testing.assert_allclose(whole[i], update, rtol=1e-4, atol=1e-5)


def test_adafactor_keeps_factors():
    params = {"up": {"kernel": jnp.ones((130, 140))}, "small": {"kernel": jnp.ones((4, 6))}}
    made = optim.make(params, **CONSTANT, name="adafactor")
    sizes = [x.size for path, x in flatten(made.tx.init(params)).items() if "up/kernel" in path]
    assert sum(sizes) <= 130 + 140 + 2
    g = draw(5, params)
    updates, _ = made.tx.update(g, made.tx.init(params), params)
    # After one step of Shazeer and Stern's algorithm 4: v = outer(rows, columns) / mean, update = g / sqrt(v), clipped
    # to a root mean square of 1 and scaled by the parameter's (here 1), plus the decay.
    norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(g)))
    grad = np.asarray(g["up"]["kernel"], np.float64) / norm
    squared = grad**2 + 1e-30
    want = grad / np.sqrt(np.outer(squared.mean(1), squared.mean(0)) / squared.mean())
    want /= max(1.0, np.sqrt(np.mean(want**2)))
    np.testing.assert_allclose(updates["up"]["kernel"], -LR * (want + 0.1), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="adamm"), "optim.name='adamm' does not exist. Did you mean 'adamw'?"),
        (dict(options={"nestrov": 1}), "optim.options.nestrov is not an option of 'adamw'. Did you mean 'nesterov'?"),
        (dict(name="lion", options={"mu_type": 1}), "optim.options.mu_type is not an option of 'lion'."
         " Did you mean 'mu_dtype'?"),
        (dict(weight_decay=-1.0), "optim.weight_decay=-1.0: must be at least 0."),
        (dict(clip_norm=0.0), "optim.clip_norm=0.0: must be above 0, or None for no clipping."),
        (dict(lr_multipliers=["up"]), "optim.lr_multipliers: 'up' is not a pair (regex, factor)."),
        (
            dict(lr_multipliers=[("block_0/up/kernle", 1)]),
            "optim.lr_multipliers: the pattern 'block_0/up/kernle' matches no parameter."
            " Did you mean 'block_0/up/kernel'?",
        ),
        (
            dict(freeze=["block_0/up/kernle"]),
            "optim.freeze: the pattern 'block_0/up/kernle' matches no parameter. Did you mean 'block_0/up/kernel'?",
        ),
        (
            dict(decay_pattern="block_0/up/kernle"),
            "optim.decay_pattern: the pattern 'block_0/up/kernle' matches no parameter."
            " Did you mean 'block_0/up/kernel'?",
        ),
        (dict(freeze=["."]), "optim.freeze=('.',) freezes every parameter."),
    ],
)  # fmt: skip
def test_errors(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        optim.make(PARAMS, **CONSTANT | changes)

"""A mixture of experts against loops over tokens and experts; slots, and what its router says."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax import config as configs
from tfm_jax.models.gpt import Model
from tfm_jax.nn.attention import Context
from tfm_jax.nn.capture import AUXILIARY, collected
from tfm_jax.nn.masks import Mask
from tfm_jax.nn.moe import MoE
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.nn.stack import Stack
from tfm_jax.parallel import hlo
from tfm_jax.tasks import token_prediction
from tfm_jax.tasks.base import bind, with_auxiliary
from tfm_jax.train.build import build

B, T, D, F, E, K = 2, 7, 6, 5, 4, 2
X = jax.random.normal(jax.random.key(0), (B, T, D))
SPEC = BlockSpec(
    width=D, heads=2, mlp_width=F, mlp="gated", activation="silu", bias="none", experts=E, experts_per_token=K,
    init_std=1.0, router_balance=0.1, router_z=0.01,
)  # fmt: skip


@functools.cache
def params(spec):
    return jax.jit(lambda: MoE(spec, 1).init(jax.random.key(1), X)["params"])()


def run(spec):
    apply = jax.jit(lambda p: MoE(spec, 1).apply({"params": p}, X, mutable=[AUXILIARY]))
    out, said = apply(params(spec))
    return np.asarray(out), {name: float(x) for name, x in said[AUXILIARY].items()}


def slow(spec):
    """The output, the chosen experts (B, T, K) and which choices found a slot."""
    p, x = jax.tree.map(lambda a: np.asarray(a, np.float64), params(spec)), np.asarray(X, np.float64)
    logits = x @ p["router"]["kernel"]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[..., :K]
    slots = T if spec.expert_capacity is None else math.ceil(spec.expert_capacity * K * T / E)
    out, kept = np.zeros_like(x), np.zeros((B, T, K), bool)
    for b in range(B):
        used = np.zeros(E, int)
        for k in range(K):
            for t in range(T):
                e = chosen[b, t, k]
                kept[b, t, k], used[e] = used[e] < slots, used[e] + 1
        for t in range(T):
            whole = sum(probabilities[b, t, e] for e in chosen[b, t])
            for k in range(K):
                e = chosen[b, t, k]
                up = x[b, t] @ p["experts"]["up"]["kernel"][e]
                if "gate" in p["experts"]:
                    gate = x[b, t] @ p["experts"]["gate"]["kernel"][e]
                    hidden = gate / (1 + np.exp(-gate)) * up
                else:
                    hidden = up / (1 + np.exp(-up))
                if kept[b, t, k]:
                    out[b, t] += probabilities[b, t, e] / whole * (hidden @ p["experts"]["down"]["kernel"][e])
    return out, logits, probabilities, chosen, kept


@pytest.mark.parametrize("mlp", ["gated", "plain"])
@pytest.mark.parametrize("capacity", [None, 0.5, 1.0, 4.0])
def test_against_loops(capacity, mlp):
    spec = dataclasses.replace(SPEC, expert_capacity=capacity, mlp=mlp)
    got, said = run(spec)
    want, logits, probabilities, chosen, kept = slow(spec)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert said["router_dropped"] == pytest.approx(1 - kept.mean(), abs=1e-6)
    assert (said["router_dropped"] > 0) == (capacity in (0.5, 1.0))
    share = np.array([(chosen == e).mean() for e in range(E)])
    balance, z = E * (share * probabilities.mean((0, 1))).sum(), (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    assert said["router_balance"] == pytest.approx(balance, rel=1e-5) and said["router_z"] == pytest.approx(z, rel=1e-5)
    assert said["router_busiest"] == pytest.approx(E * share.max(), rel=1e-5)
    assert said["loss"] == pytest.approx(0.1 * balance + 0.01 * z, rel=1e-5)


def test_enough_slots_are_no_slots():
    def gradient(capacity):
        spec = dataclasses.replace(SPEC, expert_capacity=capacity)
        return jax.jit(jax.grad(lambda p: jnp.sum(MoE(spec, 1).apply({"params": p}, X) ** 2)))(params(spec))

    for got, want in zip(jax.tree.leaves(gradient(4.0)), jax.tree.leaves(gradient(None)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_states_travel_along_experts_alone():
    """In a compiled step no collective along `fsdp` has the states of all rows: 64 of 32 positions and 64 numbers."""
    model = {
        "name": "gpt",
        "layers": 2,
        "width": 64,
        "heads": 2,
        "mlp_width": 64,
        "max_len": 32,
        "bias": "none",
        "dropout": 0.0,
    }
    config = configs.resolve({
        "model": model | {"experts": 2, "expert_capacity": 1.25, "layer_loop": "scan", "remat": "full"},
        "data": {"name": "synthetic", "vocab_size": 64, "seq_len": 32, "batch_size": 64},
        "mesh": {"data": 1, "fsdp": 4, "expert": 2},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 1},
    })  # fmt: skip
    experiment = build(config, devices=jax.devices()[:8])
    with jax.set_mesh(experiment.layout.mesh):
        compiled = experiment.jitted_step().lower(experiment.abstract_state(), experiment.batch(0)).compile()
    found = hlo.read(compiled.as_text(), dict(experiment.layout.mesh.shape)).collectives
    states = 64 * 32 * 64 * 4
    assert max(one.size for one in found if "fsdp" in one.axes) < states / 4
    assert max(one.size for one in found if one.axes == ("expert",)) >= states / 4


@pytest.mark.parametrize("layer_loop", ["loop", "scan"])
def test_the_loss_of_a_model_has_its_routers(layer_loop):
    """The mean over layers, in training alone."""
    model = Model(SPEC, vocab_size=11, max_len=T, layers=3, layer_loop=layer_loop, position="none")
    tokens = jax.random.randint(jax.random.key(2), (B, T), 0, 11)
    made = jax.jit(lambda: model.init(jax.random.key(3), tokens)["params"])()
    batch = {"inputs": {"tokens": tokens}, "targets": tokens, "weights": jnp.ones((B, T)).at[0, 3].set(0.0)}
    plain, task = token_prediction.make(), with_auxiliary(token_prediction.make())
    losses = [
        jax.jit(lambda p, task=task, train=train: task.loss(bind(model, {}), p, {}, batch, None, train))(made)
        for task, train in ((plain, True), (task, True), (task, False))
    ]
    _, said = jax.jit(lambda p: model.apply({"params": p}, tokens, train=True, mutable=[AUXILIARY]))(made)
    each = [x for path, x in jax.tree_util.tree_leaves_with_path(said) if path[-1].key == "loss"]
    mean = np.mean(np.concatenate([np.asarray(x).reshape(-1) for x in each]))
    assert float(losses[1].total) == pytest.approx(float(losses[0].total) + 13 * mean, rel=1e-5)
    assert float(losses[2].total) == pytest.approx(float(losses[0].total), rel=1e-6)
    total, weight = losses[1].metrics["router_balance"]
    assert 0.9 < float(total / weight) < E and "router_balance" not in losses[2].metrics


def test_a_router_that_layers_share_is_asked_each_time():
    """Unrolled as scanned: ALBERT's one block says a number for each layer."""
    found, params = {}, None
    for loop in ("loop", "scan"):
        stack, given = Stack(SPEC, 3, loop, sharing="all"), (X, Context(Mask()))
        params = params or stack.init(jax.random.key(5), *given, train=False)["params"]
        _, said = stack.apply({"params": params}, *given, train=True, mutable=[AUXILIARY])
        found[loop] = collected(said[AUXILIARY])
        assert {a.size for a in jax.tree.leaves(said[AUXILIARY])} == {3}
    assert found["loop"].keys() == found["scan"].keys()
    for name, value in found["loop"].items():
        np.testing.assert_allclose(value, found["scan"][name], rtol=1e-5, err_msg=name)


def test_bad_sizes():
    for fields, message in (
        (dict(experts=-1), "model.experts=-1: must be at least 0."),
        (dict(experts_per_token=5), "model.experts_per_token=5: must be from 1 to model.experts=4."),
        (dict(expert_capacity=0.0), "model.expert_capacity=0.0: must be above 0, or None."),
        (dict(bias="all"), "model.experts: experts have no biases and no dropout inside: model.bias='none',"
         " model.mlp_dropout=0."),
    ):  # fmt: skip
        with says(message):
            dataclasses.replace(SPEC, **fields)

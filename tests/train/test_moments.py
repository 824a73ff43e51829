"""Moments in fewer bytes: right on average, of the size that they should have, and training is as with float32's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.errors import says
from tfm_jax.parallel import mesh, sharding
from tfm_jax.paths import flatten
from tfm_jax.train import optim
from tfm_jax.train.build import build
from tfm_jax.train.checkpoint import Checkpointer
from tfm_jax.train.moments import BLOCK, from_codes, to_bfloat16, to_codes

SHAPE = (3, 70)  # the last of its blocks is not whole


def numbers(second):
    """Of very different magnitudes, with zeros, and a block of nothing else."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=SHAPE) * np.exp(2 * draw.normal(size=SHAPE))
    x[:, ::7], x[1, :BLOCK] = 0, 0
    return (x**2 if second else x).astype(np.float32)


def bits(count):
    return jax.random.bits(jax.random.key(1), (count, *SHAPE), jnp.uint16)


@pytest.mark.parametrize("second", [False, True])
def test_codes(second):
    x, n = numbers(second), 1000
    there_and_back = jax.jit(jax.vmap(lambda b: from_codes(*to_codes(x, b, second=second))))
    codes, scale = to_codes(x, bits(1)[0], second=second)
    assert codes.dtype == (jnp.uint8 if second else jnp.int8) and codes.shape == SHAPE and scale.shape == (3, 3)
    found = np.asarray(there_and_back(bits(n)), np.float64)
    levels, power = (255, 4) if second else (127, 2)
    largest = np.asarray([[np.abs(row[i : i + BLOCK]).max() for i in range(0, 70, BLOCK)] for row in x])
    block = np.repeat(largest, BLOCK, axis=1)[:, :70]
    np.testing.assert_array_equal(scale, largest.astype(np.float32))
    # The codes around a number, by the map as it is written: c -> (c / levels)^power times the block's largest.
    grid = block[..., None] * (np.arange(levels + 1) / levels) ** power
    above = np.minimum((grid < np.abs(x)[..., None]).sum(-1), levels)
    step = (
        np.take_along_axis(grid, above[..., None], -1)[..., 0]
        - np.take_along_axis(grid, np.maximum(above - 1, 0)[..., None], -1)[..., 0]
    )
    assert np.all(np.abs(found - x) <= step * (1 + 1e-4) + 1e-12)
    # Rounded up or down as often as it takes; a second moment of less than the smallest code is that code.
    lost = second & (above == 1)
    assert np.all((np.abs(found.mean(0) - x) <= 5 * step / np.sqrt(n) + 1e-6 * block) | lost)
    assert np.all(found[:, x == 0] == 0) and np.all(found[:, np.abs(x) == block] == x[np.abs(x) == block])
    assert not second or np.all(found[:, x > 0] > 0)


def test_bfloat16():
    x, n = numbers(False), 1000
    found = np.asarray(jax.jit(jax.vmap(lambda b: to_bfloat16(x, b)))(bits(n)).astype(jnp.float32), np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(x) + 1e-30)) - 7)
    assert np.all(np.abs(found - x) <= step) and np.all(np.abs(found.mean(0) - x) < 5 * step / np.sqrt(n))


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_second_moment_does_not_stand_still(moments):
    """1,500 steps of b2 = 0.999 towards squares 30 times as large, whose changes are far below a step of the code."""
    draw = np.random.default_rng(2)
    squares = np.exp(draw.normal(size=(128, 32))).astype(np.float32)
    nearest = jnp.asarray(squares / 30).astype(jnp.bfloat16)

    def keep(v, key):
        b = jax.random.bits(key, v.shape, jnp.uint16)
        return (
            to_bfloat16(v, b).astype(jnp.float32) if moments == "bfloat16" else from_codes(*to_codes(v, b, second=True))
        )

    def update(i, both):
        v, rounded = both
        v = keep(0.999 * v + 0.001 * squares, jax.random.fold_in(jax.random.key(3), i))
        return v, (0.999 * rounded.astype(jnp.float32)).astype(jnp.bfloat16)

    found, rounded = jax.jit(lambda v: jax.lax.fori_loop(0, 1500, update, (v, nearest)))(squares / 30)
    exact = squares * (1 - 0.999**1500 * (1 - 1 / 30))
    ratio = np.asarray(found) / exact
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < (0.05 if moments == "bfloat16" else 0.2)
    # To the nearest, even one that nothing is added to does not fall.
    np.testing.assert_array_equal(rounded, nearest)


@pytest.mark.parametrize(("name", "count"), [("adamw", 2), ("lion", 1), ("muon", 1)])
@pytest.mark.parametrize(("moments", "size"), [("float32", 4.0), ("bfloat16", 2.0), ("int8", 1 + 4 / BLOCK)])
def test_bytes(name, count, moments, size):
    params = {
        "up": {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((128,), jnp.float32)},
    }
    made = optim.make(params, steps=10, warmup_steps=1, name=name, moments=moments)
    state = flatten(jax.eval_shape(made.tx.init, params))
    kernel = {path: x for path, x in state.items() if path.endswith("up/kernel")}
    assert sum(x.size * x.dtype.itemsize for x in kernel.values()) == count * size * 64 * 128
    # What is small is not worth it; and the rules that place a kernel find its codes and scales.
    assert {x.dtype for path, x in state.items() if path.endswith("scale")} == {jnp.dtype(jnp.float32)}
    assert {x.shape for x in kernel.values()} <= {(64, 128), (64, 128 // BLOCK)}


@pytest.mark.parametrize("name", ["lion", "muon"])
def test_other_rules_arrive_where_float32_does(name):
    """A matrix to be found from noisy looks at it: the distance left is that of float32 moments to a tenth."""
    target = jax.random.normal(jax.random.key(0), (64, 64))
    params = {"layer": {"kernel": jnp.zeros((64, 64))}}

    def left(moments):
        rate = 0.3 if name == "muon" else 0.03
        made = optim.make(params, steps=200, lr=rate, end_factor=0.0, name=name, weight_decay=0.0, moments=moments)

        def update(i, both):
            params, state = both
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (64, 64))
            grads = jax.tree.map(lambda p: p - target + noise, params)
            updates, state = made.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        run = jax.jit(lambda p: jax.lax.fori_loop(0, 200, update, (p, made.tx.init(p)))[0])
        return float(jnp.sqrt(jnp.mean((run(params)["layer"]["kernel"] - target) ** 2)))

    want = left("float32")
    assert want < 0.5 and left("int8") == pytest.approx(want, rel=0.1)


GPT = {
    "model.width": 64,
    "model.heads": 4,
    "model.vocab_size": 264,
    "data.batch_size": 16,
    "train.steps": 60,
    "optim.lr": 3e-3,
}


def trained(built, steps):
    """The state after some steps, and the loss of each."""
    with jax.set_mesh(built.layout.mesh):
        state, step, losses = built.fresh_state(), built.jitted_step(), []
        for i in range(steps):
            state, metrics = step(state, built.batch(i))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses


def on(built, **sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    layout = mesh.make(**sizes, optimizer_memory=built.layout.optimizer_memory, devices=devices)
    return dataclasses.replace(built, layout=layout.with_rules(built.layout.rules))


@pytest.fixture(scope="module")
def losses(make_config):
    """Of 60 steps of a GPT on one device, by what the moments are kept in."""
    return {
        m: trained(on(build(make_config(GPT | {"optim.moments": m})), data=1), 60)[1]
        for m in ("float32", "bfloat16", "int8")
    }


def test_a_gpt_trains_as_with_float32(losses):
    """Over the last ten of 60 steps, in which the loss falls to a quarter, within a thousandth of float32's.

    Rounding is right on average, and thousands of numbers' errors cancel in a loss; they differ by 1e-5 and 3e-5 here.
    """
    want = np.mean(losses["float32"][-10:])
    assert want < losses["float32"][0] / 4
    for moments in ("bfloat16", "int8"):
        assert losses[moments] != losses["float32"]
        assert np.mean(losses[moments][-10:]) == pytest.approx(want, rel=1e-3)


def test_split_on_the_host_and_restored(make_config, losses, tmp_path, monkeypatch):
    """On 8 devices and in their host's memory as on one; saved, and restored onto another mesh, the same codes."""
    monkeypatch.setattr(sharding, "FALLBACK_MIN_SIZE", 4096)
    built = build(make_config(GPT | {"optim.moments": "int8", "mesh.optimizer_memory": "host"}))
    split = on(built, data=2, fsdp=2, tensor=2)
    rows = split.layout.table(split.abstract_state())
    assert {r.bytes_per_device for r in rows if r.dtype.endswith("on host")} == {0}
    state, found = trained(split, 4)
    np.testing.assert_allclose(found, losses["int8"][:4], rtol=1e-5)
    for path, x in flatten(state).items():
        if path.startswith("opt") and path.endswith("kernel"):
            assert any(axis is not None for axis in x.sharding.spec), path
        large = path.startswith("opt") and x.size >= 4096
        assert x.sharding.memory_kind == ("pinned_host" if large else "device"), path
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    with jax.set_mesh(split.layout.mesh):
        checkpoints.save(4, state, {})
        checkpoints.wait()
    other = on(built, data=1, fsdp=4)
    with jax.set_mesh(other.layout.mesh):
        restored = flatten(checkpoints.restore(4, other.abstract_state()).state)
    checkpoints.close()
    for path, x in flatten(state).items():
        assert restored[path].dtype == x.dtype and restored[path].sharding.memory_kind == x.sharding.memory_kind
        np.testing.assert_array_equal(restored[path], x, err_msg=path)


def test_a_device_without_its_hosts_memory(make_config, monkeypatch):
    monkeypatch.setattr(mesh, "has_host_memory", lambda device: False)
    with says("mesh.optimizer_memory='host': a program for cpu has no access to its host's memory here. Use 'device'."):
        build(make_config({"mesh.optimizer_memory": "host"}))


def test_factored_moments_stay_as_they_are(make_config):
    with says("optim.moments='int8': adafactor's are a row and a column of each kernel. Use 'float32'."):
        build(make_config({"optim.name": "adafactor", "optim.moments": "int8"}))

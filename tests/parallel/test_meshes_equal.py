"""The mesh is a matter of speed: losses, gradients and checkpoints are the same on every one.

Against one device, on up to 8 simulated ones: each axis, and those that are used together.
"""

import jax
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.paths import flatten, map_with_path
from tfm_jax.tasks.base import bind
from tfm_jax.train import build as build_module
from tfm_jax.train.checkpoint import Checkpointer

LLAMA = {
    "model.norm": "rms", "model.mlp": "gated", "model.activation": "silu", "model.position": "rotary",
    "model.bias": "'none'", "model.output": "free", "model.mlp_width": 64,
}  # fmt: skip
MIXTURE = LLAMA | {"model.experts": 4, "model.mlp_width": 16, "model.router_z": 0.01}
# One block says as much as two where they are unrolled, and compiles in half the time.
LOOP, SCAN = {"model.layers": 1}, {"model.layers": 2, "model.layer_loop": "scan"}
# Few slots, so that some tokens are dropped.
SLOTS = MIXTURE | SCAN | {"model.expert_capacity": 0.75}
MODELS = {
    "gpt2 loop": LOOP,
    "gpt2 scan": SCAN,
    "llama loop": LLAMA | LOOP,
    "llama scan": LLAMA | SCAN,
    "everywhere": MIXTURE | LOOP,
    "slots": SLOTS,
    # A microbatch has a balance of its own, as it has with train.accum.
    "slots unbalanced": SLOTS | {"model.router_balance": 0.0},
}
# Which model on which mesh, its axes of size 1 left out.
TABLE = [
    ("gpt2 loop", dict(data=8)),
    ("gpt2 scan", dict(fsdp=8)),
    ("llama loop", dict(tensor=8)),
    ("slots", dict(expert=4)),
    ("gpt2 scan", dict(stage=2)),
    ("gpt2 scan", dict(data=2, tensor=4)),
    ("gpt2 loop", dict(data=2, fsdp=2, tensor=2)),
    ("llama scan", dict(data=2, fsdp=2, tensor=2)),
    ("everywhere", dict(data=2, fsdp=2, tensor=2)),
    ("slots", dict(tensor=2, expert=4)),
    ("slots", dict(data=2, fsdp=2, expert=2)),
    ("llama scan", dict(fsdp=4, stage=2)),
    ("slots unbalanced", dict(tensor=2, expert=2, stage=2)),
]
# Those that say less than another one, for `make journeys`.
LONGER = [
    ("llama scan", dict(data=8)),
    ("gpt2 loop", dict(data=2, fsdp=4)),
    ("llama loop", dict(fsdp=4, tensor=2)),
    ("gpt2 scan", dict(data=4, stage=2)),
    ("llama scan", dict(tensor=4, stage=2)),
]


def row(name, sizes, marks=()):
    return pytest.param(name, sizes, marks=marks, id=f"{' '.join(f'{a}={n}' for a, n in sizes.items())}: {name}")


SIZES = {"model.width": 32, "model.heads": 8, "model.vocab_size": 264}
COMMON = SIZES | {"model.init_std": 0.1, "optim.warmup_steps": 0, "train.steps": 20}


@pytest.fixture(scope="module")
def build_on(make_config):
    """`build_on(sizes, changes)`: the experiment on as many devices as the sizes of the axes ask for."""

    def make(sizes, changes):
        config = make_config(COMMON | changes | {f"mesh.{axis}": n for axis, n in ({"data": 1} | sizes).items()})
        devices = jax.devices()[: int(np.prod([*sizes.values()], dtype=int))]
        return build_module.build(config, devices=devices)

    return make


def drawn(built):
    """Parameters that no program has to be compiled for, biases and scales among them."""
    draw = np.random.default_rng(0)

    def one(path, x):
        return np.asarray(path.endswith("scale") + 0.1 * draw.standard_normal(x.shape), x.dtype)

    return map_with_path(one, jax.eval_shape(built.init).params)


def loss_and_grads(built, params, batch=None):
    def mean(params, batch):
        out = built.task.loss(bind(built.model, {}), params, {}, batch, None, True)
        return out.total / out.weight

    with jax.set_mesh(built.layout.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, built.abstract_state().params)
        placed = jax.device_put(params, shardings)
        value, grads = jax.jit(jax.value_and_grad(mean), out_shardings=(None, shardings))(
            placed, built.batch(0) if batch is None else batch
        )
    return float(value), jax.device_get(flatten(grads))


@pytest.fixture(scope="module")
def on_one_device(build_on):
    made = {}

    def get(name):
        if name not in made:
            built = build_on({}, MODELS[name])
            params = drawn(built)
            made[name] = (params, *loss_and_grads(built, params))
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "sizes"), [*(row(*one) for one in TABLE), *(row(*one, pytest.mark.journey) for one in LONGER)]
)
def test_loss_and_gradients(build_on, on_one_device, name, sizes):
    params, value, grads = on_one_device(name)
    built = build_on(sizes, MODELS[name])
    rows = built.layout.table(built.abstract_state())
    assert all(row.note == "" for row in rows if row.path.endswith("kernel"))
    if "stage" in sizes:
        scanned = [row for row in rows if "/blocks/" in row.path]
        assert len(scanned) >= 3 * 6 and all(row.spec[0] == "stage" for row in scanned)
    assert all(np.any(g != 0) for path, g in grads.items() if "experts" in path or "router" in path)
    same(loss_and_grads(built, params), (value, grads))


def same(got, want):
    """Losses, and gradients, each against the largest of its array."""
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in want[1].values()))
    assert norm > 0.1
    for path, g in want[1].items():
        scale = max(np.max(np.abs(g)), 1e-3 * norm)
        np.testing.assert_allclose(got[1][path] / scale, g / scale, rtol=0, atol=1e-5, err_msg=path)


def test_experts_that_do_not_fit_the_mesh(build_on):
    with says("mesh.expert=8 needs experts that it divides and that have slots; model.experts=4,"
              " model.expert_capacity=1.0. Without slots (None) every device holds every expert."):  # fmt: skip
        build_on({"expert": 8}, MIXTURE | {"model.expert_capacity": 1.0})
    with says("mesh.expert=2: model.name='gpt' has no experts here. Use mesh.fsdp."):
        build_on({"data": 4, "expert": 2}, LLAMA)


# Every axis beside `context`, which alone is the ring of eight; with slots some tokens find none.
LONG = LLAMA | {"data.seq_len": 16, "model.max_len": 16}
SPLIT = {
    "loop": (LOOP, dict(context=8)),
    "scan": (SCAN | {"model.remat": "full", "model.kv_heads": 1}, dict(fsdp=2, tensor=2, context=2)),
    "slots": (SLOTS, dict(expert=2, context=4)),
    "everywhere": (MIXTURE | LOOP, dict(data=2, tensor=2, context=2)),
    "stages": (SCAN, dict(tensor=2, context=2, stage=2)),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_a_length_that_is_split(build_on, kind):
    """Packed documents, each with positions of its own."""
    changes = LONG | SPLIT[kind][0]
    one, split = build_on({}, changes), build_on(SPLIT[kind][1], changes)
    params, batch = drawn(one), one.data.train.batch_at(0)
    ends = np.arange(8)[:, None] + 2
    segments = (np.arange(16)[None] >= ends).astype(np.int32) + (np.arange(16)[None] >= 13)
    positions = np.arange(16)[None] - np.where(segments == 0, 0, np.where(segments == 1, ends, 13))
    batch["inputs"] |= {"segment_ids": segments, "positions": positions.astype(np.int32)}
    same(loss_and_grads(split, params, batch), loss_and_grads(one, params, batch))


def test_lengths_that_cannot_be_split(build_on, tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"source": "one", "target": "uno"}\n' * 8)
    pairs = {"data.name": "pairs", "data.source": f"jsonl:{tmp_path}/*.jsonl", "data.seq_len": 16}
    for changes, message in (
        ({}, "mesh.context=8 splits a sequence into 16 blocks, and 8 positions are not a multiple of that. Nearest that are: 16."),
        ({"model.attention": "xla"}, "mesh.context=8 splits the length, and model.attention='xla' needs it whole. Use"
         " model.attention='auto', which is ring attention there."),
        (pairs, "mesh.context=8 splits sequences of one length, and data.name='pairs' has rows of many."
         " Use mesh.fsdp."),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            build_on({"context": 8}, changes)
        assert str(caught.value) == message


def steps(built, state, first, count):
    """The state after some updates and their losses."""
    losses = []
    with jax.set_mesh(built.layout.mesh):
        update = UPDATES.setdefault(id(built), built.jitted_step())
        for step in range(first, first + count):
            state, metrics = update(state, built.batch(step))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses


UPDATES = {}  # compiled once an experiment
ORIGINS = {
    "data": dict(data=8),
    "data fsdp": dict(data=2, fsdp=4),
    "tensor": dict(tensor=8),
    "data fsdp stage": dict(data=2, fsdp=2, stage=2),
}
TARGETS = ORIGINS | {
    "1 device": {},
    "2 devices": dict(fsdp=2),
    "4 devices": dict(fsdp=2, tensor=2),
    "8 devices": dict(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def targets(build_on):
    return {name: build_on(sizes, LLAMA | SCAN) for name, sizes in TARGETS.items()}


@pytest.mark.parametrize(
    "origin", [pytest.param(name, marks=pytest.mark.journey if name in ("data", "tensor") else ()) for name in ORIGINS]
)
def test_checkpoints_go_from_any_mesh_to_any_mesh(targets, tmp_path, origin):
    built = targets[origin]
    with jax.set_mesh(built.layout.mesh):
        state, _ = steps(built, built.fresh_state(), 0, 2)
        checkpoints = Checkpointer(tmp_path / "checkpoints")
        checkpoints.save(2, state, {})
        checkpoints.wait()
    saved = jax.device_get(state)
    _, losses = steps(built, state, 2, 2)
    batch = jax.device_get(built.batch(2))
    for name, other in targets.items():
        if name == origin:
            continue
        with jax.set_mesh(other.layout.mesh):
            restored = checkpoints.restore(2, other.abstract_state()).state
        for want, have in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(np.asarray(have), want)
        for want, have in zip(jax.tree.leaves(batch), jax.tree.leaves(other.batch(2)), strict=True):
            np.testing.assert_array_equal(np.asarray(have), want)
        _, again = steps(other, restored, 2, 2)
        np.testing.assert_allclose(again, losses, rtol=1e-5, err_msg=f"{origin} -> {name}")
    checkpoints.close()

"""The mesh is a matter of speed: losses, gradients and checkpoints are the same on every one.

Against one device, on 8 simulated ones: GPT-2-like, Llama-like and mixtures of experts, unrolled and scanned, and with the length
split too.
"""

import jax
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.parallel import mesh
from tfm_jax.paths import flatten
from tfm_jax.tasks.base import bind
from tfm_jax.train import build as build_module
from tfm_jax.train.checkpoint import Checkpointer

MESHES = {"8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2), "1x1x8": (1, 1, 8)}
ONE = (1, 1, 1)
FAMILIES = {
    "gpt2": {},
    "llama": {
        "model.norm": "rms", "model.mlp": "gated", "model.activation": "silu", "model.position": "rotary",
        "model.bias": "'none'", "model.output": "free", "model.mlp_width": 64,
    },
}  # fmt: skip
# One block says as much as two where they are unrolled, and compiles in half the time.
LOOPS = {"loop": {"model.layers": 1}, "scan": {"model.layers": 2, "model.layer_loop": "scan"}}
SIZES = {"model.width": 32, "model.heads": 8, "model.vocab_size": 264}
COMMON = SIZES | {"model.init_std": 0.1, "optim.warmup_steps": 0, "train.steps": 20}


@pytest.fixture(scope="module")
def build_on(make_config):
    """`build_on((data, fsdp, tensor, expert, context), changes)`: the experiment on as many devices as the sizes ask for."""

    def make(sizes, changes):
        axes = dict(zip(("data", "fsdp", "tensor", "expert", "context"), sizes, strict=False))
        config = make_config(COMMON | changes | {f"mesh.{k}": v for k, v in axes.items()})
        whole = mesh.make
        with pytest.MonkeyPatch.context() as patch:
            devices = jax.devices()[: int(np.prod(sizes))]
            patch.setattr(mesh, "make", lambda **section: whole(**section, devices=devices))
            return build_module.build(config)

    return make


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

    def get(family, loop):
        if (family, loop) not in made:
            built = build_on(ONE, FAMILIES[family] | LOOPS[loop])
            params = jax.device_get(jax.jit(built.init)().params)
            made[family, loop] = (params, *loss_and_grads(built, params))
        return made[family, loop]

    return get


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_loss_and_gradients(build_on, on_one_device, sizes, family, loop):
    params, value, grads = on_one_device(family, loop)
    built = build_on(sizes, FAMILIES[family] | LOOPS[loop])
    kernels = [r for r in built.layout.table(built.abstract_state().params) if r.path.endswith("kernel")]
    assert all(r.note == "" for r in kernels)
    same(loss_and_grads(built, params), (value, grads))


def same(got, want):
    """Losses, and gradients, each against the largest of its array."""
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in want[1].values()))
    assert norm > 0.1
    for path, g in want[1].items():
        scale = max(np.max(np.abs(g)), 1e-3 * norm)
        np.testing.assert_allclose(got[1][path] / scale, g / scale, rtol=0, atol=1e-5, err_msg=path)


MIXTURE = FAMILIES["llama"] | {"model.experts": 4, "model.mlp_width": 16, "model.router_z": 0.01}
MIXTURES = {
    # Few slots, so that some tokens are dropped.
    "slots": (MIXTURE | {"model.expert_capacity": 0.75} | LOOPS["scan"], [(1, 1, 2, 4), (2, 2, 1, 2)]),
    "everywhere": (MIXTURE | LOOPS["loop"], [(2, 2, 2, 1), (8, 1, 1, 1)]),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts(build_on, kind):
    changes, meshes = MIXTURES[kind]
    one = build_on((1, 1, 1, 1), changes)
    params = jax.device_get(jax.jit(one.init)().params)
    value, grads = loss_and_grads(one, params)
    assert all(np.any(g != 0) for path, g in grads.items() if "experts" in path or "router" in path)
    for sizes in meshes:
        built = build_on(sizes, changes)
        rows = built.layout.table(built.abstract_state().params)
        assert all(row.note == "" for row in rows if row.path.endswith("kernel"))
        same(loss_and_grads(built, params), (value, grads))


def test_experts_that_do_not_fit_the_mesh(build_on):
    with says("mesh.expert=8 needs experts that it divides and that have slots; model.experts=4,"
              " model.expert_capacity=1.0. Without slots (None) every device holds every expert."):  # fmt: skip
        build_on((1, 1, 1, 8), MIXTURE | {"model.expert_capacity": 1.0})
    with says("mesh.expert=2: model.name='gpt' has no experts here. Use mesh.fsdp."):
        build_on((4, 1, 1, 2), FAMILIES["llama"])


# Every axis beside `context`, which alone is the ring of eight; with slots some tokens find none.
LONG = FAMILIES["llama"] | {"data.seq_len": 16, "model.max_len": 16}
SPLIT = {
    "loop": (LOOPS["loop"], (1, 1, 1, 1, 8)),
    "scan": (LOOPS["scan"] | {"model.remat": "full", "model.kv_heads": 1}, (1, 2, 2, 1, 2)),
    "slots": (MIXTURES["slots"][0], (1, 1, 1, 2, 4)),
    "everywhere": (MIXTURES["everywhere"][0], (2, 1, 2, 1, 2)),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_a_length_that_is_split(build_on, kind):
    """Packed documents, each with positions of its own."""
    changes = LONG | SPLIT[kind][0]
    one, split = build_on(ONE, changes), build_on(SPLIT[kind][1], changes)
    params, batch = jax.device_get(jax.jit(one.init)().params), one.data.train.batch_at(0)
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
            build_on((1, 1, 1, 1, 8), changes)
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
TARGETS = {**MESHES, "1 device": ONE, "2 devices": (1, 2, 1), "4 devices": (1, 2, 2)}


@pytest.fixture(scope="module")
def targets(build_on):
    return {name: build_on(sizes, FAMILIES["llama"]) for name, sizes in TARGETS.items()}


@pytest.mark.parametrize("origin", MESHES)
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

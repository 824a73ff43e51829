"""Plans: bytes of programs by hand, times of collectives by formula, and a whole plan for simulated devices."""

import jax
import jax.numpy as jnp
import pytest

from experiments import plan as command
from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.parallel import hbm
from tfm_jax.parallel.chips import CHIPS, Chip, seconds
from tfm_jax.parallel.hlo import Collective
from tfm_jax.parallel.plan import Topology, planned, topology

PROGRAM = """HloModule m

%sliced (param_0: f32[12,8], param_1: s32[]) -> f32[1,8] {
  %param_0 = f32[12,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %b = f32[12,8]{1,0} bitcast(%param_0)
  ROOT %ds = f32[1,8]{1,0} dynamic-slice(%b, %param_1), dynamic_slice_sizes={1,8}
}

%written (param_0.1: bf16[12,8], param_1.1: bf16[1,8], param_2.1: s32[]) -> bf16[12,8] {
  %param_0.1 = bf16[12,8]{1,0} parameter(0)
  %param_1.1 = bf16[1,8]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  ROOT %dus = bf16[12,8]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}

%both (param_0.2: bf16[12,8], param_1.2: bf16[1,8], param_2.2: s32[], param_3.2: f32[12,8]) -> (bf16[12,8], f32[1,8]) {
  %param_0.2 = bf16[12,8]{1,0} parameter(0)
  %param_1.2 = bf16[1,8]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  %param_3.2 = f32[12,8]{1,0} parameter(3)
  %cut = f32[1,8]{1,0} fusion(%param_3.2, %param_2.2), kind=kLoop, calls=%sliced
  %put = bf16[12,8]{1,0} fusion(%param_0.2, %param_1.2, %param_2.2), kind=kLoop, calls=%written
  ROOT %both_root = (bf16[12,8]{1,0}, f32[1,8]{1,0}) tuple(%put, %cut)
}

%body (p: (s32[], f32[12,8], bf16[12,8])) -> (s32[], f32[12,8], bf16[12,8]) {
  %p = (s32[], f32[12,8], bf16[12,8]) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %w = f32[12,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %k = bf16[12,8]{1,0} get-tuple-element(%p), index=2
  %f.1 = f32[1,8]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%sliced
  %c = bf16[1,8]{1,0:S(1)} convert(%f.1)
  %f.2 = bf16[12,8]{1,0} fusion(%k, %c, %i), kind=kLoop, calls=%written
  %f.3 = (bf16[12,8]{1,0}, f32[1,8]{1,0:S(1)}) fusion(%f.2, %c, %i, %w), kind=kLoop, calls=%both
  %f.4 = bf16[12,8]{1,0} get-tuple-element(%f.3), index=0
  ROOT %t = (s32[], f32[12,8], bf16[12,8]) tuple(%i, %w, %f.4)
}

%condition (p: (s32[], f32[12,8], bf16[12,8])) -> pred[] {
  %limit = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[4,8], y: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %s = (f32[8,2]{1,0:S(1)}, f32[8,2]{1,0}, u32[]) copy-start(%y)
  %d.1 = f32[8,2]{1,0:S(1)} copy-done(%s)
  %b = bf16[12,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %w.1 = (s32[], f32[12,8], bf16[12,8]) while(%t), condition=%condition, body=%body
  ROOT %d = f32[4,2]{1,0} dot(%x, %d.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_bytes_by_hand():
    """In the loop a row of 8 float32 comes in and one of 8 bfloat16 goes out, and both again at once; outside y, x and the product."""
    assert hbm.moved(PROGRAM) == 12 * 2 * (8 * 4 + 8 * 2) + 64 + 128 + 32


def test_bytes_of_a_product():
    x, y = jnp.ones((256, 64)), jnp.ones((64, 128))
    text = jax.jit(jnp.dot).lower(x, y).compile().as_text()
    assert hbm.moved(text) == 4 * (256 * 64 + 64 * 128 + 256 * 128)


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("all-gather", 7 / 8 * 8e9 / 200e9),
        ("reduce-scatter", 7 / 8 * 8e9 / 200e9),
        ("all-reduce", 14 / 8 * 8e9 / 200e9),
        ("all-to-all", 2 * 7 / 8 * 8e9 / 200e9),
        ("collective-permute", 8e9 / 100e9),
    ],
)
def test_times_of_collectives(kind, want):
    """On a v5p's ring of eight, 8 GB; twice as fast on two rings, slower between slices, and never below a hop a chip."""
    chip, one = CHIPS["v5p"], Collective(kind, int(8e9), ("fsdp",), 8, 3)
    took = seconds(chip, one, dimensions=1, across=False)
    assert took == pytest.approx(3 * want)
    assert seconds(chip, one, dimensions=2, across=False) == pytest.approx(took / 2)
    assert seconds(chip, one, dimensions=0, across=True) == pytest.approx(took * 200e9 / 6.25e9)
    small = Collective(kind, 8, ("fsdp",), 8, 3)
    hops = 1 if kind == "collective-permute" else 4
    assert seconds(chip, small, dimensions=1, across=False) == pytest.approx(3 * hops * 1e-6)


@pytest.fixture(scope="module")
def slow():
    """Devices that are here, as if they were chips of a pod."""
    return Topology("8 cores", jax.devices(), Chip("core", 1e11, 2**30, 1e10, 1e9, 1e8))


def test_a_plan_adds_up(make_config, slow):
    config = make_config({"mesh.data": 2, "mesh.fsdp": 4, "model.layers": 2, "model.layer_loop": "scan",
                          "model.remat": "full", "model.width": 64, "data.seq_len": 16, "data.batch_size": 16})  # fmt: skip
    experiment, plan = planned(config, slow)
    assert plan.params == experiment.parameter_count and plan.tokens == 256 and plan.chips == 8
    assert plan.model_flops == 256 * experiment.flops_per_token
    attention = 256 * 12 * 2 * 64 * 16
    assert plan.causal_flops == plan.model_flops - attention / 2
    logits = 6 * 256 * 64 * 257
    assert 1.2 < (plan.hardware_flops - logits) / (plan.model_flops - logits) < 4 / 3
    assert plan.compute == pytest.approx(plan.hardware_flops / 8e11)
    state = experiment.abstract_state()
    held = sum(row.bytes_per_device for row in experiment.layout.table(state))
    assert held < plan.hbm < 2**30 and plan.fits and plan.memory > held / 1e10
    assert 0 < plan.arguments < plan.hbm and plan.temporaries < plan.hbm
    axes = {one.axes for one in plan.traffic}
    assert ("all-gather", ("fsdp",)) in {(one.kind, one.axes) for one in plan.traffic} and len(axes) < len(plan.traffic)
    assert ("fsdp",) in axes and any("data" in one for one in axes) and not any(one.network for one in plan.traffic)
    exposed = sum(one.exposed for one in plan.traffic)
    hidden = sum(one.seconds for one in plan.traffic) - exposed
    assert plan.step == pytest.approx(max(plan.compute, plan.memory, hidden) + exposed)
    assert plan.mfu == pytest.approx(plan.model_flops / plan.step / 8e11)
    found = command.figures(plan, 256e3)
    assert found["chip_hours"] == pytest.approx(8 * 1000 * plan.step / 3600)
    assert {"params", "hbm_gib_per_chip", "fits", "step_seconds", "mfu", "bottleneck", "compile_seconds"} <= set(found)
    assert "fits" in command._report(plan, slow.chip, 256e3)


def test_a_mixture_is_counted_without_its_empty_slots(make_config, slow):
    """Its model's FLOPs are those of the experts that each token takes, attention's alone are halved; what stops a run early is
    no matter of a plan."""
    changes = {"model.experts": 4, "model.expert_capacity": 2.0, "model.bias": "none", "model.layers": 2, "mesh.expert": 2,
               "train.stop_metric": "eval/validation/loss"}  # fmt: skip
    experiment, plan = planned(make_config(changes), slow)
    assert plan.model_flops == plan.tokens * experiment.flops_per_token < plan.hardware_flops
    assert plan.causal_flops == plan.model_flops - plan.tokens * 12 * 2 * 16 * 8 / 2


def test_a_pipeline_and_the_picture(make_config, slow, tmp_path):
    """Turns in which a stage waits are the hardware's: three for two microbatches."""
    changes = {"mesh.data": 4, "mesh.stage": 2, "model.layers": 2, "model.layer_loop": "scan"}
    experiment, plan = planned(make_config(changes), slow)
    assert experiment.pipeline == (2, 2) and plan.model_flops == plan.tokens * experiment.flops_per_token
    logits = 6 * plan.tokens * 16 * 257
    assert (plan.hardware_flops - logits) / (plan.model_flops - logits) == 3 / 2
    assert ("stage",) in {one.axes for one in plan.traffic}
    command._picture(plan, tmp_path / "plans" / "a.png")
    assert (tmp_path / "plans" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(make_config, slow):
    for name in ("v5q:4x4", "v5p", "v5p:4by4"):
        with pytest.raises(UserError, match="write CHIP:SHAPE, for instance v5p:4x4x4"):
            topology(name)
    with pytest.raises(UserError, match=r"mesh: data=3 x .* = 3 devices, but there are 8"):
        planned(make_config({"mesh.data": 3}), slow)
    with says("--tokens=0.0: must be above 0."):
        command.main(["--config=configs/gpt_stdlib.py", "--topology=v5p:4x4x4", "--tokens=0"])

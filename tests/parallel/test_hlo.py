"""Collectives read from compiled programs: what was written down by hand, in loops, along axes; and the compiler's other spellings."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tfm_jax.parallel import hbm, hlo
from tfm_jax.parallel.hlo import Collective

MESH = {"data": 2, "tensor": 4}


@pytest.fixture(scope="module")
def found():
    """Of 12 x 8 float32 on each device, in a loop of 3, one of each kind along one axis or both."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "tensor")), out_specs=P(), check_vma=False)
    def local(x):
        def body(carry, _):
            carry = jax.lax.psum(carry, "tensor") * 0.1
            carry = jax.lax.psum_scatter(jnp.tile(carry, (2, 1)), "data", tiled=True)
            carry = jax.lax.ppermute(carry, "tensor", [(0, 1), (1, 2), (2, 3), (3, 0)])
            return jnp.sin(jax.lax.all_to_all(carry, "tensor", 0, 0, tiled=True)), None

        x, _ = jax.lax.scan(body, x, None, length=3)
        return jax.lax.all_gather(x, ("data", "tensor"), tiled=True)

    compiled = jax.jit(local).lower(jnp.ones((96, 8))).compile()
    return hlo.read(compiled.as_text(), MESH)


@pytest.mark.parametrize(
    ("kind", "size", "axes", "group", "times"),
    [
        ("all-reduce", 384, ("tensor",), 4, 3),
        ("reduce-scatter", 768, ("data",), 2, 3),
        ("collective-permute", 384, ("tensor",), 2, 3),
        ("all-to-all", 384, ("tensor",), 4, 3),
        ("all-gather", 3072, ("data", "tensor"), 8, 1),
    ],
)
def test_what_was_written_is_found(found, kind, size, axes, group, times):
    (one,) = (c for c in found.collectives if c.kind == kind)
    assert (one.axes, one.group, one.times) == (axes, group, times)
    assert one.size == size and found.endless == 0


TEXT = """HloModule m

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]) parameter(0)
  %ag.2 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
  %f.2 = bf16[8,64] fusion(%x), kind=kCustom, calls=%middle
  %rs = (f32[4], f32[2,2]) reduce-scatter(%y, %z), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
}

%middle (x: bf16[8]) -> bf16[8] {
  %ag.3 = bf16[64,8]{1,0} all-gather(%x), channel_id=11, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%start (x: bf16[8]) -> bf16[8] {
  %ag.4 = bf16[64,8]{1,0} all-gather(%x), channel_id=11, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  ROOT %c = (bf16[8,8]) custom-call(%ag.4), custom_call_target="AsyncCollectiveStart"
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%unsaid (p: (s32[], bf16[8,16])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %f.1 = bf16[8,64] fusion(%x), kind=kCustom, calls=%start
  %w.1 = (s32[], bf16[8,16]) while(%t), condition=%condition, body=%body, metadata={op_name="a"}
  %s = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%x), channel_id=12, replica_groups={{0,1,2,3},{4,5,6,7}}
  %w.2 = (s32[], bf16[8,16]) while(%t), condition=%unsaid, body=%other
  %ag.9 = f32[4]{0} all-gather(%x), channel_id=14, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}
  %ar = f32[3]{0} all-reduce(%x), channel_id=13, replica_groups=mesh['a'=8] {'a':(4)2}, to_apply=%sum
}
"""


def test_the_compilers_other_spellings():
    program = hlo.read(TEXT, MESH)
    assert program.endless == 1
    assert {(c.kind, c.size, c.axes, c.group, c.times) for c in program.collectives} == {
        ("all-gather", 8 * 64 * 2, ("tensor",), 4, 12),
        ("reduce-scatter", 4 * (4 + 4) * 4, ("tensor",), 4, 12),
        # Spread over a loop that it is hidden behind, but begun once.
        ("all-gather", 64 * 8 * 2, ("data",), 2, 1),
        ("all-gather", 32 * 4 * 2, ("tensor",), 4, 1),
        ("all-gather", 16, ("tensor",), 4, 1),
        ("all-reduce", 12, ("tensor",), 2, 1),
    }
    assert all(isinstance(c, Collective) for c in program.collectives)
    with pytest.raises(ValueError, match="Groups of devices in a spelling that is not known"):
        hlo.read(TEXT.replace("{{0,1,2,3},{4,5,6,7}}", "everybody"), MESH)


STARTS = """HloModule of_starts

ENTRY %main (x: f32[100]) -> f32[100] {
  %ar = (f32[100]{0:T(8,128)}, f32[50]{0}) all-reduce-start(%x, %y), channel_id=1, replica_groups={{0,4}}, to_apply=%sum
  %ad = (f32[100]{0:T(8,128)}, f32[50]{0}) all-reduce-done(%ar)
  %ag = ((f32[10]{0:T(8,128)}, f32[20]{0}), (f32[80]{0}, f32[160]{0:T(8,128)S(1)})) all-gather-start(%a, %b), channel_id=2, replica_groups={{0,1}}
  %f = f32[100] fusion(%x), kind=kLoop, calls=%other
  %gd = (f32[80]{0}, f32[160]{0}) all-gather-done(%ag)
  %rs = (f32[80]{0}, f32[10]{0}) reduce-scatter-start(%a), channel_id=3, replica_groups={{0,1}}
  %rd = f32[10]{0} reduce-scatter-done(%rs)
  %cp = (f32[7]{0}, f32[7]{0}, u32[], u32[]) collective-permute-start(%c), channel_id=4, source_target_pairs={{0,1}}
  %d = f32[8,8] dot(%x, %x)
  %cd = f32[7]{0} collective-permute-done(%cp)
  %yes = f32[3] conditional(%p, %x, %x), true_computation=%branch, false_computation=%other
}

%branch (x: f32[100]) -> f32[3] {
  ROOT %a2 = f32[3]{0} all-reduce(%x), channel_id=5, replica_groups={{0,1}}, to_apply=%sum
}

%other (x: f32[100]) -> f32[3] {
  ROOT %n = f32[3]{0} negate(%x)
}
"""


def test_what_is_started_and_what_it_is_hidden_behind():
    """Several arrays that travel together count together; a start with nothing before its end hides nothing."""
    found = {(c.kind, c.size, c.hidden) for c in hlo.read(STARTS, {"a": 2, "b": 4}).collectives}
    assert found == {
        ("all-reduce", 600, False),
        ("all-gather", 960, True),
        ("reduce-scatter", 320, False),
        ("collective-permute", 28, True),
        ("all-reduce", 12, False),
    }


SLICES = """HloModule of_a_slice

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s.1 = (bf16[8,16]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="cp.1",_xla_megascale_target={{100000->200000},{100001->200001}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %r.1 = (bf16[8,16]{1,0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="cp.1",_xla_megascale_target={{100000->200000},{100001->200001}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %d.1 = (bf16[8,16]{1,0}, token[]) recv-done(%r.1), channel_id=1, is_host_transfer=true
  %f.1 = bf16[8,16] fusion(%d.1), kind=kLoop, calls=%sum
  %ag = bf16[8,32]{1,0} all-gather(%f.1), channel_id=3, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, dimensions={1}
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %w.1 = (s32[], bf16[8,16]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s.2 = (f32[3,4]{1,0}, u32[], token[]) send(%x, %t), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="ag.1",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %r.2 = (f32[2,3,4]{1,0}, u32[], token[]) recv(%t), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="ag.1",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %f.2 = bf16[8,16] fusion(%x), kind=kLoop, calls=%sum
  %d.2 = (f32[2,3,4]{1,0}, token[]) recv-done(%r.2), channel_id=5, is_host_transfer=true
}
"""


def test_a_program_of_one_slice():
    """Partitions are the first slice's, and what goes between slices is sent: on each turn, and behind other work."""
    found = hlo.read(SLICES, {"data": 4, "fsdp": 2}).collectives
    assert {(c.kind, c.size, c.axes, c.group, c.times, c.hidden, c.across) for c in found} == {
        ("collective-permute", 8 * 16 * 2, ("data",), 2, 5, False, True),
        ("all-gather", 2 * 3 * 4 * 4, ("data",), 2, 1, True, True),
        ("all-gather", 8 * 32 * 2, ("fsdp",), 2, 5, False, False),
    }


def test_what_comes_behind_a_kernel():
    """Whose attributes go over several lines, as those of `splash` do, one of which begins like the end of a computation."""
    text = """HloModule m

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %kernel = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  ROOT %sum = f32[8,4]{1,0} all-reduce(%kernel), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
    (one,) = hlo.read(text, MESH).collectives
    assert (one.kind, one.size, one.axes, one.times) == ("all-reduce", 128, ("tensor",), 1)
    assert hbm.moved(text) == 2 * 128

"""Placement by rules: alignment, what gives way, and what is reported."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.errors import says
from tfm_jax.errors import UserError
from tfm_jax.parallel import mesh, sharding
from tfm_jax.paths import flatten
from tfm_jax.train import rundir
from tfm_jax.train.build import build


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture(scope="module")
def layout():
    return mesh.make(data=2, fsdp=2, tensor=2).with_rules(
        [(r"up/kernel$", ("fsdp", "tensor")), (r"bias$", ("tensor",))]
    )


def rows(layout, tree):
    return {row.path: row for row in layout.table(tree)}


def test_rules_align_to_the_last_dimensions(layout):
    tree = {"block_0": {"up": {"kernel": shape(4, 6), "bias": shape(6)}}, "blocks": {"up": {"kernel": shape(3, 4, 6)}}}
    tree["opt"] = [{"mu": tree["block_0"], "nu": tree["blocks"]}]
    placed = {path: s.spec for path, s in flatten(layout.place(tree)).items()}
    assert placed == {
        "block_0/up/kernel": P("fsdp", "tensor"),
        "block_0/up/bias": P("tensor"),
        "blocks/up/kernel": P(None, "fsdp", "tensor"),
        "opt/0/mu/up/kernel": P("fsdp", "tensor"),
        "opt/0/mu/up/bias": P("tensor"),
        "opt/0/nu/up/kernel": P(None, "fsdp", "tensor"),
    }
    assert all(row.note == "" for row in layout.table(tree))


def test_bytes_per_device_are_those_of_real_shards(layout):
    x = shape(3, 4, 6)
    real = jax.device_put(jnp.zeros(x.shape), layout.place({"up": {"kernel": x}})["up"]["kernel"])
    sizes = {s.data.nbytes for s in real.addressable_shards}
    assert sizes == {rows(layout, {"up": {"kernel": x}})["up/kernel"].bytes_per_device} == {3 * 2 * 3 * 4}


def test_an_axis_that_does_not_divide_is_dropped_and_reported(layout):
    found = rows(layout, {"up": {"kernel": shape(5, 6), "bias": shape(7)}, "q": {"up": {"kernel": shape(5, 7)}}})
    assert found["up/kernel"].spec == P(None, "tensor") and found["up/kernel"].note == "fsdp=2 does not divide 5"
    assert found["up/bias"].spec == P(None) and found["up/bias"].note == "tensor=2 does not divide 7"
    assert found["q/up/kernel"].note == "fsdp=2 does not divide 5; tensor=2 does not divide 7"


def test_two_axes_on_one_dimension():
    layout = mesh.make(data=2, fsdp=2, tensor=2).with_rules([("x", (("data", "fsdp"),))])
    found = rows(layout, {"x": {"a": shape(8), "b": shape(6)}})
    assert found["x/a"].spec == P(("data", "fsdp"))
    assert found["x/b"].spec == P(None) and found["x/b"].note == "data*fsdp=4 does not divide 6"


def test_scanned_layers_are_split_over_stages():
    layout = mesh.make(fsdp=2, tensor=2, stage=2).with_rules([(r"up/kernel$", ("fsdp", "tensor"))])
    own = {"up": {"kernel": shape(4, 4, 6), "bias": shape(4, 6)}, "scale": shape(4, 300, 300), "count": shape()}
    found = rows(layout, {"blocks": own, "mu": {"blocks": {"up": {"kernel": shape(3, 4, 6)}}}, "block_0": own})
    assert {path: row.spec for path, row in found.items() if path.startswith("blocks")} == {
        "blocks/up/kernel": P("stage", "fsdp", "tensor"),
        "blocks/up/bias": P("stage", None),
        "blocks/scale": P("stage", "fsdp", None),
        "blocks/count": P(),
    }
    assert found["mu/blocks/up/kernel"][3:] == (P(None, "fsdp", "tensor"), 3 * 2 * 3 * 4, "stage=2 does not divide 3")
    assert found["block_0/up/kernel"].spec == P(None, "fsdp", "tensor")
    assert layout.batch_ways == 4 and layout.batch().shard_shape((8, 3)) == (2, 3)


def test_large_arrays_without_a_rule_fall_back_to_fsdp(layout):
    found = rows(layout, {"a": shape(300, 301), "b": shape(301, 303), "c": shape(255, 257), "d": shape(255, 301, 2)})
    assert (found["a"].spec, found["a"].note) == (P("fsdp", None), "no rule: fsdp fallback")
    assert (found["b"].spec, found["b"].note) == (P(), "no rule and no dimension divides by fsdp=2: replicated")
    assert (found["c"].spec, found["c"].note) == (P(), "")  # 65,535 elements: one below the limit
    assert found["d"].spec == P(None, None, "fsdp")
    one = mesh.make(data=8)
    assert rows(one, {"a": shape(300, 301)})["a"] == ("a", (300, 301), "float32", P(), 300 * 301 * 4, "")


def test_a_rule_for_more_dimensions_than_there_are_replicates(layout):
    found = rows(layout, {"up": {"kernel": shape(4)}})["up/kernel"]
    assert (found.spec, found.note) == (P(), r"rule 'up/kernel$' is for 2 dimensions: replicated")


def test_the_rules_of_a_config_come_first():
    layout = mesh.make(fsdp=4, rules=[("up/kernel$", (None, "fsdp"))]).with_rules([("kernel$", ("fsdp", None))])
    placed = layout.place({"up": {"kernel": shape(4, 4)}, "down": {"kernel": shape(4, 4)}})
    assert placed["up"]["kernel"].spec == P(None, "fsdp") and placed["down"]["kernel"].spec == P("fsdp", None)


def test_a_malformed_rule():
    layout = mesh.make(rules=[("(", (None,))])
    message = "mesh.rules: '(' is not a regular expression: missing ), unterminated subpattern at position 0."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        layout.place({"a": shape(2)})


def test_every_large_array_of_a_whole_state_is_split(make_config):
    """Parameters and Adam's moments of the family, unrolled and scanned, have rules that fit."""
    for loop in ("loop", "scan"):
        built = build(
            make_config({"mesh.fsdp": 2, "mesh.tensor": 2, "model.layer_loop": loop, "model.vocab_size": 260})
        )
        state = built.abstract_state()
        found = rows(built.layout, state)
        kernels = {path: row for path, row in found.items() if path.endswith("kernel")}
        assert len(kernels) == 3 * 6  # parameters, first and second moments of q, k, v, out, up, down
        for path, row in kernels.items():
            whole = row.bytes_per_device / 4 * 4
            assert whole == np.prod(row.shape), f"{path} is not in 4 parts"
            assert row.note == ""
        params = {p.removeprefix("params/"): r.spec for p, r in found.items() if p.startswith("params/")}
        for path, row in found.items():
            if path.startswith("opt/") and len(row.shape):
                assert row.spec == params[path.split("u/", 1)[1]], path
        assert state.params["token_embedding"]["embedding"].sharding.spec == P("tensor", "fsdp")


def test_tensor_that_splits_nothing(make_config):
    odd = {"model.width": 12, "model.heads": 3, "model.kv_heads": 3, "model.mlp_width": 20, "model.vocab_size": 260}
    at_first = "token_embedding/embedding: tensor=8 does not divide 260"
    fits = " Use a number that divides model.heads and the widths, or mesh.fsdp."
    with says(f"mesh.tensor=8 splits none of the parameters. {at_first}.{fits}"):
        build(make_config(odd | {"mesh.tensor": 8}))
    no_rules, params = mesh.make(tensor=8), {"kernel": shape(16, 16)}
    rules = " No rule names it: give one in mesh.rules, or RULES beside the model's class; or use mesh.fsdp."
    with says(f"mesh.tensor=8 splits none of the parameters.{rules}"):
        no_rules.check_splits(params)
    no_rules.with_rules([("kernel$", (None, "tensor"))]).check_splits(params)
    joint = [("kernel$", (("fsdp", "tensor"), None))]
    no_rules.with_rules(joint).check_splits(params)
    why = " kernel: fsdp*tensor=8 does not divide 12."
    with says(f"mesh.tensor=2 splits none of the parameters.{why}{fits}"):
        mesh.make(fsdp=4, tensor=2, rules=joint).check_splits({"kernel": shape(12, 16)})


def test_a_teacher_of_another_family_has_its_own_rules(make_config, tmp_path):
    masked = {"model.types": 0, "data.objective": "mask", "model.outputs": "('tokens',)"} | {
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    teacher = build(make_config({**masked, "model.name": "longformer", "model.window": 4}))
    rundir.begin(tmp_path / "teacher", teacher.config, teacher.data.tokenizer)
    inside = "{'name': 'token_prediction'}"
    taught = {"task.name": "distillation", "task.teacher": f"'{tmp_path}/teacher'", "task.task": inside}
    built = build(make_config({**masked, **taught, "model.name": "bert"}))
    kernels = {path: row for path, row in rows(built.layout, built.abstract_state()).items() if path.endswith("kernel")}
    own = [row for path, row in kernels.items() if "_global/kernel" in path]
    assert len(own) == 3 and all("teacher/" in row.path and row.spec == P("fsdp", "tensor") for row in own)


def test_what_gives_way_is_said(caplog):
    """Two of three arrays, the larger first."""
    caplog.set_level("INFO")
    layout = mesh.make(tensor=4, data=2, rules=[("kernel$", (None, "tensor"))])
    params = {"a": {"kernel": shape(4, 6)}, "b": {"kernel": shape(4, 8)}, "c": {"kernel": shape(40, 6)}}
    layout.check_splits(params)
    assert caplog.messages == [
        "mesh: 2 of 3 arrays are not placed as a rule says, for instance c/kernel: tensor=4 does not divide 6."
        " --print_sharding has all."
    ]
    layout.check_splits({"b": params["b"]})
    assert len(caplog.messages) == 1


def test_fresh_states_are_born_where_they_live(make_config):
    built = build(make_config({"mesh.fsdp": 2, "mesh.tensor": 2}))
    want = jax.tree.map(lambda x: x.sharding, built.abstract_state())
    with jax.set_mesh(built.layout.mesh):
        state = built.fresh_state()
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, ("batch",)) is x  # not even the names are looked at
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1]).mesh):
        assert sharding.constrain(x, ("batch", "embed")) is x


def test_constrain_splits_by_the_meaning_of_dimensions():
    layout = mesh.make(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(layout.mesh):
        x = jax.jit(lambda x: sharding.constrain(x, ("batch", "length", "mlp")))(jnp.ones((4, 3, 6)))
        odd = jax.jit(lambda x: sharding.constrain(x, ("batch", "length", "mlp")))(jnp.ones((4, 3, 5)))
        with pytest.raises(ValueError, match=re.escape("constrain: 1 names ('batch',) for an array of shape (4, 3).")):
            jax.eval_shape(lambda x: sharding.constrain(x, ("batch",)), jnp.ones((4, 3)))
    assert x.sharding.shard_shape(x.shape) == (1, 3, 3)
    assert odd.sharding.shard_shape(odd.shape) == (1, 3, 5)


def test_table_text():
    layout = mesh.make(fsdp=2, data=4).with_rules([("kernel$", ("fsdp", None))])
    text = sharding.format_table(
        layout.table({"a": {"kernel": shape(3, 1024)}, "b": {"kernel": shape(512, 1024)}, "s": shape()})
    )
    assert text.splitlines() == [
        "parameter  shape     dtype    spec            MiB/device  note",
        "b/kernel   512x1024  float32  ('fsdp', None)  1.000",
        "a/kernel   3x1024    float32  (None, None)    0.012       fsdp=2 does not divide 3",
        "s          scalar    float32  ()              0.000",
        "3 arrays, 527,361 elements, 1.0 MiB per device; 1 not as a rule says.",
    ]

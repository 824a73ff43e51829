"""Parameters from a donor: renamed, restacked, resized, and a report of the rest."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.errors import UserError
from tfm_jax.models.gpt import Model
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.paths import flatten
from tfm_jax.train.adapters import tree_of
from tfm_jax.train.surgery import Misfit, Report, transfer


@functools.cache
def params(seed=0, loop="loop", layers=2):
    model = Model(BlockSpec(width=8, heads=2), vocab_size=5, max_len=4, layers=layers, layer_loop=loop)
    tree = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
    return model, tree["params"]


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


@pytest.mark.parametrize(
    ("donor_loop", "loop"), [("loop", "loop"), ("scan", "scan"), ("loop", "scan"), ("scan", "loop")]
)
def test_donors_with_another_layer_loop(donor_loop, loop):
    donor_model, donor = params(1, donor_loop)
    model, fresh = params(2, loop)
    found, report = transfer(flatten(donor), fresh)
    assert report.taken == sorted(flatten(fresh)) and not (report.missing or report.extra or report.resized)
    tokens = jnp.array([[1, 4, 0, 2]])
    want = jax.jit(donor_model.apply)({"params": donor}, tokens)["logits"]
    np.testing.assert_allclose(jax.jit(model.apply)({"params": found}, tokens)["logits"], want, rtol=1e-5, atol=1e-6)


def test_there_and_back_again():
    _, donor = params(1, "loop")
    stacked, _ = transfer(flatten(donor), params(2, "scan")[1])
    back, _ = transfer(flatten(stacked), params(3, "loop")[1])
    assert same(back, donor)


def test_missing_and_extra_are_reported():
    donor = {"a/kernel": jnp.ones(2), "head/kernel": jnp.ones(3)}
    fresh = {"a": {"kernel": jnp.zeros(2)}, "new": {"kernel": jnp.full(4, 7.0)}}
    found, report = transfer(donor, fresh)
    assert report == Report(["a/kernel"], ["new/kernel"], ["head/kernel"], [])
    assert str(report) == "1 parameters taken; 1 missing: new/kernel; 1 extra: head/kernel"
    assert found["a"]["kernel"].tolist() == [1, 1] and found["new"]["kernel"].tolist() == [7] * 4


def test_renaming_applies_in_order():
    donor = {"encoder/layer_0/w": jnp.ones(2), "other": jnp.ones(3)}
    fresh = {"stack": {"block_0": {"kernel": jnp.zeros(2)}}}
    found, report = transfer(donor, fresh, rename=[("^encoder/", "stack/"), [r"layer_(\d+)/w$", r"block_\1/kernel"]])
    assert found["stack"]["block_0"]["kernel"].tolist() == [1, 1]
    assert report.extra == ["other"]


def test_dtypes_and_placements_stay_the_models():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    fresh = {"a": jax.device_put(jnp.zeros(8, jnp.float32), sharding)}
    found, _ = transfer({"a": jnp.arange(8, dtype=jnp.bfloat16)}, fresh)
    assert found["a"].dtype == jnp.float32 and found["a"].sharding == sharding
    assert found["a"].tolist() == list(range(8))


def test_positions_are_resized_only_when_asked():
    donor = {"position_embedding/embedding": jnp.array([[0.0, 10], [4, 14]]), "x": jnp.ones(1)}
    fresh = {"position_embedding": {"embedding": jnp.zeros((4, 2))}, "x": jnp.zeros(1)}
    message = (
        "checkpoint.init_from: these parameters have another shape:\n  position_embedding/embedding: donor (2, 2),"
        " model (4, 2) (checkpoint.resize_positions=True would interpolate)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        transfer(donor, fresh)
    found, report = transfer(donor, fresh, resize_positions=True)
    assert report.resized == ["position_embedding/embedding"]
    # Linear between the centres of the cells, constant outside them.
    column = np.interp((np.arange(4) + 0.5) / 2 - 0.5, [0, 1], [0, 4])
    np.testing.assert_allclose(found["position_embedding"]["embedding"], np.stack([column, column + 10], 1), rtol=1e-6)


def test_all_wrong_shapes_are_listed():
    donor = {"a": jnp.ones(2), "b": jnp.ones((3, 3)), "c": jnp.ones(1)}
    fresh = {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(1)}
    with pytest.raises(Misfit) as found:
        transfer(donor, fresh, resize_positions=True)
    assert found.value.why == "a: donor (2,), model (3,)"
    assert str(found.value) == (
        "checkpoint.init_from: these parameters have another shape:\n  a: donor (2,), model (3,)\n  b: donor (3, 3), model (3,)"
    )


@pytest.mark.parametrize(
    ("donor", "rename", "message", "why"),
    [
        (
            ["x", "y"], [],
            "checkpoint.init_from: no parameter of the donor fits this model. Donor: x, y ...; model: a ..."
            " Use checkpoint.rename.", "none of its parameters fits",
        ),
        (["a"], [("b", "c")], "checkpoint.rename: 'b' matches no parameter of the donor.", "it has no parameter that 'b' renames"),
        (
            ["x1", "x2"], [(r"\d", "")], "checkpoint.rename: ('\\\\d', '') gives several parameters the same name.",
            "('\\\\d', '') gives several of its parameters the same name",
        ),
        (["a"], [("a", "b", "c")], "checkpoint.rename: ('a', 'b', 'c') is not a pair (regex, replacement).", None),
        (
            ["a"], [("(", "")],
            "checkpoint.rename: '(' is not a regular expression: missing ), unterminated subpattern at position 0.", None,
        ),
    ],
)  # fmt: skip
def test_errors(donor, rename, message, why):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$") as found:
        transfer({name: jnp.ones(1) for name in donor}, {"a": jnp.ones(1)}, rename=rename)
    assert getattr(found.value, "why", None) == why


@pytest.mark.parametrize("scanned", [False, True])
def test_layers_of_stacks_that_differ_in_depth(scanned):
    """None is left as initialised, or taken twice, where one stack is shallower than what is taken."""

    def stacks(encoder, decoder):
        sizes = {"encoder": encoder, "decoder": decoder}
        if scanned:
            return {f"{name}/blocks/w": jnp.arange(count * 2.0).reshape(count, 2) for name, count in sizes.items()}
        return {f"{name}/block_{i}/w": jnp.full(2, i) for name, count in sizes.items() for i in range(count)}

    blank = tree_of({path: jnp.zeros_like(x) for path, x in stacks(3, 3).items()})
    with pytest.raises(Misfit, match=r"^checkpoint\.layers=\(0, 2, 4\): the donor has layers 0 to 2 in decoder\.$"):
        transfer(stacks(6, 3), blank, layers=(0, 2, 4))
    with pytest.raises(Misfit, match=r"^checkpoint\.layers=\(0, 2, 4\): the donor has layers 0 to 2 in encoder\.$"):
        transfer(stacks(3, 6), blank, layers=(0, 2, 4))
    found, _ = transfer(stacks(6, 4), blank, layers=(0, 2, 3))
    want = stacks(6, 4)["encoder/blocks/w"][jnp.asarray((0, 2, 3))] if scanned else jnp.full(2, 3)
    np.testing.assert_array_equal(flatten(found)["encoder/blocks/w" if scanned else "encoder/block_2/w"], want)
    deeper = tree_of({path: jnp.zeros_like(x) for path, x in stacks(3, 2).items()})
    with pytest.raises(
        UserError, match=r"^checkpoint\.layers=\(0, 2, 3\) are 3, and this model has 2 layers in decoder\.$"
    ):
        transfer(stacks(6, 4), deeper, layers=(0, 2, 3))


def test_layers_of_a_stack_that_is_elsewhere():
    blank = {"norm": jnp.zeros(2), "block_0": {"w": jnp.zeros(2)}}
    donor = {"norm": jnp.ones(2), **{f"encoder/block_{i}/w": jnp.ones(2) for i in range(3)}}
    with pytest.raises(
        Misfit, match=r"^checkpoint\.layers=\(2,\): no stack of layers of the donor is where one of this model's is\."
    ):
        transfer(donor, blank, layers=(2,))
    found, _ = transfer(donor, blank, layers=(2,), rename=(("^encoder/", ""),))
    np.testing.assert_array_equal(found["block_0"]["w"], donor["encoder/block_2/w"])


def test_layers_with_gaps_cannot_be_stacked():
    donor = {"stack/block_0/w": jnp.ones(1), "stack/block_2/w": jnp.ones(1)}
    message = "checkpoint.init_from: layers [0, 2] of stack/blocks/w have gaps; they cannot be stacked."
    with pytest.raises(Misfit, match=f"^{re.escape(message)}$"):
        transfer(donor, {"stack": {"blocks": {"w": jnp.ones((2, 1))}}})


@pytest.mark.parametrize("donor_loop", ["loop", "scan"])
@pytest.mark.parametrize("loop", ["loop", "scan"])
def test_some_of_the_layers(donor_loop, loop):
    donor = flatten(params(1, donor_loop, layers=4)[1])
    found, report = transfer(donor, params(2, loop)[1], layers=(3, 1))
    assert not report.missing and not report.extra
    found, path = flatten(found), "attention/query/kernel"
    for new, old in enumerate((3, 1)):
        want = donor[f"stack/blocks/{path}"][old] if donor_loop == "scan" else donor[f"stack/block_{old}/{path}"]
        got = found[f"stack/blocks/{path}"][new] if loop == "scan" else found[f"stack/block_{new}/{path}"]
        np.testing.assert_array_equal(got, want)
    with pytest.raises(Misfit, match=r"^checkpoint\.layers=\(0, 4\): the donor has layers 0 to 3\.$") as found:
        transfer(donor, params(2, loop)[1], layers=(0, 4))
    assert found.value.why == "it has layers 0 to 3, and layer 4 was taken"
    with pytest.raises(UserError, match=r"^checkpoint\.layers=\(0, 1, 2\) are 3, and this model has 2 layers\.$"):
        transfer(donor, params(2, loop)[1], layers=(0, 1, 2))

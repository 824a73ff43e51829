"""Products in 8 bits: those that rules name and no others, training near float's, and a state that does not know of it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.errors import says
from tfm_jax.paths import flatten
from tfm_jax.train import quantize
from tfm_jax.train.build import build

pytest.importorskip("qwix")
RULES = "(('mlp/up', '{0}'), ('attention/(query|out)', '{0}'))"
# Of 32 steps, in which the loss falls to less than half.
SIZES = {"model.width": 32, "model.vocab_size": 264, "data.batch_size": 16, "train.steps": 32, "optim.lr": 1e-2, "mesh.data": 1,
         "model.layer_loop": "scan", "model.layers": 2}  # fmt: skip


@pytest.fixture(scope="module")
def built(make_config):
    """Experiments on one device, by what products are in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_, found=jax.devices()[:1]: found)
        return {
            kind: build(make_config(SIZES | ({"train.quantize": RULES.format(kind)} if kind != "float32" else {})))
            for kind in ("float32", "int8", "fp8")
        }


def products(jaxpr):
    """Dtypes of the operands of every product."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(str(v.aval.dtype) for v in equation.invars))
        for inner in jaxprs_in_params(equation.params):
            found += products(inner)
    return found


def test_only_what_rules_name(built):
    """Three kernels of the scanned block: in int8 forward alone, in fp8 forward and for both gradients."""
    found = {}
    for kind, one in built.items():
        with jax.set_mesh(one.layout.mesh):
            found[kind] = products(jax.make_jaxpr(one.step)(jax.eval_shape(one.init), one.batch(0)).jaxpr)
    assert set(found["float32"]) == {("float32", "float32")}
    assert found["int8"].count(("int8", "int8")) == 3
    assert found["fp8"].count(("float8_e4m3fn", "float8_e4m3fn")) == 3
    assert sum("float8_e5m2" in pair for pair in found["fp8"]) == 6
    # The others, attention's among them, are as many as they were.
    for kind, own in (("int8", 3), ("fp8", 9)):
        assert found[kind].count(("float32", "float32")) == len(found["float32"]) - own


def test_training_stays_near_float(built):
    """Over the last eight steps int8's loss is within 2 % of float's, fp8's within 10 %: its gradients have 2 bits behind the point,
    and in a model 32 wide few of their errors cancel."""
    losses = {}
    for kind, one in built.items():
        with jax.set_mesh(one.layout.mesh):
            state, step, losses[kind] = one.fresh_state(), one.jitted_step(), []
            for i in range(32):
                state, metrics = step(state, one.batch(i))
                losses[kind].append(float(metrics["loss"][0] / metrics["loss"][1]))
    want = np.mean(losses["float32"][-8:])
    assert want < losses["float32"][0] / 2
    for kind, near in (("int8", 0.02), ("fp8", 0.1)):
        assert losses[kind][0] != losses["float32"][0]
        assert np.mean(losses[kind][-8:]) == pytest.approx(want, rel=near), kind


def test_the_state_and_evaluation_do_not_know_of_it(built):
    states = {kind: flatten(jax.eval_shape(one.init)) for kind, one in built.items()}
    assert states["int8"] == states["float32"] and states["fp8"] == states["float32"]
    tokens = jnp.zeros((1, 8), jnp.int32)
    for one in built.values():
        params = jax.eval_shape(one.init).params
        program = jax.make_jaxpr(lambda p, one=one: one.model.apply({"params": p}, tokens)["logits"])(params)
        assert set(products(program.jaxpr)) == {("float32", "float32")}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("('mlp',)", "train.quantize: 'mlp' is not a pair (regex, 'int8' or 'fp8')."),
        ("(('mlp', 'int4'),)", "train.quantize: 'int4' of ('mlp', 'int4') does not exist. Did you mean 'int8'?"),
        (
            "(('stack/block_0/mlp/upp/kernel', 'int8'),)",
            "train.quantize: the pattern 'stack/block_0/mlp/upp/kernel' matches no parameter."
            " Did you mean 'stack/block_0/mlp/up/kernel'?",
        ),
    ],
)
def test_rules_that_are_none(make_config, rules, message):
    with says(message):
        build(make_config({"train.quantize": rules}))


def test_experts_are_no_plain_products(make_config):
    changes = {"model.experts": 2, "model.bias": "'none'", "train.quantize": "(('experts', 'int8'),)"}
    with says("train.quantize: stack/block_0/mlp/experts/down/kernel is not used in a plain product. Name others."):
        build(make_config(changes))


def test_operands_in_another_dtype(make_config):
    changes = {"model.matmul_dtype": "bfloat16", "train.quantize": "(('mlp', 'int8'),)"}
    with says(
        "model.matmul_dtype='bfloat16': what products in 8 bits (train.quantize) round is in model.dtype='float32'. Leave it out."
    ):
        build(make_config(changes))


def test_gradients_in_another_dtype(make_config):
    changes = {"model.dtype": "bfloat16", "model.gradient_dtype": "float32", "train.quantize": "(('mlp', 'int8'),)"}
    with says(
        "model.gradient_dtype='float32': gradients of products in 8 bits (train.quantize) are in model.dtype='bfloat16'."
        " Leave it out."
    ):
        build(make_config(changes))


def test_without_the_library(make_config, monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name, found=importlib.util.find_spec: None)
    with says("train.quantize needs Qwix: pip install 'tfm_jax[quantize]'."):
        quantize.check([["mlp", "int8"]])

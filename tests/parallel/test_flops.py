"""FLOPs of a jaxpr against the formula of a model, against XLA's own count, and in loops, recomputation and on several devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tfm_jax.parallel.flops import count
from tfm_jax.train.build import build

A, B = jnp.ones((3, 5, 7)), jnp.ones((7, 11))


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (lambda a, b: a @ b, 2 * 3 * 5 * 7 * 11),
        (lambda a, b: jnp.einsum("xyd,df->xf", a, b), 2 * 3 * 7 * 11),
        (lambda a, b: jax.lax.scan(lambda c, _: (c @ b @ b.T, None), a, None, length=4)[0], 4 * 4 * 15 * 77),
        (lambda a, b: jax.lax.cond(a[0, 0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 5, 11))), 2 * 15 * 77),
        (lambda a, b: jax.grad(lambda b: jnp.sum((a @ b) ** 2))(b), 4 * 15 * 77),
        (lambda a, b: jax.value_and_grad(lambda b: jnp.sum(jax.checkpoint(lambda b: jnp.sin(a @ b) ** 2)(b)))(b), 6 * 15 * 77),
        (lambda a, b: jax.lax.ragged_dot(a[0], jnp.ones((4, 7, 2)), jnp.array([1, 1, 2, 1])), 2 * 5 * 7 * 2),
        (lambda a, b: jax.lax.conv_general_dilated(a[None], jnp.ones((6, 3, 2, 2)), (1, 1), "VALID"),
         2 * 6 * 4 * 6 * 3 * 4),
    ],
)  # fmt: skip
def test_by_hand(function, want):
    assert count(jax.make_jaxpr(function)(A, B)) == want


def of_step(built):
    return jax.jit(built.step).trace(jax.eval_shape(built.init), built.data.train.batch_at(0)).jaxpr


def test_a_step_is_the_papers_formula(make_config):
    """Chowdhery et al. 2022, appendix B: forward and backward, attention not halved."""
    for changes in ({}, {"model.layers": 2, "model.layer_loop": "scan"}):
        built = build(make_config({"model.attention": "xla", **changes}))
        assert count(of_step(built)) == 64 * built.flops_per_token
        # 12 L H K T a token.
        assert count(of_step(built), weights=False) == 64 * 12 * built.model.layers * 16 * 8
    again = build(make_config({"model.attention": "xla", "model.layers": 2, "model.remat": "full"}))
    more = count(of_step(again))
    logits = 6 * 64 * 16 * 257
    # A block is computed twice, the logits are not; the last product of a block is not needed again.
    plain = 64 * again.flops_per_token - logits
    assert plain * 1.2 < more - logits < plain * 4 / 3


def test_what_runs_on_each_device_counts_for_all():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shards = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    got = count(jax.make_jaxpr(shards)(jnp.ones((6, 5)), jnp.ones((5, 7))))
    # Four devices do the same product each.
    assert got == 4 * 2 * 6 * 5 * 7


def test_against_the_compilers_count():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) @ w.T)

    w, x = jnp.ones((64, 128)), jnp.ones((256, 64))
    cost = jax.jit(jax.grad(loss)).lower(w, x).compile().cost_analysis()
    assert count(jax.make_jaxpr(jax.grad(loss))(w, x)) == pytest.approx(cost["flops"], rel=0.05)

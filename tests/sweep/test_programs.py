"""Functions that differ in a number, wherever it stands in the program: compiled once, each with its own answer."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import says
from tfm_jax.sweep import programs
from tfm_jax.sweep.programs import Shared, in_turn
from tfm_jax.sweep.together import Together


def function(a, b=2):
    """`a` in a loop, a branch, a recomputed and a nested part, in a while loop, in a key, and in an array of its own."""

    def f(x, steps):
        table = np.arange(3.0, dtype=np.float32) * a
        x = x + jax.random.normal(jax.random.key(int(10 * a)), x.shape) + table
        x, ys = jax.lax.scan(lambda c, y: (c * jnp.float32(a) + y, c.sum() * a), x, jnp.ones((4, 3)), reverse=True)
        x = jax.lax.cond(steps > 2, lambda x: x * a, lambda x: x - a, x)
        x = jax.grad(jax.checkpoint(lambda x: (jnp.sin(x * a) ** b).sum()))(x)
        x = jax.jit(lambda x: jax.nn.relu(x - a / 10) + a)(x)
        (x, _) = jax.lax.while_loop(lambda c: c[1] < steps, lambda c: (c[0] + a, c[1] + 1), (x, 0))
        return {"x": x, "ys": ys}

    return f


def test_one_program_for_all():
    shared, x = Shared(in_turn(1)), jnp.arange(3.0)
    made = [shared(function(a), out_shardings=None) for a in (0.5, 1.5, 2.5)]
    for one in made:
        one.lower(x, jnp.int32(5))
    (program,) = shared.programs
    for one, a in zip(made, (0.5, 1.5, 2.5), strict=True):
        for steps in (1, 5):
            got, want = one(x, jnp.int32(steps)), jax.jit(function(a))(x, jnp.int32(steps))
            jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6), got, want)
    compiled = [one.compiled for one in shared.programs if one.compiled is not None]
    assert len(compiled) == 1 and len(program.places) >= 8


def test_calls_at_a_time_are_one():
    """Five threads, one of which leaves early: rounds of four and one, then four; each has its own answer, or the error."""
    shared, x = Shared(Together), jnp.arange(3.0)
    rates = (0.5, 1.5, 2.5, 3.5, 4.5)
    made = [shared(function(a), donate_argnums=0) for a in rates]
    for one in made:
        one.lower(x, jnp.int32(5))
    start, found = threading.Barrier(len(rates)), {}

    def member(a, one):
        start.wait()
        found[a] = [one(x + i, jnp.int32(i)) for i in range(2 if a == 4.5 else 6)]

    threads = [threading.Thread(target=member, args=pair) for pair in zip(rates, made, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a in rates:
        for i, got in enumerate(found[a]):
            want = jax.jit(function(a))(x + i, jnp.int32(i))
            jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)
    (program,) = shared.programs
    assert program.compiled[1].sizes[-1] == 4


def test_calls_without_arguments():
    together = Together(lambda numbers: jnp.arange(3.0), {}, patience=0.0)
    np.testing.assert_array_equal(together([]), np.arange(3.0))


def test_an_error_is_each_callers():
    def wrong(numbers, x):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Together(wrong, {}, patience=0.0)([], jnp.ones(2))


def test_other_programs_are_others():
    shared, arguments = Shared(in_turn(1)), (jnp.arange(3.0), jnp.int32(5))
    first, other = (shared(function(1.5, b)).lower(*arguments).program for b in (2, 3))
    assert first is not other and shared(function(2.5, 3)).lower(*arguments).program is other


def test_numbers_where_they_cannot_become_arguments():
    """A kernel's program is compiled as it is."""
    kernel = SimpleNamespace(primitive=SimpleNamespace(name="pallas_call"), params={})
    with says("--vectorise: numbers differ inside of 'pallas_call', which is compiled as it is. Use --parallel."):
        programs._inside(kernel, [], {})

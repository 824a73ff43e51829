"""GPT-2 and Llama against `transformers`: logits, loss and every gradient, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm_jax.losses.cross_entropy import linear_cross_entropy

from .make_fixtures import FOLDER, Arrays, compute, load
from .weights import MODELS, params

FAMILIES = sorted(MODELS)


def part(arrays: Arrays, kind: str) -> Arrays:
    return {name.removeprefix(f"{kind}/"): x for name, x in arrays.items() if name.startswith(f"{kind}/")}


@functools.cache
def value_and_gradient(family: str):
    @jax.jit
    def run(weights, tokens):
        def loss(weights):
            out = MODELS[family].apply({"params": weights}, tokens)
            hidden = out["hidden"][:, :-1].reshape(-1, out["hidden"].shape[-1])
            losses, _ = linear_cross_entropy(hidden, out["unembedding"], tokens[:, 1:].reshape(-1))
            return jnp.mean(losses), out["logits"]

        return jax.value_and_grad(loss, has_aux=True)(weights)

    return run


def check(family: str, theirs: Arrays) -> None:
    weights = params(family, part(theirs, "weight"))
    init = jax.eval_shape(lambda: MODELS[family].init(jax.random.key(0), theirs["tokens"]))["params"]
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, init)
    (loss, logits), gradients = value_and_gradient(family)(weights, theirs["tokens"])
    np.testing.assert_allclose(logits, theirs["logits"], atol=1e-4)
    np.testing.assert_allclose(loss, theirs["loss"], rtol=1e-5)

    def compare(path, got, want) -> None:
        known = ~np.isnan(want)
        # Relative to the array's largest: a key bias has no gradient at all, only rounding.
        atol = 1e-4 * np.max(np.abs(want[known])) + 1e-6
        np.testing.assert_allclose(
            np.asarray(got)[known], want[known], rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(compare, gradients, params(family, part(theirs, "gradient")))


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_committed_fixture(family):
    check(family, load(FOLDER / f"{family}.npz"))


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_live(family):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    now, committed = compute(family), load(FOLDER / f"{family}.npz")
    check(family, now)
    assert set(now) == set(committed)
    for name, x in committed.items():
        known = ~np.isnan(x)
        np.testing.assert_allclose(now[name][known], x[known], rtol=1e-4, atol=1e-5, err_msg=name)

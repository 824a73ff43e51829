"""Mixture of experts in place of the MLP: each token goes through a few of many (Shazeer et al. 2017).

B batch, T length, D width, E experts, k experts a token, F hidden size of an expert, C slots of an expert in a row.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from tfm_jax.nn.capture import auxiliary
from tfm_jax.nn.linear import ACTIVATIONS
from tfm_jax.nn.ring import balanced, restored
from tfm_jax.nn.spec import BlockSpec
from tfm_jax.parallel.sharding import Rule, constrain, on_parts, spec_of

# Each expert lives on one device of `expert`, and there like any other MLP.
RULES: tuple[Rule, ...] = (
    (r"experts/(up|gate)/kernel$", ("expert", "fsdp", "tensor")),
    (r"experts/down/kernel$", ("expert", "tensor", "fsdp")),
    (r"router/kernel$", (None, None)),
)


class MoE(nn.Module):
    """sum over a token's k likeliest experts of weight * MLP_e(x), the weights being their router probabilities over their sum
    (Jiang et al. 2024, section 2.1).

    With `expert_capacity` c every row has C = ceil(c k T / E) slots an expert, and a token that finds none is not changed
    by that expert: a choice before a later token's, first choices before second ones (Lepikhin et al. 2021, algorithm 1).
    Without it no token is dropped.

    Padding is a token like others: it is counted in the losses of the router, and takes slots.
    """

    spec: BlockSpec
    layers: int
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) to the same. Says `loss` and what it is made of to whoever collects `auxiliary`."""
        spec, width = self.spec, x.shape[-1]
        router = nn.Dense(
            spec.experts, use_bias=False, kernel_init=nn.initializers.normal(spec.init_std), name="router"
        )
        # A router in bfloat16 makes training unstable (Fedus et al. 2022, section 2.4).
        # The router's kernel has a gradient of rows where they are; elsewhere they come together.
        logits = router(constrain(x, ("batch", "length", "embed")).astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, spec.experts_per_token)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        kernels = Experts(spec, self.layers, name="experts")(width)
        if spec.expert_capacity is None:
            out, dropped = _everywhere(x, weights, chosen, kernels, spec), jnp.float32(0)
        else:
            out, dropped = _in_slots(x, weights, chosen, kernels, spec)
        share = jnp.mean(jax.nn.one_hot(chosen, spec.experts, dtype=jnp.float32), axis=(0, 1, 2))
        # Of Fedus et al. 2022, equation 4, with each of a token's choices counted 1 / k: 1 where all are used alike.
        balance = spec.experts * jnp.sum(jax.lax.stop_gradient(share) * jnp.mean(probabilities, axis=(0, 1)))
        z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)  # Zoph et al. 2022, equation 5
        auxiliary(
            self,
            loss=spec.router_balance * balance + spec.router_z * z,
            router_balance=balance,
            router_z=z,
            router_busiest=spec.experts * jnp.max(share),
            router_dropped=dropped,
        )
        return out


class Experts(nn.Module):
    """The kernels of all experts: `up` and `gate` (E, D, F), `down` (E, F, D)."""

    spec: BlockSpec
    layers: int

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        spec = self.spec
        into, out = (width, spec.hidden), (spec.hidden, width)
        shapes = {"up": into, **({"gate": into} if spec.mlp == "gated" else {}), "down": out}
        kernels = {
            name: Kernel(
                (spec.experts, *shape),
                spec.std("residual" if name == "down" else "other", *shape, self.layers),
                name=name,
            )()
            for name, shape in shapes.items()
        }
        return {name: kernel.astype(spec.compute_dtype) for name, kernel in kernels.items()}


class Kernel(nn.Module):
    """A parameter `kernel`, under a name of its own."""

    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        found: jax.Array = self.param("kernel", nn.initializers.normal(self.std), self.shape, jnp.float32)
        return found


def _into(kernels: dict[str, jax.Array]) -> list[str]:
    """The kernels of `_hidden`'s operands, in their order and not in the dictionary's, which JAX sorts."""
    return [name for name in ("up", "gate") if name in kernels]


def _hidden(spec: BlockSpec, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    activation = ACTIVATIONS[spec.activation]
    return activation(up) if gate is None else activation(gate) * up


def _in_slots(
    x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: dict[str, jax.Array], spec: BlockSpec
) -> tuple[jax.Array, jax.Array]:
    """(B, T, D) by slots, and the share of choices that found none."""
    batch, length, count = chosen.shape
    assert spec.expert_capacity is not None
    slots = min(length, math.ceil(spec.expert_capacity * count * length / spec.experts))
    # First choices of all tokens stand before second ones.
    order = jax.nn.one_hot(
        restored(chosen).swapaxes(1, 2).reshape(batch, count * length), spec.experts, dtype=jnp.int32
    )
    place = jnp.sum((jnp.cumsum(order, axis=1) - 1) * order, axis=-1).reshape(batch, count, length).swapaxes(1, 2)
    place = balanced(place)
    kept = place < slots
    # (B, T, E, C): how much of a slot's output a token takes.
    taken = jnp.einsum(
        "btke,btkc->btec",
        jax.nn.one_hot(chosen, spec.experts, dtype=x.dtype) * (weights * kept).astype(x.dtype)[..., None],
        jax.nn.one_hot(jnp.where(kept, place, slots), slots, dtype=x.dtype),
    )
    # Rows first come together over `expert` alone, and part so again: at once, the partitioner has every device see all rows.
    rows = ("group", "length", "embed")
    x = constrain(x, rows)
    given = constrain(jnp.einsum("btec,btd->ebcd", (taken > 0).astype(x.dtype), x), ("expert", "group", "slot", None))
    up, *gate = (
        checkpoint_name(jnp.einsum("ebcd,edf->ebcf", given, kernels[name]), f"experts/{name}")
        for name in _into(kernels)
    )
    hidden = constrain(_hidden(spec, up, *gate), ("expert", "group", "slot", "mlp"))
    made = constrain(jnp.einsum("ebcf,efd->ebcd", hidden, kernels["down"]), ("expert", "group", "slot", None))
    out = constrain(jnp.einsum("btec,ebcd->btd", taken, made), rows)
    out = constrain(out, ("batch", "length", "embed"))
    return out, 1.0 - jnp.mean(kept.astype(jnp.float32))


def _everywhere(
    x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: dict[str, jax.Array], spec: BlockSpec
) -> jax.Array:
    """(B, T, D) without dropping: tokens sorted by expert, one ragged product for all; on each device its own rows."""
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(_sorted, spec=spec, count=chosen.shape[-1])
    if mesh.empty or mesh.size == 1:
        return run(x, weights, chosen, kernels)
    rows = spec_of(("batch", "length", None), x.shape)
    split = "tensor" if spec.hidden % mesh.shape["tensor"] == 0 else None
    places = {name: P(None, split) if name == "down" else P(None, None, split) for name in kernels}

    def local(x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: dict[str, jax.Array]) -> jax.Array:
        out = run(x, weights, chosen, kernels)
        return out if split is None else jax.lax.psum(out, split)

    out: jax.Array = on_parts(local, (rows, rows, rows, places), rows)(x, weights, chosen, kernels)
    return out


def _sorted(
    x: jax.Array, weights: jax.Array, chosen: jax.Array, kernels: dict[str, jax.Array], *, spec: BlockSpec, count: int
) -> jax.Array:
    tokens, width = x.shape[0] * x.shape[1], x.shape[-1]
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=spec.experts).astype(jnp.int32)
    given = jnp.take(x.reshape(tokens, width), order // count, axis=0)
    up, *gate = (
        checkpoint_name(jax.lax.ragged_dot(given, kernels[name], sizes), f"experts/{name}") for name in _into(kernels)
    )
    made = jax.lax.ragged_dot(_hidden(spec, up, *gate), kernels["down"], sizes)
    made = made * jnp.take(weights.reshape(-1), order)[:, None].astype(made.dtype)
    return jnp.zeros((tokens, width), made.dtype).at[order // count].add(made).reshape(x.shape)

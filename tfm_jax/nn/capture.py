"""What modules say of themselves besides their output, where somebody listens; otherwise it is not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tfm_jax.paths import flatten

SAID = "intermediates"
# What attention looks at: `weights` (B, H, T, S), which nobody needs in training.
LOOKED = "attention_weights"
# Numbers that a module adds to the training loss, or to its metrics.
AUXILIARY = "auxiliary"


def say(module: Any, name: str, value: jax.Array | Callable[[], jax.Array], collection: str = SAID) -> None:
    """Put a value under the module's own path and this name, if the collection is mutable.

    What a module says each time that it is called, one that all layers share, gets an axis in front.
    """
    # All collections are mutable where parameters are made, of which this is none.
    if module.is_mutable_collection(collection) and not module.is_initializing():
        found = value() if callable(value) else value
        module.sow(collection, name, found, reduce_fn=_and_then, init_fn=lambda: None)


def _and_then(old: Any, new: jax.Array) -> jax.Array:
    if old is None:
        return new
    before = old if old.ndim > new.ndim else old[None]
    return jnp.concatenate([before, new[None]])


def auxiliary(module: Any, **numbers: jax.Array) -> None:
    """Say numbers () float32, of which `loss` is to be added to the training loss, where the collection `auxiliary` is mutable."""
    if module.is_mutable_collection(AUXILIARY) and not module.is_initializing():
        for name, value in numbers.items():
            module.sow(AUXILIARY, name, value, reduce_fn=_and_then, init_fn=lambda: None)


def collected(said: Any) -> dict[str, jax.Array]:
    """The numbers of all modules by name, each the mean over those that said it; layers that are scanned, or share a module,
    count one by one."""
    found: dict[str, list[jax.Array]] = {}
    for path, x in flatten(said).items():
        found.setdefault(path.rpartition("/")[2], []).append(x.reshape(-1))
    return {name: jnp.mean(jnp.concatenate(values)) for name, values in found.items()}

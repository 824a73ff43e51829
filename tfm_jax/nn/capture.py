"""What modules say of themselves besides their output, where somebody listens; otherwise it is not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

SAID = "intermediates"


def say(module: Any, name: str, value: jax.Array | Callable[[], jax.Array]) -> None:
    """Put a value under the module's own path and this name, if the collection `intermediates` is mutable."""
    if module.is_mutable_collection(SAID):
        found = value() if callable(value) else value
        module.sow(SAID, name, found, reduce_fn=lambda _, new: new, init_fn=lambda: None)

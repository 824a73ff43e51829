"""Names of the leaves of a pytree, and patterns over them.

One helper serves sharding rules, weight decay, freezing, learning-rate multipliers and renaming, so that a
parameter has the same name everywhere: `stack/block_0/attention/query/kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from tfm_jax.errors import UserError, closest


def path_str(path: tuple[Any, ...]) -> str:
    """`a/b/0/c` for a key path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """`{path: leaf}` in the tree's own order."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`jax.tree.map` whose function also gets the leaf's path."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_str(path), leaf), tree)


def compile_patterns(patterns: Sequence[str], *, setting: str) -> list[re.Pattern[str]]:
    """Compile regular expressions; a malformed one is an error that names the setting it came from."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from None
    return compiled


def nearest_path(pattern: str, paths: Iterable[str]) -> str:
    """A sentence that points from a pattern that matches no path to the nearest piece of one, or shows one path of each kind."""
    pieces, known = pattern.strip("^$/").split("/"), [*paths]
    split = {tuple(path.split("/")) for path in known}
    runs = {"/".join(path[i : i + len(pieces)]) for path in split for i in range(len(path) - len(pieces) + 1)}
    kinds = [*{re.sub(r"\d+", "0", path): path for path in sorted(known, reverse=True)}.values()][::-1]
    more = f" and {len(kinds) - 12} kinds more" if len(kinds) > 12 else ""
    return closest("/".join(pieces), sorted(runs)) or f" There are: {', '.join(kinds[:12])}{more}."


def values_by_pattern(tree: Any, rules: Sequence[tuple[str, Any]], default: Any, *, setting: str) -> Any:
    """A tree like `tree` whose leaves are the value of the first rule that matches the leaf's path, else `default`.

    Raises `UserError` for a pattern that matches no leaf: it is a typing mistake more often than a wish.
    """
    patterns = compile_patterns([pattern for pattern, _ in rules], setting=setting)
    names = list(flatten(tree))
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise UserError(
                f"{setting}: the pattern {pattern.pattern!r} matches no parameter.{nearest_path(pattern.pattern, names)}"
            )

    def pick(path: str, _: Any) -> Any:
        for pattern, (_, value) in zip(patterns, rules, strict=True):
            if pattern.search(path):
                return value
        return default

    return map_with_path(pick, tree)

"""Names of leaves, and patterns over them."""

import re
from typing import NamedTuple

import jax.numpy as jnp
import pytest

from tfm_jax import paths
from tfm_jax.errors import UserError


class Pair(NamedTuple):
    left: object
    right: object


TREE = {"a": {"kernel": jnp.zeros(2), "bias": jnp.ones(3)}, "b": [Pair(1, 2), (3,)]}


def test_names_are_the_same_for_every_kind_of_node():
    assert list(paths.flatten(TREE)) == ["a/bias", "a/kernel", "b/0/left", "b/0/right", "b/1/0"]
    assert paths.flatten(TREE)["b/0/right"] == 2


def test_map_with_path_keeps_the_structure():
    assert paths.map_with_path(lambda path, _: path, TREE)["b"] == [Pair("b/0/left", "b/0/right"), ("b/1/0",)]


def test_the_first_rule_that_matches_wins():
    found = paths.values_by_pattern(TREE, [("kernel$", 1), ("^a/", 2)], 0, setting="s")
    assert paths.flatten(found) == {"a/bias": 2, "a/kernel": 1, "b/0/left": 0, "b/0/right": 0, "b/1/0": 0}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a/kernle", "optim.freeze: the pattern 'a/kernle' matches no parameter. Did you mean 'a/kernel'?"),
        (
            "zzz",
            "optim.freeze: the pattern 'zzz' matches no parameter. There are: a/bias, a/kernel, b/0/left, b/0/right, b/1/0.",
        ),
        ("lefft/", "optim.freeze: the pattern 'lefft/' matches no parameter. Did you mean 'left'?"),
        ("(", "optim.freeze: '(' is not a regular expression: missing ), unterminated subpattern at position 0."),
    ],
)
def test_errors(pattern, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        paths.values_by_pattern(TREE, [(pattern, True)], False, setting="optim.freeze")

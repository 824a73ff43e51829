"""Combinators against what they should list, names, and errors."""

import math

import numpy as np
import pytest

from tests.errors import says
from tfm_jax.sweep.space import chain, choice, grid, log_uniform, named, product, sample, seeds, uniform, zipped


def test_combinators():
    a, b = grid({"x": [1, 2], "y": ["p", "q"]}), zipped({"u": [1, 2], "v": [3, 4]})
    assert a == [{"x": 1, "y": "p"}, {"x": 1, "y": "q"}, {"x": 2, "y": "p"}, {"x": 2, "y": "q"}]
    assert b == [{"u": 1, "v": 3}, {"u": 2, "v": 4}]
    assert product(a, b)[:2] == [{"x": 1, "y": "p", "u": 1, "v": 3}, {"x": 1, "y": "p", "u": 2, "v": 4}]
    assert len(product(a, b)) == 8 and chain(a, b) == a + b
    assert seeds(2) == [{"train.seed": 0, "data.seed": 0}, {"train.seed": 1, "data.seed": 1}]


def test_samples_fill_their_ranges():
    """Evenly, by logarithm where it was asked for; whole numbers and choices equally often; the same for a seed."""
    space = {"a": uniform(0.0, 2.0), "b": log_uniform(1e-4, 1e-2), "c": uniform(1, 3), "d": choice("p", "q")}
    found = sample(space, 4000, seed=1)
    assert found == sample(space, 4000, seed=1) != sample(space, 4000, seed=2)
    for key, share in (("a", lambda x: x < 1), ("b", lambda x: x < 1e-3), ("d", lambda x: x == "p")):
        assert np.mean([share(one[key]) for one in found]) == pytest.approx(0.5, abs=0.03)
    assert all(0 <= one["a"] < 2 and 1e-4 <= one["b"] < 1e-2 for one in found)
    counts = [sum(one["c"] == n for one in found) for n in (1, 2, 3)]
    assert sum(counts) == 4000 and all(abs(n - 4000 / 3) < 150 for n in counts)
    assert log_uniform(1e-4, 1e-2).at(0.5) == pytest.approx(1e-3) and math.isclose(uniform(0.0, 2.0).at(0.25), 0.5)


def test_names():
    """From what differs, as short as it is clear."""
    both = named(product(grid({"optim.lr": [0.001, 1 / 3], "model.width": [64]}), seeds(1)))
    assert [trial.name for trial in both] == ["lr=0.001", "lr=0.333333"]
    seeded = named(product(grid({"model.name": ["a.b:C", "gpt"]}), seeds(2)))
    assert seeded[0].name == "name=a.b_C,seed=0" and len(seeded) == 4
    apart = named(grid({"train.seed": [0, 1], "data.seed": [0, 1]}))
    assert apart[1].name == "train.seed=0,data.seed=1"
    assert named([{"optim.lr": 1.0}])[0].name == "only"
    assert [t.name for t in named(chain(grid({"a.x": [1]}), grid({"b.y": [2]})))] == ["x=1", "y=2"]


def test_names_of_what_is_drawn():
    """A place that is drawn again is one trial, and values that are close have names with as many digits as tell them apart."""
    few = sample({"x": uniform(1, 4), "y": choice("p", "q")}, 100)
    assert len(few) == 8 == len(named(few)) and few[:3] == sample({"x": uniform(1, 4), "y": choice("p", "q")}, 3)
    assert len(named(sample({"optim.lr": log_uniform(1e-4, 1e-2)}, 3000))) == 3000
    close = grid({"optim.lr": [0.1, 0.12345678, 0.12345679, 1 / 3]})
    assert [t.name for t in named(close)] == ["lr=0.1", "lr=0.12345678", "lr=0.12345679", "lr=0.333333"]
    with says("sweep: the spaces overlap: x=1 is there twice."):
        named(grid({"x": [1, 1.0]}))


def test_long_names(tmp_path):
    """Shortened to what a file system takes, those of 255 bytes as they are; each stays another."""
    long = named(grid({"x": ["a" * 253, "a" * 254, "a" * 253 + "b", "a" + "\u00e4" * 200]}))
    for trial in long:
        (tmp_path / trial.name).mkdir()
    assert long[0].name == f"x={'a' * 253}" and [len(t.name.encode()) for t in long] == [255, 255, 255, 254]
    assert all(one.name.startswith("x=aaa") and one.name[-9] == "_" for one in long[1:3])


def test_bad_spaces():
    with says("sweep: grid({}) has no keys: the space is empty."):
        grid({})
    with says("sweep: the space is empty."):
        named([])
    with says("sweep: product() of spaces that overlap: x is in both."):
        product(grid({"x": [1]}), grid({"x": [2], "y": [1]}))
    with says("sweep: the spaces overlap: x=1 is there twice."):
        named(chain(grid({"x": [1, 2]}), grid({"x": [1]})))
    with says("sweep: x has no values to try: []. Give a list."):
        grid({"x": []})
    with says("sweep: zipped() needs as many values of each key; there are: x 2, y 1."):
        zipped({"x": [1, 2], "y": [1]})
    with says("sweep: nothing lies between 0.0 and 1.0 by logarithm."):
        log_uniform(0.0, 1.0)
    with says("sweep: x=3 is no distribution; there are uniform, log_uniform and choice."):
        sample({"x": 3}, 2)
    with says("sweep: seeds(0) is none."):
        seeds(0)

import pytest

from tfm_jax.units import counted, short


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "3"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (6_738_415_616, "6.74 B"), (1.5e12, "1.5 T")],
)
def test_short(value, said):
    assert short(value) == said


def test_one_is_not_many():
    assert [counted(n, "run") for n in (0, 1, 2, 1234)] == ["0 runs", "1 run", "2 runs", "1,234 runs"]

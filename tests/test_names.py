"""From names to code, and what is said when there is none."""

import re
import sys

import pytest

from tfm_jax import names
from tfm_jax.errors import UserError, nearest
from tfm_jax.models.gpt import Model
from tfm_jax.train import schedules


def resolve(name):
    return names.resolve(name, package="tfm_jax.models", attribute="Model", setting="model.name")


def test_short_names_and_paths():
    assert resolve("gpt") is Model
    assert resolve("tfm_jax.models.gpt:Model") is Model
    assert resolve("tfm_jax.train.schedules:make") is schedules.make


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gptt", "model.name='gptt' does not exist. Did you mean 'gpt'?"),
        ("gpt.Model", "model.name='gpt.Model': write a dotted path as 'module.path:Model'."),
        (
            "my_lab_x.nets:Foo",
            "model.name='my_lab_x.nets:Foo': there is no module 'my_lab_x' on the Python path"
            " (install your package, or add its folder to PYTHONPATH).",
        ),
        (
            "tfm_jax.models.gpt:Modle",
            "model.name='tfm_jax.models.gpt:Modle': tfm_jax.models.gpt has no 'Modle'. Did you mean 'Model'?",
        ),
    ],
)
def test_errors(name, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        resolve(name)


def test_a_module_that_fails_to_import_something_else_says_that(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        resolve("broken_net:Foo")


def test_importing_is_lazy(tmp_path, monkeypatch):
    (tmp_path / "lazy_net.py").write_text("Foo = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "lazy_net" not in sys.modules
    assert resolve("lazy_net:Foo") == 3


def test_nearest():
    assert nearest("widht", ["width", "heads"]) == " Did you mean 'width'?"
    assert nearest("zzz", ["width", "heads"]) == " Valid: heads, width."
    assert nearest("x", []) == ""

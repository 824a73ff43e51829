"""From a name in a config to the code it stands for.

`gpt` is sugar for `tfm_jax.models.gpt:Model`; `my_lab.nets:Foo` means itself. There is no registry: a new family, task
or data set is a new file, in this repository or outside it.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from tfm_jax.errors import UserError, nearest


def resolve(name: str, *, package: str, attribute: str, setting: str) -> Any:
    """The object that `name` stands for.

    Args:
      name: `x` for `package.x:attribute`, or `module.path:Attribute`.
      setting: the config key, for the error.

    Raises:
      UserError: there is no such module or attribute, with the nearest that there is.
    """
    module_name, _, attr = name.partition(":")
    if not attr:
        if "." in name:
            raise UserError(f"{setting}={name!r}: write a dotted path as 'module.path:{attribute}'.")
        module_name, attr = f"{package}.{name}", attribute
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but fails to import something else is the other module's problem: say that one.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        if ":" in name:
            raise UserError(
                f"{setting}={name!r}: there is no module {error.name!r} on the Python path"
                " (install your package, or add its folder to PYTHONPATH)."
            ) from None
        names = [m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__)]
        raise UserError(f"{setting}={name!r} does not exist.{nearest(name, names)}") from None
    if not hasattr(module, attr):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{setting}={name!r}: {module_name} has no {attr!r}.{nearest(attr, public)}")
    return getattr(module, attr)

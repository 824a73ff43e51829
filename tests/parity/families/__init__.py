"""All reference models, by name."""

import importlib
import pkgutil

from ..case import Case

CASES: dict[str, Case] = {}
for _module in pkgutil.iter_modules(__path__):
    CASES |= importlib.import_module(f"{__name__}.{_module.name}").CASES

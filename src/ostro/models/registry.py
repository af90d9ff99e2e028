"""Which model classes Ostro adds to transformers' own, by architecture name.

A module of `ostro.models` announces its classes in a list (or a single class) named `ModelClass`; nothing else needs
to be edited to add one. What a class is for is left to its own module.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _ModelRegistry:
    """The announced classes of one package."""

    def __init__(self, package: str) -> None:
        self._package = package

    @functools.cached_property
    def model_arch_name_to_cls(self) -> dict[str, type[PreTrainedModel]]:
        """Class by architecture name; the first access imports the package's modules.

        Raises:
            ValueError: When two modules announce different classes of one name.
        """
        classes: dict[str, type[PreTrainedModel]] = {}
        for model_class in _announced(importlib.import_module(self._package)):
            name = model_class.__name__
            if classes.setdefault(name, model_class) is not model_class:
                modules = f"{classes[name].__module__} and {model_class.__module__}"
                raise ValueError(f"ModelClass: {name} is announced by both {modules}; rename one")
        return classes


def _announced(package: ModuleType) -> list[type[PreTrainedModel]]:
    """What the `ModelClass` of every module of `package` lists, in the order of module names."""
    classes: list[type[PreTrainedModel]] = []
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        announced = vars(importlib.import_module(found.name)).get("ModelClass", [])
        classes.extend(announced if isinstance(announced, list) else [announced])
    return classes


ModelRegistry = _ModelRegistry("ostro.models")
"""`ModelRegistry.model_arch_name_to_cls["Ministral3BidirectionalModel"]` is the class."""

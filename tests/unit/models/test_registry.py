"""The registry finds what modules announce, and only when it is first asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ostro.models.ministral_bidirectional import Ministral3BidirectionalModel
from ostro.models.registry import ModelRegistry, _ModelRegistry


def test_the_announced_classes_are_listed_by_architecture_name() -> None:
    classes = ModelRegistry.model_arch_name_to_cls
    assert classes["Ministral3BidirectionalModel"] is Ministral3BidirectionalModel
    assert all(name == model_class.__name__ for name, model_class in classes.items())


def test_importing_the_registry_imports_no_model() -> None:
    code = "import sys, ostro.models.registry; assert 'ostro.models.ministral_bidirectional' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_package(folder: Path, name: str, modules: dict[str, str]) -> str:
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    for module, code in modules.items():
        (package / f"{module}.py").write_text(code)
    return name


def test_a_module_announces_a_list_or_a_single_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    modules = {
        "one": "class One: pass\nModelClass = One",
        "two": "class Two: pass\nclass Three: pass\nModelClass = [Two, Three]",
        "plain": "class Plain: pass",
        "again": "from .one import One\nModelClass = One",
    }
    registry = _ModelRegistry(write_package(tmp_path, "announcing", modules))
    assert sorted(registry.model_arch_name_to_cls) == ["One", "Three", "Two"]


def test_two_classes_of_one_name_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = "class Same: pass\nModelClass = [Same]"
    registry = _ModelRegistry(write_package(tmp_path, "clashing", {"left": code, "right": code}))
    with pytest.raises(ValueError, match=r"Same is announced by both clashing\.left and clashing\.right"):
        _ = registry.model_arch_name_to_cls

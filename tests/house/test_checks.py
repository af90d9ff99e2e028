"""Every house rule catches an offender and passes what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.house import checks

BODY = "    x = 1\n"
Check = Callable[[str], list[str]]

CASES: list[tuple[Check, str, str]] = [
    (checks.long_file, "x = 1\n" * 401, "x = 1\n" * 400),
    (checks.long_functions, "def f():\n" + BODY * 60, 'def f():\n    """A.\n\n    B.\n    """\n' + BODY * 59),
    (checks.long_functions, "class A:\n    async def f(self):\n" + "        x = 1\n" * 60, "def f():\n" + BODY * 59),
    (
        checks.many_parameters,
        "def f(a, b, c, d, e, f, g, *, h, **i): ...",
        "def f(self, a, b, c, d, e, f, *g, **h): ...",
    ),
    (checks.broad_excepts, "try: x\nexcept Exception: y", "try: x\nexcept (KeyError, ValueError): y"),
    (checks.broad_excepts, "try: x\nexcept (KeyError, BaseException): y", "try: x\nexcept OSError: raise"),
    (checks.broad_excepts, "try: x\nexcept: y", "x"),
    (checks.probing, "hasattr(model, 'pooling')", "hasattr(model, name)"),
    (checks.probing, "getattr(model, 'pooling', None)", "getattr(model, name, None)"),
    (checks.missing_docstrings, "x = 1", '"""A."""'),
    (checks.missing_docstrings, '"""A."""\ndef f(): ...', '"""A."""\ndef _f(): ...\nclass _C:\n    def f(self): ...'),
    (
        checks.missing_docstrings,
        '"""A."""\nclass C:\n    """B."""\n    def f(self): ...',
        '"""A."""\nclass C:\n    """B."""\n    def __init__(self): ...',
    ),
    (checks.missing_annotations, "def f(a: int): ...", "def f(a: int) -> int: ..."),
    (checks.missing_annotations, "class C:\n    def __init__(self, a) -> None: ...", "def _f(a): ..."),
    (checks.missing_annotations, "def f(*, a: int, **b) -> int: ...", "class _C:\n    def f(self, a): ..."),
    (checks.leftovers, "x = 1  # TO" + "DO: y", "todo = 'TO" + "DO'"),
    (checks.leftovers, "raise NotImplemented" + "Error", "raise ValueError"),
    (checks.vague_names, "class RunManager: ...", "class Run: ..."),
    (checks.machine_places, "see /wo" + "rk/main", "a/work/b and framework/x and https://example.org/opt/y"),
    (checks.machine_places, "'/ho" + "me/ada/data'", "${HOME}/data"),
    (checks.machine_places, "pip install -i https://py" + "pi.org/simple", "pip install torch"),
    (checks.machine_places, "--extra-index" + "-url https://x.y", "--extra-index-url THE_CUDA_INDEX"),
]


@pytest.mark.parametrize(("check", "bad", "good"), CASES)
def test_a_check_complains_of_the_bad_and_passes_the_good(check: Check, bad: str, good: str) -> None:
    assert len(check(bad)) == 1
    assert check(good) == []


def test_imports_are_found_wherever_they_stand() -> None:
    text = (
        "import a.b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import shown\n"
        "def f():\n    from c.d import e\n"
    )
    assert checks.imported_modules(text) == {"a.b", "typing", "typing.TYPE_CHECKING", "shown", "c.d", "c.d.e"}


def test_lines_of_code_are_those_with_code() -> None:
    text = '"""A.\n\nB.\n"""\n\n# why\nx = (\n    1,\n\n    # two\n    2,\n)\n'
    text += '\n\ndef f():\n    """A."""\n    return """\n\n"""\n'
    assert checks.code_lines(text) == 4 + 1 + 3

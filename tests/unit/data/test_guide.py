"""The files, recipe and code of the guide on data work as written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ostro.data.evaluation_set import open_evaluation
from ostro.data.options import DataOptions
from ostro.data.retrieval import open_sources
from ostro.models.tokenizer import TextTokenizer
from tests.helpers.guides import blocks, code_of

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "data.md"


def test_the_guide_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: TextTokenizer
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {block.name: block.text for block in blocks(GUIDE) if block.language in ("json", "jsonl", "tsv")}
    assert set(files) == {
        "beir/corpus.jsonl",
        "beir/queries.jsonl",
        "beir/qrels/train.tsv",
        "ids/train.json",
        "inline.jsonl",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")

    (recipe,) = code_of(GUIDE, "yaml")
    sources = open_sources(DataOptions.model_validate(yaml.safe_load(recipe)["data"]))
    assert [[source[i].query_id for i in range(len(source))][:1] for source in sources[:2]] == [["q1"], ["1"]]
    assert [(source[0].positive_ids, source[0].negative_ids) for source in sources[:2]] == [(("d2",), ("d1",))] * 2
    assert len(open_evaluation("beir", "train").queries) == 1

    (example,) = code_of(GUIDE, "python")
    exec(example, {"tokenizer": tokenizer})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "wind that brings rain from the south ('d2',)"
    assert sorted(printed[1:]) == ["beir 1 1", "inline.jsonl 2 2"]

"""The code of the guide and of the reference page works as written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ostro.retrieval.options import EvaluateOptions
from tests.helpers.exported import bidirectional, small_tokenizer
from tests.helpers.guides import code_of
from tests.unit.retrieval.sets import evaluation_set

DOCS = Path(__file__).parents[3] / "docs"


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    texts = ["A cold wind of the north-west.", "A warm wind of the south."]
    evaluation_set(tmp_path / "my-corpus", texts, ["wind from the south"], {0: {1: 2}})
    bidirectional().save_pretrained("weights")
    small_tokenizer(tmp_path / "tokenizer").save(tmp_path / "weights")
    (example,) = code_of(DOCS / "guides" / "evaluate.md", "python")
    names: dict[str, Any] = {}
    exec(example, names)
    assert capsys.readouterr().out.splitlines()[-1].endswith(" BM25: 1.0")
    row = json.loads(Path("evaluation/per_query.jsonl").read_text(encoding="utf-8"))
    assert row["relevant"]["d1"] in (1, 2)
    assert json.loads(Path("evaluation/metrics.json").read_text(encoding="utf-8"))["num_documents"] == 2


def test_the_recipe_of_the_guide_is_valid() -> None:
    (text,) = code_of(DOCS / "guides" / "evaluate.md", "yaml")
    options = {key: EvaluateOptions.model_validate(block) for key, block in yaml.safe_load(text).items()}
    assert (options["evaluate"].max_queries, options["test"].ks) == (500, (10, 100))


def test_the_reference_works_and_lists_every_option() -> None:
    page = DOCS / "reference" / "retrieval.md"
    (example,) = code_of(page, "python")
    exec(example, {})
    listed = [line.split("`")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert listed == list(EvaluateOptions.model_fields)

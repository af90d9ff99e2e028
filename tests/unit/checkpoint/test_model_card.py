"""The model card says what is true, and its examples and the guide's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import (
    PreTrainedModel,
)

from ostro.models.tokenizer import TextTokenizer
from tests.helpers.exported import export, reference, settings
from tests.helpers.guides import code_of


def test_card_header_and_tables(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "sentence-transformers"
    assert header["base_model"] == "mistralai/Ministral-3-3B-Base-2512"
    assert header["datasets"] == ["BeIR/fiqa"]
    assert {"sentence-transformers", "ostro", "ministral3"} <= set(header["tags"])
    assert "| nDCG@10 | 0.6235 |" in text
    assert "120 optimizer steps on `BeIR/fiqa`, `data`." in text
    assert "secret" not in text
    assert '`"query: "`' in text
    assert code_of(folder / "README.md", "yaml")[0] == "loss:\n  temperature: 0.05\n  symmetric: true\n"


@pytest.mark.parametrize("pooling", ["avg", "weighted_avg", "cls", "last"])
def test_card_examples_run(
    pooling: str,
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = settings(pooling=pooling)
    export(model, tokenizer, tmp_path / "embedder", settings=used)
    monkeypatch.chdir(tmp_path)
    expected = reference(model, tokenizer, ["query: what is searched for"], used)
    page = tmp_path / "embedder" / "README.md"
    assert len(code_of(page, "bash")) == (pooling != "weighted_avg")
    with_ostro, with_sentence_transformers, with_transformers = code_of(page, "python")
    for code in (with_ostro, with_sentence_transformers):
        names: dict[str, Any] = {}
        exec(code, names)
        assert F.cosine_similarity(torch.as_tensor(names["queries"]), expected).item() >= 0.99999
    # Two texts, so that there is padding.
    code = with_transformers.replace("texts = [", 'texts = ["a much longer text than the other one", ')
    names = {}
    exec(code, names)
    torch.testing.assert_close(names["embeddings"][1:], expected, atol=1e-5, rtol=1e-5)


def test_the_guide_runs(
    model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "weights")
    tokenizer.save(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in code_of(Path(__file__).parents[3] / "docs" / "guides" / "export.md", "python"):
        exec(example, names)
    assert (tmp_path / "exported" / "README.md").is_file()
    assert names["scores"].shape == (1, 2)

"""The files, recipe and code of the guide on conversations work as written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ostro.data.conversation import open_conversations
from ostro.data.conversation_options import ConversationDataOptions
from tests.helpers.guides import blocks, code_of
from tests.unit.data.conversation_files import picture, write_tekken

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "conversations.md"


def test_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    files = {block.name: block.text for block in blocks(GUIDE) if block.language in ("json", "jsonl")}
    assert set(files) == {"messages.jsonl", "llava.json"}
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("images").mkdir()
    picture(112, 56).save("images/bag.png")

    (recipe,) = code_of(GUIDE, "yaml")
    sources = open_conversations(ConversationDataOptions.model_validate(yaml.safe_load(recipe)["data"]).train)
    assert [[len(conversation.messages) for conversation in source] for source in sources] == [[2, 3], [4]]

    (example,) = code_of(GUIDE, "python")
    exec(example, {"folder": write_tekken(tmp_path / "weights", "v13")})
    assert capsys.readouterr().out.splitlines() == [
        "A red bag. name",
        "What is this?",
        "3 torch.Size([2, 3, 56, 112]) [[56, 112], [56, 112]]",
        "2 1",
    ]

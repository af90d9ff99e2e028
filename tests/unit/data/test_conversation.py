"""Rows of every form become the same messages; what is wrong with a row is said with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from ostro.data.conversation import (
    Conversation,
    ConversationSource,
    ImagePart,
    TextPart,
    open_conversation_source,
    read_conversation,
)
from ostro.data.conversation_options import ConversationSourceOptions
from ostro.data.images import ImageSource
from ostro.errors import DataError
from tests.unit.data.conversation_files import base64_of, picture, png, write_conversations
from tests.unit.data.files import write_jsonl

WHERE = "a.jsonl:2"
PNG = png(picture(20, 20))
ANSWER = {"role": "assistant", "content": "yes"}


def _open(path: Path | str, **settings: Any) -> ConversationSource:
    texts = {name: str(value) for name, value in {"path": path, **settings}.items()}
    options = ConversationSourceOptions.model_validate(texts)
    return open_conversation_source(options, "data.train.0")


def _read(row: Any, **settings: Any) -> Conversation:
    return read_conversation(row, WHERE, image_folder=Path("folder"), **settings)


def _ask(*parts: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **columns}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _parts(conversation: Conversation, index: int = 0) -> list[Any]:
    """Texts, and the content of images."""
    parts = conversation.messages[index].parts
    return [part.text if isinstance(part, TextPart) else part.image.content for part in parts]


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ({"type": "image", "image": "a/b.png"}, Path("folder/a/b.png")),
        ({"type": "image", "path": "b.png"}, Path("folder/b.png")),
        ({"type": "image", "image": "/abs/b.png"}, Path("/abs/b.png")),
        ({"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}}, Path("folder/b.png")),
        ({"type": "image_url", "image_url": "file:///abs/b.png"}, Path("/abs/b.png")),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_of(PNG)}"}}, PNG),
        ({"type": "image", "image": base64_of(PNG)}, PNG),
        ({"type": "image", "base64": base64_of(PNG)}, PNG),
        ({"type": "image", "image": PNG}, PNG),
        ({"type": "image", "image": {"bytes": PNG, "path": "b.png"}}, PNG),
        ({"type": "image", "image": {"bytes": None, "path": "b.png"}}, Path("folder/b.png")),
        ({"type": "image", "image": picture(4, 4)}, picture(4, 4)),
        # as Arrow fills up what other rows have
        ({"type": "image", "image": "b.png", "text": None, "image_url": None}, Path("folder/b.png")),
    ],
)
def test_an_image_may_be_held_in_many_ways(part: dict[str, Any], content: Any) -> None:
    conversation = _read(_ask(_text("Look: "), part, _text("what?"), kind="name"))
    assert _parts(conversation) == ["Look: ", content, "what?"]
    assert conversation.messages[0].images == (ImageSource(content, WHERE),)
    assert conversation.messages[1].parts == (TextPart("yes"),)
    assert (conversation.kind, conversation.where) == ("name", WHERE)


def test_messages_of_plain_text_and_system_turns() -> None:
    row = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "an <image> tag"}, ANSWER]
    }
    conversation = _read(row)
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]
    assert [message.text for message in conversation.messages] == ["Be brief.", "an <image> tag", "yes"]


def test_sharegpt_placeholders_take_the_images_in_order() -> None:
    row = {
        "id": "7",
        "images": ["a.png", "b.png", "c.png"],
        "conversations": [
            {"from": "system", "value": "You see."},
            {"from": "human", "value": "<image>\n<image>\nCompare them."},
            {"from": "gpt", "value": "Same."},
            {"from": "human", "value": "And <image> here?"},
            {"from": "gpt", "value": "Other."},
        ],
    }
    conversation = _read(row)
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert _parts(conversation, 1) == [Path("folder/a.png"), Path("folder/b.png"), "Compare them."]
    assert _parts(conversation, 3) == ["And", Path("folder/c.png"), "here?"]


def test_llava_rows_have_one_image_or_none() -> None:
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A bag."}]
    assert _parts(_read({"image": "a.png", "conversations": turns})) == ["What?", Path("folder/a.png")]
    turns[0] = {"from": "human", "value": "What?"}
    assert _parts(_read({"conversations": turns, "image": None})) == ["What?"]


def test_image_parts_without_content_and_placeholders_take_from_the_column() -> None:
    row = _ask({"type": "image"}, _text("and <image>?"), images=["a.png", {"bytes": PNG}])
    assert _parts(_read(row)) == [Path("folder/a.png"), "and", PNG, "?"]


def test_the_reference_is_the_last_assistant_turn() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    prompt, reference = _read(row).split_reference()
    assert ([message.text for message in prompt], reference) == (["a", "b", "c"], "d")
    with pytest.raises(DataError, match=f"^{WHERE}: no assistant turn that answers a user"):
        _read({"messages": [ANSWER]}).split_reference()
    with pytest.raises(DataError, match=f"^{WHERE}: no assistant turn"):
        _read({"messages": [{"role": "user", "content": "a"}]}).split_reference()


BAD_ROWS: list[tuple[Any, str]] = [
    ([], "expected an object, got list"),
    ({"text": "a"}, "expected a column messages or conversations, got \\['text'\\]"),
    ({"messages": [ANSWER], "conversations": []}, "expected a column messages or conversations, one of them"),
    ({"messages": []}, "messages must be a list of at least one message, got \\[\\]"),
    ({"messages": "hi"}, "messages must be a list of at least one message, got 'hi'"),
    ({"messages": ["hi"]}, "messages\\[0\\] must be an object with role and content, got 'hi'"),
    ({"messages": [{"from": "human", "value": "a"}]}, "messages\\[0\\] must be an object with role and content"),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages\\[0\\].role must be one of system, user, .*, got 'tool'",
    ),
    (
        {"messages": [{"role": "user", "content": None}]},
        "messages\\[0\\].content must be text or a list of parts, got None",
    ),
    ({"messages": [{"role": "user", "content": " "}]}, "messages\\[0\\].content is empty; give it text"),
    ({"messages": [{"role": "user", "content": []}]}, "messages\\[0\\].content is empty"),
    (_ask({"type": "audio"}), "messages\\[0\\].content\\[0\\].type must be text, image or image_url, got .*audio"),
    (_ask(3), "content\\[0\\].type must be text, image or image_url, got 3"),
    (_ask({"type": "text", "text": 3}), "content\\[0\\] must be text, got 3"),
    (_ask(_text("ab\ud800")), "character 3 of messages\\[0\\].content\\[0\\] is a lone surrogate; remove it"),
    (_ask({"type": "image"}), "content\\[0\\] has no image; give it one, or the row a column images"),
    (_ask({"type": "image", "image": "a.png", "path": "b.png"}), "content\\[0\\] has both image and path; keep one"),
    (_ask({"type": "image", "image": 3}), "content\\[0\\].image must be a path, base64 or bytes, got 3"),
    (_ask({"type": "image", "image": ""}), "content\\[0\\].image must be a path, base64 or bytes, got ''"),
    (_ask({"type": "image", "image": {"x": 3}}), "content\\[0\\].image must hold url, bytes or path, got \\['x'\\]"),
    (
        _ask({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}),
        "image_url is https://a.b/c.png; Ostro fetches no URLs, download it first",
    ),
    (_ask({"type": "image", "base64": "ä"}), "content\\[0\\].base64 is not base64 .*ASCII"),
    (_ask({"type": "image", "base64": "%%%"}), "content\\[0\\].base64 is not base64"),
    (_ask({"type": "image", "image": "data:image/png;base64,abc"}), "content\\[0\\].image is not base64 .*padding"),
    (
        _ask({"type": "image", "image": "data:image/svg+xml,<svg/>"}),
        "is a data URL of 'data:image/svg.xml', expected one",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
        "content has an image, which only users may show; got role assistant",
    ),
    (_ask(_text("a"), kind=3), "kind must be text, got 3"),
    (_ask(_text("a"), image="a.png", images=["a.png"]), "has both images and image, which mean the same; keep one"),
    (_ask(_text("a"), images=["a.png"]), "0 image placeholders for 1 images; expected as many <image>"),
    (_ask(_text("<image> <image>"), images=["a.png"]), "2 image placeholders for 1 images"),
    ({"conversations": [{"from": "human", "value": "<image> a"}]}, "1 image placeholders for 0 images"),
    ({"conversations": [{"from": "human", "value": "a"}], "image": "a.png"}, "0 image placeholders for 1 images"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_rows_are_refused_with_their_place(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^{WHERE}: .*{message}"):
        _read(row)


def test_a_stated_form_is_kept_to() -> None:
    with pytest.raises(DataError, match=f"^{WHERE}: expected a column conversations, got \\['messages'\\]"):
        _read({"messages": [ANSWER]}, form="sharegpt")


def test_jsonl_images_start_at_the_file(tmp_path: Path) -> None:
    source = _open(write_conversations(tmp_path, [(32, 16), None, (20, 20)]))
    assert (len(source), source.name) == (3, str(tmp_path / "train.jsonl"))
    assert [conversation.kind for conversation in source] == ["image", "text", "image"]
    (image,) = source[2].messages[0].images
    assert image.load().size == (20, 20)
    assert image.where == f"{tmp_path}/train.jsonl:3"


def test_a_folder_of_images_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere" / "images").mkdir(parents=True)
    write_conversations(tmp_path / "elsewhere", [(32, 16)])
    path = (tmp_path / "elsewhere" / "train.jsonl").rename(tmp_path / "data" / "train.jsonl")
    (image,) = _open(path, image_folder=tmp_path / "elsewhere")[0].messages[0].images
    assert image.load().size == (32, 16)


def test_a_json_list_is_read(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "conversations": [{"from": "human", "value": f"<image>{i}"}]} for i in range(2)]
    (tmp_path / "llava.json").write_text(json.dumps(rows), encoding="utf-8")
    source = _open(tmp_path / "llava.json")
    assert [_parts(conversation) for conversation in source] == [[tmp_path / f"{i}.png", str(i)] for i in range(2)]
    assert source[1].where == f"{tmp_path}/llava.json: row 2"


def test_datasets_of_images_are_read_from_parquet_and_from_folders(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [
        {"messages": [{"role": "user", "content": "<image>a"}, ANSWER], "images": [picture(30, 20)]},
        {"messages": [{"role": "user", "content": "b"}, ANSWER], "images": []},
    ]
    table = datasets.Dataset.from_list(rows, features=features)
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    for path in (tmp_path / "hub", tmp_path / "hub" / "train.parquet"):
        source = _open(path)
        assert len(source) == 2
        image, text = source[0].messages[0].parts
        assert isinstance(image, ImagePart)
        assert isinstance(image.image.content, bytes)
        assert image.image.load().tobytes() == picture(30, 20).tobytes()
        assert text == TextPart("a")
        assert source[0].where == f"{path}: row 1"
        assert not source[1].messages[0].images


def test_parts_in_arrow_hold_images_too(tmp_path: Path) -> None:
    content = [{"type": "image", "image": {"bytes": PNG, "path": None}, "text": None}, {**_text("a"), "image": None}]
    rows = [{"messages": [{"role": "user", "content": content}]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (image,) = _open(tmp_path / "a.parquet")[0].messages[0].images
    assert isinstance(image.load(), Image.Image)


def test_paths_that_start_nowhere_are_refused() -> None:
    with pytest.raises(DataError, match=f"^{WHERE}: .*is the path a.png, which starts nowhere; set image_folder"):
        read_conversation(_ask({"type": "image", "image": "a.png"}), WHERE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty; expected one JSON object per line"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", '{"messages": [}\n', ":1: not JSON"),
        ("a.jsonl", "[1]\n", ":1: must be a JSON object, got list"),
        ("a.json", "", ":1: not JSON .*; a file with one object per line must be named .jsonl"),
        ("a.json", "[]", "has no rows; expected a list of objects"),
        ("a.json", "{}", "must be a list of objects, got dict"),
        ("a.json", "[3]", ": row 1: must be a JSON object, got int"),
        ("a.json", "\udcff", "not UTF-8"),
        ("a.parquet", "x", "cannot be read as Parquet"),
    ],
)
def test_bad_files_are_refused_when_they_are_opened(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=f"^{path}:? ?.*{message}"):
        _open(path)


def test_bad_sources_are_refused_by_their_key(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [ANSWER]}])
    cases = [
        ({"path": tmp_path / "gone.jsonl"}, "data.train.0.path: no such file or folder: .*gone.jsonl; give one"),
        ({"path": path, "split": "dev"}, "data.train.0.split: .* is a single file without one; leave split out"),
        ({"path": path, "subset": "x"}, "data.train.0.subset: .* is a single file without one; leave subset out"),
        ({"path": path, "image_folder": tmp_path / "gone"}, "data.train.0.image_folder: no such folder: .*gone"),
        ({"path": "owner/there-is-none"}, "owner/there-is-none: split 'train' cannot be loaded by datasets"),
    ]
    for settings, message in cases:
        with pytest.raises(DataError, match=f"^{message}"):
            _open(**settings)

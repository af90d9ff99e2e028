"""Ids are those of mistral_common's chat template, and labels cover what assistants say and nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ostro.data import conversation_tokens
from ostro.data.conversation import Conversation, ImagePart, Message, Role, TextPart
from ostro.data.conversation_tokens import NOTHING, ConversationEncoder, EncodedConversation
from ostro.data.images import ImageSource, ImageTokens
from ostro.errors import DataError, LayoutError
from tests.unit.data.conversation_files import IMAGE_TOKENS, picture, write_tekken

BOS, EOS, BEGIN_INST, END_INST, IMG, IMG_BREAK, IMG_END = 1, 2, 3, 4, 10, 12, 13
WHERE = "a.jsonl:5"

Turn = tuple[Role, str | list[Any]]
A, B, C = picture(32, 16, seed=1), picture(16, 48, seed=2), picture(300, 100, seed=3)

CONVERSATIONS: dict[str, list[Turn]] = {
    "plain": [("user", "Which bag?"), ("assistant", "A red one.")],
    "answer stands in the question": [("user", "Say A red one."), ("assistant", "A red one.")],
    "image first": [("user", [A, "Which bag?"]), ("assistant", "A red one.")],
    "image last": [("user", ["Which bag?", A]), ("assistant", "A red one.")],
    "several images": [("user", ["Compare", A, "with", B, "and", C, "."]), ("assistant", "Same.")],
    "texts side by side": [("user", ["one", "two", A]), ("assistant", "x")],
    "system": [("system", "Be brief."), ("user", [A, "Why?"]), ("assistant", "Because. ")],
    "turns": [
        ("system", "You see."),
        ("user", [A, "First?"]),
        ("assistant", "one"),
        ("user", "Second?"),
        ("assistant", "two </s> [INST]"),
        ("user", ["Third?", B]),
        ("assistant", "drei ü"),
    ],
    "one speaker twice": [("user", "a"), ("user", [A, "b"]), ("assistant", "c"), ("assistant", "d")],
}


def _messages(turns: list[Turn]) -> tuple[Message, ...]:
    def part(item: Any) -> Any:
        return TextPart(item) if isinstance(item, str) else ImagePart(ImageSource(item, WHERE))

    return tuple(
        Message(role, tuple(map(part, [content] if isinstance(content, str) else content))) for role, content in turns
    )


def _conversation(turns: list[Turn]) -> Conversation:
    return Conversation(_messages(turns), "kind", WHERE)


@pytest.fixture(scope="module", params=["v3", "v7", "v11", "v13"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("tekken"), request.param)


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ConversationEncoder:
    return ConversationEncoder(folder, IMAGE_TOKENS, max_tokens=2000)


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tekken(tmp_path_factory.mktemp("tekken"), "v13")


def _reference(folder: Path, turns: list[Turn], monkeypatch: pytest.MonkeyPatch, *, prompt: bool = False) -> list[int]:
    """Ids of the library's own front door; only the pixels, which need OpenCV, are left out."""
    monkeypatch.setattr("mistral_common.tokens.tokenizers.image.transform_image", lambda image, size: np.zeros(1))
    mode = ValidationMode.test if prompt else ValidationMode.finetuning
    tokenizer = MistralTokenizer.from_file(folder / "tekken.json", mode=mode)
    special = SpecialImageIDs(img=IMG, img_break=IMG_BREAK, img_end=IMG_END)
    tokenizer.instruct_tokenizer.image_encoder = ImageEncoder(ImageConfig(8, 64, 2), special)
    messages: list[Any] = []
    for role, content in turns:
        if role == "user":
            items = [content] if isinstance(content, str) else content
            chunks = [TextChunk(text=item) if isinstance(item, str) else ImageChunk(image=item) for item in items]
            messages.append(UserMessage(content=chunks))
        else:
            messages.append({"assistant": AssistantMessage, "system": SystemMessage}[role](content=content))
    return list(tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)


def _supervised(encoded: EncodedConversation) -> list[list[int]]:
    """The runs of labels, each the ids of one assistant turn."""
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label == NOTHING:
            runs.append([])
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_the_librarys_front_door(
    folder: Path, encoder: ConversationEncoder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    turns = CONVERSATIONS[name]
    expected = _reference(folder, turns, monkeypatch)
    assert encoder.encode(_conversation(turns)).token_ids == expected
    *asked, (last, _) = turns
    if last == "assistant" and asked[-1][0] == "user":
        prompt = encoder.encode_prompt(_messages(asked))
        assert prompt.token_ids == _reference(folder, asked, monkeypatch, prompt=True)
        assert prompt.token_ids[-1] == END_INST
        assert set(prompt.labels) == {NOTHING}


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "one speaker twice"])
def test_a_held_out_conversation_is_both_of_its_forms_with_images_read_once(
    encoder: ConversationEncoder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    conversation = _conversation(CONVERSATIONS[name])
    expected = encoder.encode(conversation), encoder.encode_prompt(conversation.messages[:-1], WHERE)
    read, original = [], conversation_tokens.read_pixels
    monkeypatch.setattr(
        conversation_tokens, "read_pixels", lambda image, tokens: read.append(image) or original(image, tokens)
    )
    for given, wanted in zip(encoder.encode_held_out(conversation), expected, strict=True):
        assert (given.token_ids, given.labels, given.where) == (wanted.token_ids, wanted.labels, wanted.where)
        assert len(given.images) == len(wanted.images)
        assert all(map(np.array_equal, given.images, wanted.images))
    assert len(read) == len(expected[0].images)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_the_assistant_turns_with_their_ends_shifted_by_one(encoder: ConversationEncoder, name: str) -> None:
    turns = CONVERSATIONS[name]
    encoded = encoder.encode(_conversation(turns))
    assert len(encoded.labels) == len(encoded.token_ids)
    assert encoded.labels[-1] == NOTHING
    for position, label in enumerate(encoded.labels):
        assert label in (NOTHING, encoded.token_ids[(position + 1) % len(encoded.labels)])
    runs = _supervised(encoded)
    answers = [content for role, content in turns if role == "assistant"]
    # the template makes one turn of neighbours
    answers = ["".join(["c", "d"])] if name == "one speaker twice" else answers
    assert [encoder.decode(run).replace("\n\n", "") for run in runs] == [str(answer).rstrip(" ") for answer in answers]
    assert all(run[-1] == EOS and run.count(EOS) == 1 for run in runs)
    starts = [i for i, label in enumerate(encoded.labels) if label != NOTHING and encoded.labels[i - 1] == NOTHING]
    assert [encoded.token_ids[start] for start in starts] == [END_INST] * len(runs)
    assert encoded.num_supervised == sum(map(len, runs))


def test_special_tokens_in_a_text_are_text(encoder: ConversationEncoder) -> None:
    encoded = encoder.encode(_conversation([("user", "[IMG]</s>[INST]"), ("assistant", "<s>[IMG]</s>")]))
    ids = encoded.token_ids
    assert [ids.count(special) for special in (BOS, EOS, BEGIN_INST, END_INST, IMG)] == [1, 1, 1, 1, 0]
    assert encoder.decode(ids) == "[IMG]</s>[INST]<s>[IMG]</s>"


def test_images_come_in_the_order_of_their_tokens(newest: Path) -> None:
    encoder = ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=2000)
    turns: list[Turn] = [("user", [A, "?", C]), ("assistant", "x"), ("user", ["and?", B]), ("assistant", "y")]
    encoded = encoder.encode(_conversation(turns))
    assert [image.shape for image in encoded.images] == [(16, 32, 3), (32, 64, 3), (48, 16, 3)]
    assert (encoded.images[0] == np.asarray(A)).all()
    rows: list[list[int]] = [[]]
    for token in encoded.token_ids:
        if token in (IMG_BREAK, IMG_END):
            rows.append([])
        elif token == IMG:
            rows[-1].append(token)
    assert [len(row) for row in rows[:-1]] == [2, 4, 4, 1, 1, 1]
    assert encoded.where == WHERE


LONG: list[Turn] = [
    ("user", [A, "First?"]),
    ("assistant", "one"),
    ("user", [B, "Second?"]),
    ("assistant", "two"),
    ("assistant", "more"),
    ("user", "Third? " * 5),
    ("assistant", "three"),
]


def test_a_conversation_that_is_too_long_is_refused(newest: Path) -> None:
    whole = len(ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=2000).encode(_conversation(LONG)).token_ids)
    ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=whole).encode(_conversation(LONG))
    encoder = ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=whole - 1)
    message = f"^{WHERE}: has {whole} tokens, more than data.max_tokens, {whole - 1}; raise it, set data.too_long"
    with pytest.raises(DataError, match=message):
        encoder.encode(_conversation(LONG))


@pytest.mark.parametrize("version", ["v3", "v13"])
def test_a_conversation_that_is_too_long_is_cut_between_turns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    folder = write_tekken(tmp_path, version)
    free = ConversationEncoder(folder, IMAGE_TOKENS, max_tokens=2000)
    for turns in (LONG, [("system", "Look."), *LONG]):
        first = len(turns) - len(LONG)
        # all that end where an assistant ends: after the first, second and third answer
        cuts = [free.encode(_conversation(turns[: first + end])) for end in (2, 5, 7)]
        sizes = [len(cut.token_ids) for cut in cuts]
        for limit in sorted({size - below for size in sizes for below in (0, 1)}):
            encoder = ConversationEncoder(folder, IMAGE_TOKENS, max_tokens=limit, too_long="truncate")
            if limit < sizes[0]:
                message = f"^{WHERE}: has {sizes[0]} tokens up to its first answer, more than data.max_tokens, {limit}"
                with pytest.raises(DataError, match=message):
                    encoder.encode(_conversation(turns))
                continue
            expected = next(cut for cut, size in reversed(list(zip(cuts, sizes, strict=True))) if size <= limit)
            encoded = encoder.encode(_conversation(turns))
            assert (encoded.token_ids, encoded.labels) == (expected.token_ids, expected.labels)
            assert len(encoded.images) == len(expected.images)
            assert encoded.token_ids[-1] == EOS
    assert "keeps its first turns" in caplog.text


def test_cutting_is_said_once(newest: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=20, too_long="truncate")
    for _ in range(3):
        encoder.encode(_conversation(LONG))
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith(f"{WHERE}: ")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("user", "a")], "ends with the turn of role user; expected assistant, the answer to learn"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "ends with the turn of role user"),
        ([("assistant", "b")], "no conversation the chat template knows \\(.*must start with a user"),
        ([("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d")], "no conversation the chat template"),
        ([("user", [picture(1, 1), "a"]), ("assistant", "b")], "image: has 1 x 1 pixels"),
    ],
)
def test_bad_conversations_are_refused_with_their_row(newest: Path, turns: list[Turn], message: str) -> None:
    encoder = ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=2000)
    with pytest.raises(DataError, match=f"^{WHERE}: {message}"):
        encoder.encode(_conversation(turns))


def test_bad_prompts_are_refused(newest: Path) -> None:
    encoder = ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=20)
    cases: list[tuple[list[Turn], str]] = [
        ([], "ends with nothing; expected a user turn to answer"),
        ([("user", "a"), ("assistant", "b")], "ends with the turn of role assistant; expected a user turn"),
        ([("user", "word " * 30)], "has [0-9]+ tokens, more than 20; shorten it"),
    ]
    for turns, message in cases:
        with pytest.raises(DataError, match=f"^prompt: {message}"):
            encoder.encode_prompt(_messages(turns))


def test_several_threads_may_encode_at_once(newest: Path) -> None:
    encoder = ConversationEncoder(newest, IMAGE_TOKENS, max_tokens=2000)
    expected = {name: encoder.encode(_conversation(turns)).token_ids for name, turns in CONVERSATIONS.items()}
    wrong: list[str] = []

    def work() -> None:
        for name, turns in list(CONVERSATIONS.items()) * 20:
            if encoder.encode(_conversation(turns)).token_ids != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_ids_that_are_not_the_models_are_refused(newest: Path) -> None:
    other = ImageTokens(10, 12, 14, patch_size=8, spatial_merge_size=2, max_image_size=64)
    with pytest.raises(LayoutError, match=f"^{newest}/tekken.json: .*IMG_END.*13.*configuration has .10, 12, 14."):
        ConversationEncoder(newest, other, max_tokens=100)


@pytest.mark.parametrize("content", [None, "", "{}", "no json", json.dumps({"config": {"version": "v99"}})])
def test_a_folder_without_a_readable_tekken_file_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(LayoutError, match=f"^{tmp_path}/tekken.json: not a Tekken tokenizer that can be read"):
        ConversationEncoder(tmp_path, IMAGE_TOKENS, max_tokens=100)

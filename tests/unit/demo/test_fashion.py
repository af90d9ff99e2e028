"""The vision demo's data: counts, form, right answers, and photos that no two splits share."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from ostro.demo.fashion import BACKGROUND, GROUPS, KINDS, NAMES, NUM_ROWS, PLACES, ask, photos, prepare_fashion
from ostro.errors import DataError

Splits = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder."""
    path = tmp_path_factory.mktemp("demo") / "fashion"
    prepare_fashion(path)
    return path


@pytest.fixture(scope="module")
def splits(folder: Path) -> Splits:
    """The rows of all splits."""
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "dev", "test")
    }


def scene_classes(folder: Path, row: dict[str, Any], split: str) -> list[int]:
    """The classes of a dev or test scene, found by looking its photos up among those of the split."""
    stack = (BACKGROUND + photos(split).astype(int) * (255 - BACKGROUND) // 255).astype(numpy.uint8)
    numbers = {photo.tobytes(): number for number, photo in enumerate(stack)}
    scene = numpy.asarray(Image.open(folder / row["messages"][0]["content"][0]["image"]))[::2, ::2]
    quarters = [scene[top : top + 28, left : left + 28] for top in (0, 28) for left in (0, 28)]
    return [numbers[quarter.tobytes()] * len(NAMES) // len(stack) for quarter in quarters]


def right_answer(kind: str, question: str, classes: list[int]) -> str:
    """The answer, worked out from the words alone."""
    found = [NAMES[number] for number in classes]
    words = question.rstrip("?")
    if kind == "name":
        return found[PLACES.index(words.removeprefix("What is in the "))]
    if kind == "count":
        group = words.split()[-1]
        return str(sum(number in GROUPS[group] for number in classes))
    if kind == "exist":
        return "yes" if any(words.endswith(f" {name}") for name in found) else "no"
    direction, _, name = words.removeprefix("What is ").partition(" the ")
    if direction == "to":  # "to the right of the bag"
        side, _, name = name.partition(" of the ")
        direction = side
    (place,) = [number for number, other in enumerate(found) if other == name]
    row, column = divmod(place, 2)
    row_step, column_step = {"right": (0, 1), "left": (0, -1), "below": (1, 0), "above": (-1, 0)}[direction]
    if not (0 <= row + row_step <= 1 and 0 <= column + column_step <= 1):
        raise IndexError(f"{question} in {found}")
    return found[(row + row_step) * 2 + column + column_step]


def test_counts(splits: Splits) -> None:
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 30000, "dev": 400, "test": 1600}
    assert Counter(row["kind"] for row in splits["test"]) == dict.fromkeys(KINDS, 400)
    assert Counter(row["kind"] for row in splits["dev"]) == dict.fromkeys(KINDS, 100)


def test_every_row_is_a_conversation_about_its_own_image(folder: Path, splits: Splits) -> None:
    names = []
    for rows in splits.values():
        for row in rows:
            messages = row["messages"]
            assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
            images = [part for message in messages[::2] for part in message["content"] if part["type"] == "image"]
            assert images == messages[0]["content"][:1]
            names.append(images[0]["image"])
    assert len(set(names)) == len(names)
    assert {f"images/{path.name}" for path in (folder / "images").iterdir()} == set(names)
    with Image.open(folder / names[0]) as image:
        assert (image.size, image.mode) == ((112, 112), "L")


def test_training_rows_ask_several_questions_once(splits: Splits) -> None:
    texts = [[message["content"][-1]["text"] for message in row["messages"][::2]] for row in splits["train"]]
    assert all(len(set(row)) == len(row) for row in texts)
    names = [sum(text.startswith("What is in the ") for text in row) for row in texts]
    assert set(names) == {0, 1, 2, 4}  # at most one where the four photos are of one class
    first = Counter(row[0] for row in texts)
    assert len(first) > 40  # what is asked first, as in evaluation, is any of the questions


@pytest.mark.parametrize("split", ["dev", "test"])
def test_answers_follow_from_the_photos(folder: Path, splits: Splits, split: str) -> None:
    for row in splits[split][:400]:
        user, assistant = row["messages"]
        classes = scene_classes(folder, row, split)
        assert assistant["content"] == right_answer(row["kind"], user["content"][-1]["text"], classes), row


def test_some_scene_has_all_answers_of_a_training_row(splits: Splits) -> None:
    for row in splits["train"][:20]:
        turns = [message["content"] for message in row["messages"]]
        asked = [(user[-1]["text"], answer) for user, answer in zip(turns[::2], turns[1::2], strict=True)]
        scenes = (list(scene) for scene in itertools.product(range(len(NAMES)), repeat=len(PLACES)))
        assert any(all(fits(question, answer, scene) for question, answer in asked) for scene in scenes), row


def fits(question: str, answer: str, classes: list[int]) -> bool:
    """Whether a scene of these classes gives the answer."""
    kind = {"How": "count", "Is": "exist"}.get(question.split()[0])
    kind = kind or ("name" if question.startswith("What is in") else "relation")
    named = question.rstrip("?").rpartition(" the ")[2]
    if kind == "relation" and [NAMES[number] for number in classes].count(named) != 1:
        return False
    try:
        return right_answer(kind, question, classes) == answer
    except IndexError:  # nothing is beyond the edge
        return False


def test_no_photo_is_in_two_splits_or_twice() -> None:
    digests = [
        hashlib.sha256(photo.tobytes()).hexdigest() for split in ("train", "dev", "test") for photo in photos(split)
    ]
    assert len(digests) == 8000 + 800 + 1600
    assert len(set(digests)) == len(digests)


def test_photos_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        photos("dev")[0, 0, 0] = 1


def test_nothing_can_be_pointed_at_where_no_class_is_unique() -> None:
    assert ask("relation", [3, 8, 8, 3], random.Random(0)) is None


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [9, 9, 9, 4], [5, 6, 5, 8]])
@pytest.mark.parametrize("kind", KINDS)
def test_every_question_that_can_be_asked_has_the_right_answer(kind: str, classes: list[int]) -> None:
    for seed in range(40):
        question = ask(kind, classes, random.Random(seed))
        assert question is not None
        assert question.answer == right_answer(kind, question.text, classes)


def test_the_seed_decides(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NUM_ROWS, "train", 20)
    prepare_fashion(tmp_path / "same")
    prepare_fashion(tmp_path / "other", seed=1)
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    assert (tmp_path / "same" / "train.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert (tmp_path / "other" / "train.jsonl").read_text(encoding="utf-8").splitlines() != lines
    name = "images/train-00007.png"
    with Image.open(folder / name) as first, Image.open(tmp_path / "same" / name) as second:
        assert first.tobytes() == second.tobytes()


def test_the_licence_lies_beside_the_data(folder: Path) -> None:
    text = (folder / "LICENSE-FASHION-MNIST.txt").read_text(encoding="utf-8")
    assert "The MIT License" in text
    assert "Copyright (c) 2017 Zalando SE" in text


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=f"^{tmp_path}: already exists"):
        prepare_fashion(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    target = tmp_path / "file" / "fashion"
    with pytest.raises(DataError, match=f"^{target}: cannot be written"):
        prepare_fashion(target)

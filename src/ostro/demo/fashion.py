"""The vision demo's data: scenes of four product photos with questions about them, drawn from Fashion-MNIST.

A scene is a 2 x 2 square of photos, 112 x 112 pixels. Four kinds of question are asked, each about what only the image
tells: `name` (what is in a place), `count` (how many pictures show a group of things), `exist` (is something there) and
`relation` (what is next to something). An answer is one or two words, so exact match is a fair measure.

The photos lie beside this file, in three PNG mosaics: train and dev photos come from the official train split, test
photos from the official test split, so no photo of a held-out scene was seen in training. Training rows are
conversations of several questions about one scene, because the image has to be encoded once for all of them; dev and
test rows ask one question each.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from ostro.errors import DataError

KINDS = ("name", "count", "exist", "relation")
"""Kinds of question, which results are reported by."""

NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""Answers by class of Fashion-MNIST, in its order."""

GROUPS = {"tops": (0, 2, 4, 6), "footwear": (5, 7, 9)}
"""Classes of the groups that are counted."""

PLACES = ("top left", "top right", "bottom left", "bottom right")
"""Places of the four photos, in the order of reading."""

BACKGROUND = 116
"""Grey that black photo pixels become in a scene, white staying white. It is about the mean that image processors
subtract: a patch that shows nothing is then near zero, not the same large vector as all others."""

NUM_ROWS = {"train": 30_000, "dev": 400, "test": 1_600}
"""Rows by split; each has a scene of its own."""

_LICENSE = "LICENSE-FASHION-MNIST.txt"
_PHOTO_PIXELS = 28
_MOSAIC_COLUMNS = 40
# Classes that the photos of a training scene are drawn from. With one class, an answer tells the class of every photo;
# with two, that of half of them: what a photo shows is learnt before the model knows where to look. Scenes of all
# classes alone, as in evaluation, keep it guessing for hundreds of steps.
_TRAIN_VARIETIES = (1, 2, len(NAMES), len(NAMES))
_OTHER_KINDS = ("count", "exist", "relation")
# Share of training conversations that ask for names only.
_NAMES_ALONE = 0.5
# A photo of a scene is 56 pixels wide: four patches of 14, or two image tokens of 2 x 2 patches.
_ENLARGEMENT = 2
# Largest displacement of a training photo, in its own pixels: one photo is then many.
_MAX_SHIFT = 2
# Words for the photo that is one step across or down from a place.
_ACROSS = ("to the right of", "to the left of")
_DOWN = ("below", "above")


@dataclass(frozen=True)
class Question:
    """A question about a scene and its only right answer."""

    kind: str
    text: str
    answer: str


def prepare_fashion(folder: Path, *, seed: int = 0) -> None:
    """Writes `train.jsonl` (30,000 conversations), `dev.jsonl` (400 questions), `test.jsonl` (1,600) and `images/`.

    A row has `messages` in OpenAI's form, with the scene as an image path relative to the folder. Dev and test rows
    also have their `kind`; each has a scene of its own, and all kinds are equally frequent. The folder appears whole or
    not at all, the same on every machine.

    Args:
        folder: Where to write; must not exist, or be empty.
        seed: Of the scenes and questions.

    Raises:
        DataError: When the folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already exists; remove it or name another folder")
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for split, num_rows in NUM_ROWS.items():
            _write_split(partial, split, num_rows, random.Random(f"{seed}/{split}"))
        text = importlib.resources.files("ostro.demo").joinpath(_LICENSE).read_text(encoding="utf-8")
        (partial / _LICENSE).write_text(text, encoding="utf-8")
        partial.replace(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from error


@functools.cache
def photos(split: str) -> numpy.ndarray:
    """The photos of a split, as many of each class, in the order of the classes.

    Args:
        split: `train` (8,000 photos), `dev` (800) or `test` (1,600).

    Returns:
        `[N, 28, 28]` uint8, read-only; photo i has class `i * 10 // N`.
    """
    with importlib.resources.files("ostro.demo").joinpath(f"fashion-{split}.png").open("rb") as file:
        mosaic = numpy.asarray(Image.open(file))
    rows = mosaic.reshape(-1, _PHOTO_PIXELS, _MOSAIC_COLUMNS, _PHOTO_PIXELS).transpose(0, 2, 1, 3)
    stack = rows.reshape(-1, _PHOTO_PIXELS, _PHOTO_PIXELS)
    stack.flags.writeable = False
    return stack


def ask(kind: str, classes: Sequence[int], draw: random.Random) -> Question | None:
    """A question about a scene.

    Args:
        kind: One of `KINDS`.
        classes: The classes of the four photos, in the order of reading.
        draw: Decides which of the questions of that kind it is.

    Returns:
        The question; None for `relation` when no class appears exactly once, so that nothing can be pointed at.
    """
    if kind == "name":
        return _ask_name(draw.randrange(len(PLACES)), classes)
    if kind == "count":
        group = draw.choice(tuple(GROUPS))
        count = sum(photo in GROUPS[group] for photo in classes)
        return Question(kind, f"How many pictures show {group}?", str(count))
    if kind == "exist":
        answer = draw.choice(("yes", "no"))
        fitting = [number for number in range(len(NAMES)) if (number in classes) == (answer == "yes")]
        return Question(kind, f"Is there {_with_article(NAMES[draw.choice(fitting)])}?", answer)
    unique = [place for place in range(len(PLACES)) if classes.count(classes[place]) == 1]
    if not unique:
        return None
    place = draw.choice(unique)
    words, neighbour = draw.choice(((_ACROSS[place % 2], place ^ 1), (_DOWN[place // 2], place ^ 2)))
    return Question(kind, f"What is {words} the {NAMES[classes[place]]}?", NAMES[classes[neighbour]])


def _write_split(folder: Path, split: str, num_rows: int, draw: random.Random) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            kind = None if split == "train" else KINDS[row % len(KINDS)]
            scene, questions = _draw_row(split, kind, draw)
            image = f"images/{split}-{row:05d}.png"
            Image.fromarray(scene).save(folder / image, compress_level=1)
            record: dict[str, Any] = {"messages": _messages(image, questions)}
            file.write(json.dumps(record if kind is None else {"kind": kind, **record}) + "\n")


def _draw_row(split: str, kind: str | None, draw: random.Random) -> tuple[numpy.ndarray, list[Question]]:
    """A scene `[112, 112]` uint8 and its questions: a whole conversation, or one of `kind`."""
    stack = photos(split)
    while True:
        variety = len(NAMES) if kind else draw.choice(_TRAIN_VARIETIES)
        palette = draw.sample(range(len(NAMES)), variety)
        classes = [draw.choice(palette) for _ in PLACES]
        pictures = [stack[_draw_photo(number, len(stack), draw)] for number in classes]
        if kind is None:
            return _scene([_shift(picture, draw) for picture in pictures]), _conversation(classes, draw)
        question = ask(kind, classes, draw)
        if question is not None:
            return _scene(pictures), [question]


def _draw_photo(number: int, num_photos: int, draw: random.Random) -> int:
    """The number of a photo of class `number`, where all classes have as many and follow each other."""
    per_class = num_photos // len(NAMES)
    return number * per_class + draw.randrange(per_class)


def _conversation(classes: Sequence[int], draw: random.Random) -> list[Question]:
    """Different questions about one scene: its names, or one of each other kind and then two names.

    What earlier turns have told need not be seen. In this order no answer but a few of `exist` follows from them; in a
    random one, half of `exist`, a third of `relation` and a fifth of `count` would.
    """
    names = [_ask_name(place, classes) for place in draw.sample(range(len(PLACES)), len(PLACES))]
    kinds = draw.sample(_OTHER_KINDS, len(_OTHER_KINDS))
    others = [question for kind in kinds if (question := ask(kind, classes, draw)) is not None]
    by_name = draw.random() < _NAMES_ALONE
    if len(set(classes)) == 1:
        return names[:1] if by_name else others
    return names if by_name else others + names[:2]


def _scene(pictures: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """Four photos as one picture on grey."""
    square = numpy.block([list(pictures[:2]), list(pictures[2:])]).astype(numpy.uint16)
    square = (BACKGROUND + square * (255 - BACKGROUND) // 255).astype(numpy.uint8)
    # repeated, not interpolated: the same on every machine, and no pixel that the photos do not have
    return square.repeat(_ENLARGEMENT, axis=0).repeat(_ENLARGEMENT, axis=1)


def _shift(picture: numpy.ndarray, draw: random.Random) -> numpy.ndarray:
    """The photo moved by up to `_MAX_SHIFT` pixels each way, black where nothing is left."""
    top, left = (draw.randrange(2 * _MAX_SHIFT + 1) for _ in range(2))
    padded = numpy.pad(picture, _MAX_SHIFT)
    return padded[top : top + _PHOTO_PIXELS, left : left + _PHOTO_PIXELS]


def _messages(image: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Turns in OpenAI's form; the first one shows the image."""
    messages: list[dict[str, Any]] = []
    for question in questions:
        text = {"type": "text", "text": question.text}
        parts = [text] if messages else [{"type": "image", "image": image}, text]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": question.answer}]
    return messages


def _ask_name(place: int, classes: Sequence[int]) -> Question:
    return Question("name", f"What is in the {PLACES[place]}?", NAMES[classes[place]])


def _with_article(name: str) -> str:
    return f"a pair of {name}" if name.endswith("s") else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

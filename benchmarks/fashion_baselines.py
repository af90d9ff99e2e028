"""What the answers about Fashion-MNIST scenes are worth: a prior that sees no image, and a linear classifier of photos
with hand-written rules, both on the test rows of the vision demo.

The prior answers each question text with its most frequent answer over scenes drawn like those of the test rows:
training rows would be a weaker guide, as their scenes have fewer classes. The pixel baseline is told what no
model is: where the photos of a scene are, which class each training photo has, and what each question means.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
from common import table, write_result
from PIL import Image
from sklearn.linear_model import LogisticRegression

from ostro.demo.fashion import BACKGROUND, GROUPS, KINDS, NAMES, PLACES, ask, photos, prepare_fashion

# Place of the photo next to each place, by the words of a relation question.
_NEIGHBOURS = {
    "to the right of": {0: 1, 2: 3},
    "to the left of": {1: 0, 3: 2},
    "below": {0: 2, 1: 3},
    "above": {2: 0, 3: 1},
}
_RELATION = re.compile(rf"What is ({'|'.join(_NEIGHBOURS)}) the (.+)\?")
_MAX_ITERATIONS = 200
_NUM_PRIOR_QUESTIONS = 200_000


def questions(path: Path) -> Iterator[tuple[str, Path, str, str]]:
    """Kind, image, question and answer of every row of a prepared dev or test file."""
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            user, assistant = row["messages"]
            picture, text = user["content"]
            yield row["kind"], path.parent / picture["image"], text["text"], assistant["content"]


def exact_match(path: Path, answer: Callable[[str, Path], str]) -> dict[str, float]:
    """Share of right answers by kind, and over all rows."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for kind, image, question, reference in questions(path):
        correct = answer(question, image) == reference
        right[kind].append(correct)
        right["overall"].append(correct)
    return {kind: float(numpy.mean(right[kind])) for kind in (*KINDS, "overall")}


def fit_prior() -> Callable[[str, Path], str]:
    """Answers a question text by its most frequent answer over many scenes drawn as those of the test rows are."""
    draw = random.Random("prior")
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for number in range(_NUM_PRIOR_QUESTIONS):
        classes = [draw.randrange(len(NAMES)) for _ in PLACES]
        if question := ask(KINDS[number % len(KINDS)], classes, draw):
            counts[question.text][question.answer] += 1
    return lambda question, _: counts[question].most_common(1)[0][0]


def fit_pixels() -> Callable[[str, Path], str]:
    """Answers by rules from the class probabilities that a logistic regression gives each photo of a scene."""
    stack = photos("train")
    classes = numpy.arange(len(stack)) * len(NAMES) // len(stack)
    classifier = LogisticRegression(C=0.02, max_iter=_MAX_ITERATIONS).fit(_features(stack / 255.0), classes)

    def answer(question: str, image: Path) -> str:
        scene = (numpy.asarray(Image.open(image))[::2, ::2] - float(BACKGROUND)) / (255 - BACKGROUND)
        quarters = numpy.stack([part for half in numpy.split(scene, 2) for part in numpy.split(half, 2, axis=1)])
        return answer_by_rules(question, classifier.predict_proba(_features(quarters)))

    return answer


def _features(stack: numpy.ndarray) -> numpy.ndarray:
    return stack.reshape(len(stack), -1)


def answer_by_rules(question: str, probabilities: numpy.ndarray) -> str:
    """The answer that follows from the class probabilities `[4, 10]` of a scene's photos."""
    found: Sequence[int] = probabilities.argmax(axis=1).tolist()
    if relation := _RELATION.fullmatch(question):
        neighbours = _NEIGHBOURS[relation[1]]
        # the likeliest place among those that have a neighbour on that side, however unlikely
        place = max(neighbours, key=lambda place: probabilities[place, NAMES.index(relation[2])])
        return NAMES[found[neighbours[place]]]
    for group, members in GROUPS.items():
        if question == f"How many pictures show {group}?":
            return str(sum(photo in members for photo in found))
    for place, words in enumerate(PLACES):
        if question == f"What is in the {words}?":
            return NAMES[found[place]]
    name = question.removesuffix("?").partition("Is there ")[2].split(maxsplit=1)[1].removeprefix("pair of ")
    return "yes" if NAMES.index(name) in found else "no"


def main() -> None:
    """Scores both baselines and writes the result file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        data = Path(folder) / "fashion"
        prepare_fashion(data)
        prepared = time.process_time()
        scores = {
            "question only (most frequent answer)": exact_match(data / "test.jsonl", fit_prior()),
            "logistic regression on pixels + rules": exact_match(data / "test.jsonl", fit_pixels()),
        }
    rows = [{"": name} | {kind: f"{score:.3f}" for kind, score in kinds.items()} for name, kinds in scores.items()]
    note = (
        "Exact match on the 1,600 test questions of the vision demo, 400 of each kind, every scene of photos that no "
        f"training row has. Writing the data took {prepared - started:.0f} CPU seconds, the baselines "
        f"{time.process_time() - prepared:.0f}."
    )
    body = f"{note}\n\n{table(rows, ['', *KINDS, 'overall'])}"
    packages = ["numpy", "pillow", "scikit-learn"]
    write_result("fashion_baselines", "Baselines of the vision demo", body, packages=packages)


if __name__ == "__main__":
    main()

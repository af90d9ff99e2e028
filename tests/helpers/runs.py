"""A whole training run in seconds: real small weights, a BEIR folder whose queries can be learned, and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ostro.checkpoint.create import create_weights
from ostro.train.recipe import EmbedRecipe
from tests.unit.data.files import write_jsonl

THINGS = ["apple", "river", "engine", "castle", "violin", "pepper", "glacier", "lantern", "orchid", "anchor", "meadow"]
ASKED = ["where is the {}", "tell me about a {}", "who owns this {}", "{} pictures"]


def make_inputs(folder: Path) -> None:
    """Writes `folder/weights` (FP8, inside a vision-language folder) and `folder/data` (44 queries, 11 documents)."""
    create_weights(folder / "weights", size="tiny", layout="nested", precision="fp8", vocab_size=1500, seed=0)
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": "", "text": f"a page on the {thing}"} for i, thing in enumerate(THINGS)]
    queries = [
        {"_id": f"q{i}-{j}", "text": asked.format(thing)}
        for i, thing in enumerate(THINGS)
        for j, asked in enumerate(ASKED)
    ]
    write_jsonl(data / "corpus.jsonl", documents)
    write_jsonl(data / "queries.jsonl", queries)
    for split, kept in {"train": range(3), "test": range(3, 4)}.items():
        rows = [f"q{i}-{j}\td{i}\t1" for i in range(len(THINGS)) for j in kept]
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")


def recipe(inputs: Path, output: Path, **blocks: dict[str, Any]) -> EmbedRecipe:
    """The recipe over `make_inputs`; `blocks` add to or replace keys of its blocks."""
    held_out = {"path": str(inputs / "data"), "split": "test", "ks": [5]}
    settings: dict[str, Any] = {
        "kind": "embed",
        "output": str(output),
        "model": {"weights": str(inputs / "weights")},
        "data": {
            "train": [{"path": str(inputs / "data"), "split": "train"}],
            "global_batch_queries": 8,
            "micro_batch_tokens": 60,
            "query_max_tokens": 32,
            "document_max_tokens": 32,
        },
        "loss": {"temperature": 0.1},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"num_steps": 6, "log_every": 1, "evaluate_every": 3, "save_every": 2},
        "evaluate": held_out,
        "test": {**held_out, "bm25": False},
    }
    for name, keys in blocks.items():
        settings[name] = {**settings.get(name, {}), **keys}
    return EmbedRecipe.model_validate(settings)

"""A whole vision-language run in seconds: real small FP8 weights, and questions about pictures of one colour."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

from ostro.checkpoint.create import create_weights
from ostro.train.recipe import VlmRecipe
from tests.unit.data.files import write_jsonl

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def picture_row(folder: Path, number: int, colour: str, *, kind: str | None = None) -> dict[str, Any]:
    """A conversation about a picture of one colour, which is written to `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    name = f"images/{number}.png"
    Image.new("RGB", (56 + 28 * (number % 2), 56), COLOURS[colour]).save(folder / name)
    asked = [{"type": "image", "image": name}, {"type": "text", "text": "Which colour?"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
    return {"messages": messages, **({"kind": kind} if kind else {})}


def text_row(number: int) -> dict[str, Any]:
    """A conversation without a picture."""
    asked, given = f"What follows {number}?", f"{number + 1}"
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": given}]}


def make_inputs(folder: Path) -> None:
    """Writes `folder/weights` (FP8, nested) and `folder/data`: 24 conversations, 3 without a picture; 9 held out."""
    create_weights(folder / "weights", size="tiny", layout="nested", precision="fp8", vocab_size=1500, seed=0)
    names, data = list(COLOURS), folder / "data"
    rows = [picture_row(data, number, names[number % 3]) for number in range(21)]
    rows += [text_row(number) for number in range(3)]
    random.Random(0).shuffle(rows)
    write_jsonl(data / "train.jsonl", rows)
    held_out = [picture_row(data, 100 + number, names[number % 3], kind=names[number % 3]) for number in range(9)]
    write_jsonl(data / "test.jsonl", held_out)


def recipe(inputs: Path, output: Path, **blocks: dict[str, Any]) -> VlmRecipe:
    """The recipe over `make_inputs`; `blocks` add to or replace keys of its blocks."""
    held_out = {"path": str(inputs / "data" / "test.jsonl"), "max_new_tokens": 8}
    settings: dict[str, Any] = {
        "kind": "vlm",
        "output": str(output),
        "model": {"weights": str(inputs / "weights")},
        "data": {
            "train": [{"path": str(inputs / "data" / "train.jsonl")}],
            "global_batch_samples": 8,
            "micro_batch_tokens": 64,
            "max_tokens": 64,
        },
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"warmup_steps": 2},
        "train": {"num_steps": 6, "log_every": 1, "evaluate_every": 3, "save_every": 2},
        "evaluate": held_out,
        "test": held_out,
    }
    for name, keys in blocks.items():
        settings[name] = {**settings.get(name, {}), **keys}
    return VlmRecipe.model_validate(settings)

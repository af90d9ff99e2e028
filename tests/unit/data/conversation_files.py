"""Small conversations with images, in files and in memory, and a folder with Mistral's tokenizer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from PIL import Image

from ostro.data.conversation_options import ConversationDataOptions
from ostro.data.images import ImageTokens
from ostro.models.tokenizer import cut_tekken
from tests.unit.data.files import write_jsonl

IMAGE_TOKENS = ImageTokens(
    image_token_id=10,
    image_break_token_id=12,
    image_end_token_id=13,
    patch_size=8,
    spatial_merge_size=2,
    max_image_size=64,
)
"""A token for each 16 x 16 pixels."""


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels."""
    drawn = "RGB" if mode in ("P", "1") else mode
    num_bytes = width * height * len(Image.new(drawn, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, num_bytes)
    return Image.frombytes(drawn, (width, height), values.astype(np.uint8).tobytes()).convert(mode)


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def base64_of(content: bytes) -> str:
    """Base64 text."""
    return base64.b64encode(content).decode()


def image_row(index: int, size: tuple[int, int] | None = (32, 16), answer: str = "") -> dict[str, Any]:
    """A question about image `index`, or a plain question where `size` is None."""
    image = [] if size is None else [{"type": "image", "image": f"images/{index}.png"}]
    return {
        "messages": [
            {"role": "user", "content": [*image, {"type": "text", "text": f"question {index}"}]},
            {"role": "assistant", "content": answer or f"answer {index}"},
        ],
        "kind": "image" if image else "text",
    }


def write_conversations(folder: Path, sizes: Sequence[tuple[int, int] | None], name: str = "train.jsonl") -> Path:
    """A JSONL file of one question per size, with its images beside it; None is a question without an image."""
    (folder / "images").mkdir(exist_ok=True)
    for index, size in enumerate(sizes):
        if size is not None:
            picture(*size, seed=index).save(folder / "images" / f"{index}.png")
    return write_jsonl(folder / name, (image_row(index, size) for index, size in enumerate(sizes)))


def conversation_options(*paths: Path, weights: Sequence[float] = (), **settings: Any) -> ConversationDataOptions:
    """Options over some sources; small steps where none are given."""
    weights = weights or [1.0] * len(paths)
    train = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    defaults = {"global_batch_samples": 4, "max_tokens": 64, "micro_batch_tokens": 64}
    return ConversationDataOptions.model_validate({"train": train, **defaults, **settings})


def write_tekken(folder: Path, version: str = "v3", vocab_size: int = 1500) -> Path:
    """A weights folder's `tekken.json`, cut to few entries, of one of the versions of Mistral's chat template."""
    cut_tekken(vocab_size, folder)
    path = folder / "tekken.json"
    tekken = json.loads(path.read_text(encoding="utf-8"))
    names = [str(token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
    tekken["config"]["version"] = version
    tekken["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    path.write_text(json.dumps(tekken), encoding="utf-8")
    return folder

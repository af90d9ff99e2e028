"""Tiny embedders to export, what the export of each must give, and ways to read and spoil a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralModel, PreTrainedModel

from ostro.checkpoint.export import export_embedder
from ostro.checkpoint.model_card import EmbedderSettings, ModelCard
from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.models.packed import use_packed_attention
from ostro.models.pooling import pool
from ostro.models.tokenizer import TextTokenizer, cut_tekken, load_tokenizer
from tests.helpers.tiny import text_config

VOCAB_SIZE = 1300
PROMPTS = {"query": "query: ", "document": "passage: "}
TEXTS = [
    "a short one",
    "The south wind crosses the sea with warm, humid air and rain " * 3,
    "naïve 日本語",
    "x",
    "one two three four five six seven eight nine ten eleven twelve",
]
CARD = ModelCard(
    base_model="mistralai/Ministral-3-3B-Base-2512",
    datasets=("BeIR/fiqa", "../secret/data"),
    metrics={"nDCG@10": 0.62346, "Recall@10": 0.8},
    num_steps=120,
    loss={"temperature": 0.05, "symmetric": True},
)


def small_tokenizer(folder: Path) -> TextTokenizer:
    """Tekken cut to `VOCAB_SIZE`, in `folder`."""
    cut_tekken(VOCAB_SIZE, folder)
    return load_tokenizer(folder)


def bidirectional(seed: int = 0, **overrides: Any) -> Ministral3BidirectionalModel:
    """A tiny embedder backbone, set up for packed attention as in training."""
    torch.manual_seed(seed)
    source = text_config(vocab_size=VOCAB_SIZE, **overrides).to_dict()
    fields = {key: value for key, value in source.items() if key != "model_type"}
    model = Ministral3BidirectionalModel(Ministral3BidirectionalConfig(**fields, temperature=0.05))
    use_packed_attention(model)
    return model.eval()


def stock_mistral() -> MistralModel:
    """A tiny bidirectional tower of the older family."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    config.is_causal = False
    return MistralModel(config).eval()


def settings(**changes: Any) -> EmbedderSettings:
    """Settings with prompts and a limit that cuts one of `TEXTS`."""
    return EmbedderSettings(**{"prompts": PROMPTS, "max_tokens": 48, **changes})


def export(model: PreTrainedModel, tokenizer: TextTokenizer, folder: Path, **options: Any) -> None:
    """`export_embedder` in float32, so that vectors can be compared closely."""
    options = {"settings": settings(), "card": CARD, "dtype": torch.float32, **options}
    export_embedder(model, tokenizer, folder, **options)


@torch.no_grad()
def reference(
    model: PreTrainedModel, tokenizer: TextTokenizer, texts: list[str], used: EmbedderSettings
) -> torch.Tensor:
    """The plain meaning: one text at a time, no padding."""
    rows = []
    for ids in tokenizer.encode(texts, used.max_tokens):
        hidden_states = model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state.float()
        rows.append(pool(hidden_states, torch.ones(1, len(ids)), used.pooling))
    vectors = torch.cat(rows)
    return F.normalize(vectors, dim=-1) if used.normalize else vectors


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Changes a JSON file in place."""
    content = read(path)
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")

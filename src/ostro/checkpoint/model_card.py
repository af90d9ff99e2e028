"""The `README.md` of an exported embedder: what it was made from, how well it searches, and how to use it.

It is Markdown with the YAML header that hubs read. Paths of this machine are reduced to their last part; only hub ids
are linked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# By the pooling kind's name in 1_Pooling/config.json; `hidden` [B, S, H], `mask` [B, S, 1].
_POOLING_CODE = {
    "mean_tokens": "(hidden * mask).sum(1) / mask.sum(1)",
    "weightedmean_tokens": "(hidden * mask * mask.cumsum(1)).sum(1) / (mask * mask.cumsum(1)).sum(1)",
    "cls_token": "hidden[:, 0]",
    "lasttoken": "hidden[torch.arange(len(hidden)), mask.sum((1, 2)) - 1]",
}
POOLING_MODES = {
    "avg": "mean_tokens",
    "mean": "mean_tokens",
    "weighted_avg": "weightedmean_tokens",
    "cls": "cls_token",
    "last": "lasttoken",
}
"""Ostro's pooling kinds that other libraries know, and their name behind `pooling_mode_` in `1_Pooling/config.json`."""


@dataclass(frozen=True)
class EmbedderSettings:
    """How texts become vectors, as an exported folder states it.

    Attributes:
        prompts: Text put before a query (`query`) and a document (`document`).
        max_tokens: Longer texts are cut to this many tokens, special tokens included.
        pooling: A key of `POOLING_MODES`.
        normalize: Whether vectors have length 1.
        matryoshka_dims: Leading dims that are vectors by themselves; empty unless trained so.
    """

    prompts: Mapping[str, str]
    max_tokens: int
    pooling: str = "avg"
    normalize: bool = True
    matryoshka_dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelCard:
    """What the reader of an exported folder is told about its making.

    Attributes:
        base_model: Hub id or folder of the weights that training began with.
        datasets: Hub ids, files or folders trained on.
        metrics: Value by name, such as `nDCG@10`.
        num_steps: Optimizer steps; None where nothing was trained.
        loss: Settings of the loss, as in the recipe.
    """

    base_model: str
    datasets: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_steps: int | None = None
    loss: Mapping[str, Any] = field(default_factory=dict)


def render_card(card: ModelCard, settings: EmbedderSettings, *, name: str, model_type: str, num_dims: int) -> str:
    """The text of `README.md`.

    Args:
        card: How the model was made.
        settings: How it is used.
        name: Title, and what the examples load: the folder's name.
        model_type: transformers' name of the architecture.
        num_dims: Size of a vector.

    Returns:
        Markdown, YAML header first.
    """
    parts = [
        f"---\n{_header(card, settings, model_type)}---",
        f"# {name}",
        f"A bidirectional text embedder for search, adapted with Ostro from {_mention(card.base_model)}.",
        _table(("property", "value"), _properties(settings, model_type, num_dims)),
    ]
    if card.num_steps is not None:
        parts.append(f"## Training\n\n{_training(card)}")
    if card.metrics:
        rows = {metric: f"{value:.4f}" for metric, value in card.metrics.items()}
        parts.append(f"## Evaluation\n\n{_table(('metric', 'value'), rows)}")
    parts.append(f"## Use\n\n{_usage(settings, name)}")
    return "\n\n".join(parts) + "\n"


def _header(card: ModelCard, settings: EmbedderSettings, model_type: str) -> str:
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "ostro", model_type]
    header: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": tags + ["matryoshka"] * bool(settings.matryoshka_dims),
    }
    if _is_hub_id(card.base_model):
        header["base_model"] = card.base_model
    if datasets := [dataset for dataset in card.datasets if _is_hub_id(dataset)]:
        header["datasets"] = datasets
    return str(yaml.safe_dump(header, sort_keys=False, allow_unicode=True))


def _is_hub_id(name: str) -> bool:
    """Whether a name can only be a hub id: `organisation/name`, and no such path here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _mention(name: str) -> str:
    return f"`{name if _is_hub_id(name) else Path(name).name}`"


def _properties(settings: EmbedderSettings, model_type: str, num_dims: int) -> dict[str, str]:
    rows = {
        "architecture": f"{model_type}, bidirectional attention (`is_causal: false`)",
        "dimensions": str(num_dims),
        "Matryoshka dimensions": ", ".join(map(str, settings.matryoshka_dims)),
        "longest text": f"{settings.max_tokens} tokens",
        "pooling": f"{settings.pooling}, then length 1" if settings.normalize else settings.pooling,
        "similarity": "cosine",
    }
    rows |= {
        f"prompt for a {role}": f"`{json.dumps(text, ensure_ascii=False)}`" for role, text in settings.prompts.items()
    }
    return {label: value for label, value in rows.items() if value}


def _training(card: ModelCard) -> str:
    data = ", ".join(map(_mention, card.datasets)) or "unnamed data"
    text = f"{card.num_steps} optimizer steps on {data}."
    if card.loss:
        text += f"\n\n```yaml\n{yaml.safe_dump({'loss': dict(card.loss)}, sort_keys=False)}```"
    return text


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {label} | {value.replace('|', chr(92) + '|')} |" for label, value in rows.items())])


def _usage(settings: EmbedderSettings, name: str) -> str:
    query = settings.prompts.get("query", "")
    pooling = _POOLING_CODE[POOLING_MODES[settings.pooling]]
    normalize = "\nembeddings = torch.nn.functional.normalize(embeddings, dim=-1)" if settings.normalize else ""
    serving = f"""vLLM's `/v1/embeddings` applies no prompts, so the client puts them before the texts:

```bash
vllm serve {name} --runner pooling
```"""
    if settings.pooling == "weighted_avg":
        serving = "vLLM and text-embeddings-inference do not know the pooling `weighted_avg`."
    return f'''Ostro and sentence-transformers put the prompts before the texts themselves.

```python
from ostro import Encoder

encoder = Encoder.from_pretrained("{name}")
queries = encoder.encode_query(["what is searched for"])
documents = encoder.encode_document(["what is found", "and what is not"])
print(encoder.similarity(queries, documents))
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["what is searched for"])
documents = model.encode_document(["what is found", "and what is not"])
print(model.similarity(queries, documents))
```

With transformers alone, prompt, pooling and length are up to the caller:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
texts = [{json.dumps(query, ensure_ascii=False)} + "what is searched for"]
batch = tokenizer(texts, padding=True, truncation=True, max_length={settings.max_tokens}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state.float()
mask = batch["attention_mask"].unsqueeze(-1)
embeddings = {pooling}{normalize}
```

{serving}'''

"""One folder that sentence-transformers, transformers, vLLM and text-embeddings-inference open as the same embedder.

`export_embedder` writes it from a model in memory, `verify_export` reads it back with stock transformers and compares
vectors. How to train or search is left to others. The idea: only stock classes and the file forms that every reader
knows, old ones where a new one is not read everywhere:

| file | what it holds |
|---|---|
| `config.json` | a stock class, `is_causal: false`, every rope parameter, `pooling` |
| `model*.safetensors` | the tower's tensors under base names (`layers.0...`) |
| `modules.json`, `1_Pooling/config.json` | sentence-transformers' first type names, and one boolean per pooling kind |
| `sentence_bert_config.json`, `config_sentence_transformers.json` | the token limit; prompts and similarity |
| `tokenizer.json`, `tokenizer_config.json` | a fast tokenizer whose post-processor puts `<s>` first |
| `README.md` | the model card |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    Ministral3Config,
    Ministral3Model,
    MistralConfig,
    MistralModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from ostro import __version__
from ostro.checkpoint.files import read_json
from ostro.checkpoint.model_card import POOLING_MODES, EmbedderSettings, ModelCard, render_card
from ostro.checkpoint.shards import Piece, replace_folder, write_shards
from ostro.errors import CheckpointError, LayoutError
from ostro.models.backbone import check_bidirectional
from ostro.models.folder import check_weights_folder
from ostro.models.pooling import pool
from ostro.models.tokenizer import TextTokenizer, check_vocabulary

__all__ = ["EmbedderSettings", "ModelCard", "export_embedder", "verify_export"]

_STOCK: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "ministral3": (Ministral3Config, Ministral3Model),
    "ministral3_bidirec": (Ministral3Config, Ministral3Model),
    "mistral": (MistralConfig, MistralModel),
}
# sentence-transformers' booleans in the order in which it lists them.
_ALL_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_ST_CONFIG = "config_sentence_transformers.json"
_VERIFY_BATCH = 8


def export_embedder(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    folder: str | Path,
    *,
    settings: EmbedderSettings,
    card: ModelCard,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    max_shard_gib: float = 5.0,
) -> None:
    """Writes an embedder as a folder of stock files; it appears whole or not at all.

    Args:
        model: A bidirectional Ministral-3 or Mistral text tower, on any device, in any floating dtype.
        tokenizer: Its tokenizer.
        folder: To be made.
        settings: How texts become vectors.
        card: What the model card tells.
        dtype: Stored precision.
        overwrite: Whether an earlier export in `folder`, with all else in it, is replaced once the new one is whole.
        max_shard_gib: Size above which the weights are split into several files, in GiB.

    Raises:
        ValueError: When the pooling gives no single vector, or `max_tokens` or a Matryoshka dim is out of range.
        LayoutError: When the model is of another family, causal, not plain (wrapped, quantised), or has a smaller
            vocabulary than the tokenizer.
        CheckpointError: When the folder is in the way or cannot be written.
    """
    folder = Path(folder).absolute()
    config, expected = _stock_form(model, tokenizer, settings, dtype)
    _check_settings(settings, config)
    weights = model.state_dict()
    _check_weights(weights, expected)
    check_bidirectional(model)
    size = dtype.itemsize
    pieces = [Piece(weight.numel() * size, partial(_stored, key, weight, dtype)) for key, weight in weights.items()]
    with replace_folder(folder, _is_export, overwrite=overwrite) as new:
        write_shards(new, pieces, max_shard_gib=max_shard_gib)
        (new / "config.json").write_text(config.to_json_string(), encoding="utf-8")
        _write_modules(new, settings, config.hidden_size)
        tokenizer.save(new)
        text = render_card(card, settings, name=folder.name, model_type=config.model_type, num_dims=config.hidden_size)
        (new / "README.md").write_text(text, encoding="utf-8")


@torch.no_grad()
def verify_export(
    folder: str | Path,
    reference_texts: Sequence[str],
    reference_embeddings: torch.Tensor,
    *,
    tolerance: float = 1e-3,
) -> None:
    """Reads an exported folder with stock transformers on the CPU, and checks that it is the model it was made from.

    Args:
        folder: The export.
        reference_texts: N >= 1 texts, prompts included.
        reference_embeddings: Their vectors `[N, D]` from the model in memory.
        tolerance: Largest 1 - cosine between a vector and its reference. The default leaves room for bfloat16, which
            costs about 1e-4; a causal mask costs 0.1 to 0.5.

    Raises:
        ValueError: When texts and embeddings do not match in number, or there are none.
        CheckpointError: When the folder cannot be read, is causal, or gives other vectors.
    """
    folder = Path(folder)
    if not reference_texts or len(reference_texts) != len(reference_embeddings):
        raise ValueError(
            f"reference_texts: must be as many as embeddings and at least 1, got {len(reference_texts)} texts and "
            f"{len(reference_embeddings)} embeddings"
        )
    try:
        embeddings = _embed_with_stock(folder, reference_texts)
    except (LayoutError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the export cannot be used: {error}") from error
    reference = reference_embeddings.detach().float().cpu()
    if embeddings.shape != reference.shape:
        raise CheckpointError(f"{folder}: gives vectors {list(embeddings.shape)}, expected {list(reference.shape)}")
    errors = 1 - F.cosine_similarity(embeddings, reference, dim=-1)
    length_errors = (embeddings.norm(dim=-1) / reference.norm(dim=-1) - 1).abs()
    worst = int(errors.argmax())
    # Written so that nan fails. A length that bfloat16 rounded is off by up to 1/256.
    if not (errors.max() <= tolerance and length_errors.max() <= max(tolerance, 1e-2)):
        raise CheckpointError(
            f"{folder}: gives other vectors than the model in memory: 1 - cosine is {errors[worst]:.2e} for "
            f"{reference_texts[worst][:60]!r}, expected at most {tolerance:.0e}; lengths differ by up to "
            f"{length_errors.max():.2e}; do not use this export"
        )


def _stock_form(
    model: PreTrainedModel, tokenizer: TextTokenizer, settings: EmbedderSettings, dtype: torch.dtype
) -> tuple[PreTrainedConfig, Mapping[str, torch.Size]]:
    """The stock class's config for the model, and the shape of every tensor that class has."""
    source = model.config.to_dict()
    if source["model_type"] not in _STOCK:
        raise LayoutError(f"model: model_type must be one of {', '.join(_STOCK)}, got {source['model_type']!r}")
    check_vocabulary(tokenizer, source["vocab_size"])
    config_class, model_class = _STOCK[source["model_type"]]
    left_out = {"architectures", "dtype", "transformers_version"}
    fields = {field.name for field in dataclasses.fields(config_class)} - left_out
    extras: dict[str, Any] = {"is_causal": False, "pooling": settings.pooling}
    if settings.matryoshka_dims:
        extras |= {"is_matryoshka": True, "matryoshka_dimensions": list(settings.matryoshka_dims)}
    own = {key: value for key, value in source.items() if key in fields}
    own |= {"use_cache": False, "pad_token_id": tokenizer.pad_token_id}
    config = config_class(**own, **extras)
    config.architectures = [model_class.__name__]
    config.dtype = dtype
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in model_class(config).state_dict().items()}
    return config, shapes


def _check_settings(settings: EmbedderSettings, config: PreTrainedConfig) -> None:
    if settings.pooling not in POOLING_MODES:
        known = ", ".join(POOLING_MODES)
        raise ValueError(f"pooling: must be one of {known}, which other libraries know, got {settings.pooling!r}")
    if not 1 < settings.max_tokens <= config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"max_tokens: must be between 2 and the model's {limit}, got {settings.max_tokens}")
    wrong = [dim for dim in settings.matryoshka_dims if not 1 <= dim <= config.hidden_size]
    if wrong:
        raise ValueError(f"matryoshka_dims: must be between 1 and {config.hidden_size}, got {wrong}")


def _check_weights(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises LayoutError unless the tensors are exactly those of the stock class, in a floating dtype."""
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [key for key in weights if key in expected and weights[key].shape != expected[key]],
        "quantised": [key for key, weight in weights.items() if weight.dtype.itemsize == 1],
    }
    found = [f"{len(keys)} {kind} ({', '.join(keys[:10])})" for kind, keys in problems.items() if keys]
    if found:
        raise LayoutError(f"model: not a plain text tower: tensors {'; '.join(found)}; export the unwrapped backbone")


def _stored(key: str, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: weight.detach().to("cpu", dtype).contiguous()}


def _is_export(folder: Path) -> bool:
    path = folder / _ST_CONFIG
    return path.is_file() and "ostro" in read_json(path).get("__version__", {})


def _write_modules(folder: Path, settings: EmbedderSettings, num_dims: int) -> None:
    """The files of sentence-transformers, in the form that all its versions and the servers read."""
    steps = [("Transformer", ""), ("Pooling", "1_Pooling"), *[("Normalize", "2_Normalize")] * settings.normalize]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(steps)
    ]
    # vLLM takes the first key that is true for the pooling, so include_prompt must come last.
    pooling = {
        "word_embedding_dimension": num_dims,
        **{f"pooling_mode_{mode}": mode == POOLING_MODES[settings.pooling] for mode in _ALL_MODES},
        "include_prompt": True,
    }
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    if settings.normalize:
        # An empty folder would be lost in git and on the hub.
        _write_json(folder / "2_Normalize" / "config.json", {})
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": settings.max_tokens, "do_lower_case": False})
    about = {
        "__version__": {"ostro": __version__},
        "prompts": {"query": "", "document": "", **settings.prompts},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    _write_json(folder / _ST_CONFIG, about)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _embed_with_stock(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """Vectors `[N, D]` of the folder by stock transformers and what its own files say, in float32."""
    check_weights_folder(folder)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys))[:10] for kind, keys in info.items() if keys}
    if type(model) not in {model_class for _, model_class in _STOCK.values()} or wrong:
        raise LayoutError(f"{folder}: opens as {type(model).__name__}, not as a whole stock text tower {wrong or ''}")
    check_bidirectional(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    limits, pooling = read_json(folder / "sentence_bert_config.json"), read_json(folder / "1_Pooling" / "config.json")
    pool_types = [kind for kind, mode in POOLING_MODES.items() if pooling.get(f"pooling_mode_{mode}")]
    if not pool_types:
        raise LayoutError(f"{folder / '1_Pooling' / 'config.json'}: no known pooling_mode_* is true")
    normalize = "models.Normalize" in (folder / "modules.json").read_text(encoding="utf-8")
    rows = []
    for start in range(0, len(texts), _VERIFY_BATCH):
        batch = tokenizer(
            list(texts[start : start + _VERIFY_BATCH]),
            padding=True,
            truncation=True,
            max_length=limits["max_seq_length"],
            return_tensors="pt",
        )
        hidden_states = model(**batch, use_cache=False).last_hidden_state.float()
        rows.append(pool(hidden_states, batch["attention_mask"], pool_types[0]))
    embeddings = torch.cat(rows)
    return F.normalize(embeddings, dim=-1) if normalize else embeddings

"""An export that is not the model it was made from does not pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ostro.checkpoint.export import verify_export
from ostro.errors import CheckpointError
from tests.helpers.exported import (
    TEXTS,
    edit,
)


def test_a_causal_folder_fails_verification(folder: Path, embeddings: torch.Tensor) -> None:
    verify_export(folder, TEXTS, embeddings, tolerance=1e-5)
    edit(folder / "config.json", lambda config: config.pop("is_causal"))
    with pytest.raises(CheckpointError, match="attention is causal"):
        verify_export(folder, TEXTS, embeddings)


def change_pooling(folder: Path) -> None:
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    edit(folder / "1_Pooling" / "config.json", lambda stored: stored.update(pooling))


def drop_bos(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda stored: stored.update(post_processor=None))


def drop_query_scale(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["rope_parameters"].update(llama_4_scaling_beta=0.0))


def shorten(folder: Path) -> None:
    edit(folder / "sentence_bert_config.json", lambda stored: stored.update(max_seq_length=8))


@pytest.mark.parametrize("damage", [change_pooling, drop_bos, drop_query_scale, shorten])
def test_a_folder_with_other_vectors_fails_verification(
    damage: Callable[[Path], None], folder: Path, embeddings: torch.Tensor
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match="gives other vectors than the model in memory: 1 - cosine is"):
        verify_export(folder, TEXTS, embeddings)


def test_nan_fails_verification(folder: Path, embeddings: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="gives other vectors"):
        verify_export(folder, TEXTS, torch.full_like(embeddings, float("nan")))


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def add_layer(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=3))


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def remove_limits(folder: Path) -> None:
    (folder / "sentence_bert_config.json").unlink()


@pytest.mark.parametrize("damage", [truncate, add_layer, remove_tokenizer, remove_limits])
def test_a_damaged_folder_fails_verification(
    damage: Callable[[Path], None], folder: Path, embeddings: torch.Tensor
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=str(folder)):
        verify_export(folder, TEXTS, embeddings)


def test_verification_needs_texts_that_match(folder: Path, embeddings: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="got 4 texts and 5 embeddings"):
        verify_export(folder, TEXTS[:4], embeddings)
    with pytest.raises(ValueError, match="at least 1"):
        verify_export(folder, [], embeddings[:0])
    with pytest.raises(CheckpointError, match=r"gives vectors \[5, 32\], expected \[5, 16\]"):
        verify_export(folder, TEXTS, embeddings[:, :16])

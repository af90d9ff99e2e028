"""A small embedder, its tokenizer, its vectors and its export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ostro.models.ministral_bidirectional import Ministral3BidirectionalModel
from ostro.models.tokenizer import TextTokenizer
from tests.helpers.exported import TEXTS, bidirectional, export, reference, settings, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model() -> Ministral3BidirectionalModel:
    return bidirectional()


@pytest.fixture(scope="module")
def embeddings(model: PreTrainedModel, tokenizer: TextTokenizer) -> torch.Tensor:
    return reference(model, tokenizer, TEXTS, settings())


@pytest.fixture
def folder(model: PreTrainedModel, tokenizer: TextTokenizer, tmp_path: Path) -> Path:
    export(model, tokenizer, tmp_path / "embedder")
    return tmp_path / "embedder"

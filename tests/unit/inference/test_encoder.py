"""The encoder: order, prompts, limits, and folders it must refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ostro.checkpoint.create import create_weights
from ostro.errors import LayoutError
from ostro.inference.encoder import Encoder
from ostro.models.packed import PackedTexts
from tests.helpers.tiny import padded

TEXTS = ["alpha", "a much longer text about persistence and lateral movement", "beta gamma", "x " * 400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random FP8 weights inside a vision-language folder, with a Tekken tokenizer."""
    path = tmp_path_factory.mktemp("weights") / "vlm"
    create_weights(path, size="tiny", layout="nested", precision="fp8", vocab_size=2048, seed=0)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.from_pretrained(folder, dtype=torch.float32)


def test_vectors_are_the_padded_ones_in_the_order_of_the_texts(encoder: Encoder) -> None:
    ids = encoder.tokenizer.encode(TEXTS, encoder.max_tokens)
    with torch.no_grad():
        expected = encoder.embedder.forward_padded(*padded(ids, pad=encoder.tokenizer.pad_token_id))
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("micro_batch_tokens", [1, 16, 10_000])
def test_the_token_budget_changes_nothing(encoder: Encoder, micro_batch_tokens: int) -> None:
    other = Encoder(encoder.embedder, encoder.tokenizer, micro_batch_tokens=micro_batch_tokens)
    torch.testing.assert_close(other.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5, rtol=0)


def test_prompts_are_put_before_texts(encoder: Encoder) -> None:
    prompted = Encoder(encoder.embedder, encoder.tokenizer, prompts={"query": "find: ", "document": "text: "})
    assert torch.equal(prompted.encode_query("alpha"), encoder.encode("find: alpha"))
    assert torch.equal(prompted.encode_document(["alpha"]), encoder.encode(["text: alpha"]))
    assert not torch.allclose(prompted.encode_query("alpha"), prompted.encode_document("alpha"))


def test_long_texts_are_cut(encoder: Encoder) -> None:
    short = Encoder(encoder.embedder, encoder.tokenizer, max_tokens=8)
    ids = encoder.tokenizer.encode([TEXTS[1]], 8)
    assert torch.equal(short.encode(TEXTS[1]), encoder.embedder(PackedTexts.from_token_ids(ids))[0].detach())


def test_fewer_dims_are_cut_and_normalised(encoder: Encoder) -> None:
    small = Encoder(encoder.embedder, encoder.tokenizer, num_dims=16).encode(TEXTS)
    expected = torch.nn.functional.normalize(encoder.encode(TEXTS)[:, :16], dim=-1)
    torch.testing.assert_close(small, expected)
    with pytest.raises(ValueError, match="num_dims: must be between 1 and the model's 192, got 1000"):
        Encoder(encoder.embedder, encoder.tokenizer, num_dims=1000)


def test_similarity_is_the_cosine(encoder: Encoder) -> None:
    vectors = encoder.encode(TEXTS)
    scores = encoder.similarity(3 * vectors, vectors)
    assert scores.shape == (4, 4)
    torch.testing.assert_close(scores.diagonal(), torch.ones(4))


def test_no_texts_give_no_vectors(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 192)


def test_encoding_leaves_a_training_model_in_training(encoder: Encoder) -> None:
    encoder.embedder.train()
    encoder.encode(["alpha"])
    assert encoder.embedder.training
    encoder.embedder.eval()


def test_a_tokenizer_beyond_the_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    create_weights(tmp_path / "small", size="tiny", layout="text-only", precision="bf16", vocab_size=1500, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "tekken.json"):
        (tmp_path / "small" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(LayoutError, match=r"2048.*1500"):
        Encoder.from_pretrained(tmp_path / "small")


def test_pooling_to_many_vectors_is_refused(tmp_path: Path) -> None:
    create_weights(tmp_path / "w", size="tiny", layout="text-only", precision="bf16", vocab_size=1500, seed=0)
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    (tmp_path / "w" / "config.json").write_text(json.dumps({**config, "pooling": "colbert"}))
    with pytest.raises(LayoutError, match=r"config\.json: pooling must be one of avg.*got 'colbert'"):
        Encoder.from_pretrained(tmp_path / "w")


def test_broken_settings_name_the_file(folder: Path, tmp_path: Path) -> None:
    create_weights(tmp_path / "w", size="tiny", layout="text-only", precision="bf16", vocab_size=1500, seed=0)
    (tmp_path / "w" / "modules.json").write_text("{not json")
    with pytest.raises(LayoutError, match=r"modules\.json: not valid JSON"):
        Encoder.from_pretrained(tmp_path / "w")
    (tmp_path / "w" / "modules.json").write_text(json.dumps([{"type": "x.Transformer"}, {"type": "x.Pooling"}]))
    assert not Encoder.from_pretrained(tmp_path / "w").embedder.normalize

"""Tokenized batches from a worker thread, at a position that can be saved."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch

from ostro.data.corpus import document_key
from ostro.data.loader import RetrievalLoader
from ostro.data.options import DataOptions
from ostro.data.retrieval import open_sources
from ostro.data.retrieval_collate import RetrievalBatch
from ostro.errors import DataError
from ostro.models.tokenizer import TextTokenizer
from tests.unit.data.files import data_options, write_beir, write_jsonl, write_pairs


def _loader(options: DataOptions, tokenizer: TextTokenizer, *, rank: int = 0, world_size: int = 1) -> RetrievalLoader:
    return RetrievalLoader(open_sources(options), tokenizer, options, seed=3, rank=rank, world_size=world_size)


def _texts(batch: RetrievalBatch, tokenizer: TextTokenizer) -> list[str]:
    return [tokenizer.fast.decode(ids, skip_special_tokens=True) for ids in batch.token_ids]


def _equal(one: RetrievalBatch, other: RetrievalBatch) -> bool:
    tensors = ("positives", "document_ids", "known_positive_ids")
    plain = ("token_ids", "num_queries", "source", "epoch", "num_samples")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors) and all(
        getattr(one, name) == getattr(other, name) for name in plain
    )


@pytest.fixture
def options(tmp_path: Path) -> DataOptions:
    """Eleven queries, six of them with the same document, and three labelled negatives each."""
    positives = [f"text {0 if i < 6 else i}" for i in range(11)]
    path = write_pairs(tmp_path / "pairs.jsonl", positives, negatives=["bad 0", "bad 1", "bad 2"])
    return data_options(path, num_negatives=2, prompts={"query": "query: ", "document": "passage: "})


def test_a_batch_holds_queries_positives_and_negatives(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [
        {"query": f"q{i}", "pos_doc": {"id": f"d{i}", "text": f"p{i}"}, "neg_doc": {"id": f"n{i}", "text": f"n{i}"}}
        for i in range(3)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prompts = {"query": "ask: ", "document": "doc: "}
    options = data_options(path, num_negatives=5, shuffle=False, prompts=prompts)
    with _loader(options, tokenizer) as loader:
        batch = next(loader)
    assert _texts(batch, tokenizer) == [f"{a}{i}" for a in ("ask: q", "doc: p", "doc: n") for i in range(3)]
    assert {ids[0] for ids in batch.token_ids} == {0}
    assert batch.num_queries == 3
    assert batch.positives.tolist() == [0, 1, 2]
    assert batch.document_ids.tolist() == [document_key(f"{a}{i}") for a in "dn" for i in range(3)]
    assert batch.known_positive_ids.tolist() == [[document_key(f"d{i}")] for i in range(3)]
    assert (batch.source, batch.epoch, batch.num_samples) == (str(path), 0, 3)


def test_known_positives_are_padded(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    folder = write_beir(tmp_path / "a", [("q0", "d0", 1), ("q1", "d1", 1), ("q1", "d0", 2), ("q2", "d2", 1)])
    options = data_options(folder, global_batch_queries=3, shuffle=False)
    with _loader(options, tokenizer) as loader:
        batches = list(itertools.islice(loader, 12))
    widths = {batch.known_positive_ids.shape for batch in batches if len(batch.document_ids) == 3}
    assert widths == {(3, 2)}  # q1 shows d1 beside d0 of q0, never d0 itself
    for batch in batches:
        assert all((row >= -1).all() and (row >= 0).any() for row in batch.known_positive_ids)


def test_long_texts_are_cut_to_their_own_limits(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write_pairs(tmp_path / "a.jsonl", ["x" * 100, "y"])
    with _loader(data_options(path, query_max_tokens=5, document_max_tokens=9), tokenizer) as loader:
        batch = next(loader)
    assert [len(ids) for ids in batch.token_ids[:2]] == [5, 5]
    assert sorted(len(ids) for ids in batch.token_ids[2:]) == [2, 9]


@pytest.mark.parametrize("num_done", [0, 1, 5])
def test_resume_continues_with_the_batch_after_the_last_one_handed_out(
    options: DataOptions, tokenizer: TextTokenizer, num_done: int
) -> None:
    with _loader(options, tokenizer) as loader:
        for _ in range(num_done):
            next(loader)
        state = loader.state_dict()
        expected = list(itertools.islice(loader, 8))
        again = loader.state_dict()
    assert again["num_samples"] == expected[-1].num_samples
    with _loader(options, tokenizer) as resumed:
        next(resumed)
        resumed.load_state_dict(state)
        assert resumed.epoch == state["epoch"]
        assert all(_equal(batch, next(resumed)) for batch in expected)
        assert resumed.state_dict() == again


def test_a_closed_loader_goes_on_where_it_was(options: DataOptions, tokenizer: TextTokenizer) -> None:
    with _loader(options, tokenizer) as loader, _loader(options, tokenizer) as closed:
        for batch in itertools.islice(loader, 5):
            assert _equal(batch, next(closed))
            closed.close()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_global_batches_also_after_a_resume(
    options: DataOptions, tokenizer: TextTokenizer, world_size: int
) -> None:
    with _loader(options, tokenizer) as loader:
        next(loader)
        state = loader.state_dict()
        expected = list(itertools.islice(loader, 4))
    shares = []
    for rank in range(world_size):
        with _loader(options, tokenizer, rank=rank, world_size=world_size) as loader:
            loader.load_state_dict(state)
            shares.append(list(itertools.islice(loader, 4)))
            assert loader.state_dict()["num_samples"] == expected[-1].num_samples
    for whole, *parts in zip(expected, *shares, strict=True):
        sizes = [part.num_queries for part in parts]
        assert sum(sizes) == whole.num_queries
        assert max(sizes) - min(sizes) <= 1
        b = whole.num_queries
        assert [ids for part in parts for ids in part.token_ids[: part.num_queries]] == list(whole.token_ids[:b])
        positives = [part.document_ids[part.positives] for part in parts]
        negatives = [part.document_ids[part.num_queries :] for part in parts]
        assert torch.equal(torch.cat(positives + negatives), whole.document_ids)
        assert torch.equal(torch.cat([part.known_positive_ids for part in parts]), whole.known_positive_ids)
        for part in parts:
            assert len(part.token_ids) == part.num_queries + len(part.document_ids)


def test_a_wrong_row_reaches_the_consumer_and_costs_no_batch(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write_pairs(tmp_path / "a.jsonl", [f"text {i}" for i in range(12)])
    lines = path.read_text().splitlines()
    lines[9] = '{"query": "q", "pos_doc": ""}'
    path.write_text("\n".join(lines))
    with _loader(data_options(path, shuffle=False), tokenizer) as loader:
        assert [next(loader).num_samples, next(loader).num_samples] == [4, 8]
        for _ in range(2):
            with pytest.raises(DataError, match=f"^{path}:10: empty text"):
                next(loader)
        assert loader.state_dict()["num_samples"] == 8


def test_no_thread_is_left(options: DataOptions, tokenizer: TextTokenizer) -> None:
    with _loader(options, tokenizer) as loader:
        next(loader)
        assert any(thread.name.startswith("retrieval-loader") for thread in threading.enumerate())
    assert not any(thread.name.startswith("retrieval-loader") for thread in threading.enumerate())


def test_epochs_are_counted_by_what_was_handed_out(options: DataOptions, tokenizer: TextTokenizer) -> None:
    with _loader(options, tokenizer) as loader:
        assert (loader.num_batches_per_epoch, loader.epoch) == (3, 0)
        epochs = [(next(loader).epoch, loader.epoch) for _ in range(4)]
    assert epochs == [(0, 0), (0, 0), (0, 1), (1, 1)]

"""Batches planned from ids and a seed."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ostro.data.corpus import document_key
from ostro.data.options import DataOptions
from ostro.data.plan import BatchPlan, PlannedBatch
from ostro.data.retrieval import open_sources
from ostro.errors import DataError, RecipeError
from tests.unit.data.files import data_options, write_beir, write_jsonl, write_pairs


def _plan(options: DataOptions, seed: int = 3) -> BatchPlan:
    return BatchPlan(open_sources(options), options, seed=seed)


def _epoch(plan: BatchPlan) -> list[PlannedBatch]:
    return [plan.next_batch() for _ in range(plan.num_batches_per_epoch)]


def _queries(batches: list[PlannedBatch]) -> list[str]:
    return [item.example.query for batch in batches for item in batch.examples]


def _contents(batch: PlannedBatch) -> tuple[Any, ...]:
    items = [(item.example.query, item.document_ids, item.known_positive_keys) for item in batch.examples]
    return batch.source, batch.epoch, batch.num_samples, items


@pytest.fixture
def distinct(tmp_path: Path) -> Path:
    """Ten examples with a document each."""
    return write_pairs(tmp_path / "distinct.jsonl", [f"text {i}" for i in range(10)])


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Forty examples, of which sixteen share one document."""
    return write_pairs(tmp_path / "repeated.jsonl", [f"text {0 if i < 16 else i}" for i in range(40)])


def test_an_epoch_shows_every_example_once_in_a_new_order(distinct: Path) -> None:
    plan = _plan(data_options(distinct))
    epochs = [_epoch(plan) for _ in range(3)]
    assert [[len(batch.examples) for batch in epoch] for epoch in epochs] == [[4, 4, 2]] * 3
    assert [batch.num_samples for batch in epochs[1]] == [14, 18, 20]
    assert [{batch.epoch for batch in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    orders = [_queries(epoch) for epoch in epochs]
    assert all(sorted(order) == [f"query {i}" for i in range(10)] for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert plan.epoch == 3


def test_the_seed_decides_the_order(distinct: Path) -> None:
    options = data_options(distinct)
    assert _queries(_epoch(_plan(options, seed=3))) == _queries(_epoch(_plan(options, seed=3)))
    assert _queries(_epoch(_plan(options, seed=3))) != _queries(_epoch(_plan(options, seed=4)))


def test_without_shuffling_the_file_order_stays(distinct: Path) -> None:
    plan = _plan(data_options(distinct, shuffle=False))
    assert [_queries(_epoch(plan)) for _ in range(2)] == [[f"query {i}" for i in range(10)]] * 2


def test_drop_last(distinct: Path) -> None:
    plan = _plan(data_options(distinct, drop_last=True))
    assert [len(batch.examples) for batch in _epoch(plan)] == [4, 4]
    with pytest.raises(RecipeError, match=r"^data.drop_last: leaves nothing of data.train.0, 10 examples per"):
        _plan(data_options(distinct, drop_last=True, global_batch_queries=11))


def test_weights_are_passes_per_epoch_and_batches_have_one_source(tmp_path: Path, distinct: Path) -> None:
    other = write_pairs(tmp_path / "other.jsonl", [f"other {i}" for i in range(12)])
    plan = _plan(data_options(distinct, other, weights=[2.0, 0.5]))
    first, second = _epoch(plan), _epoch(plan)
    for epoch in (first, second):
        counts = Counter(batch.source for batch in epoch for _ in batch.examples)
        assert counts == {str(distinct): 20, str(other): 6}
        assert [len(batch.examples) for batch in epoch if batch.source == str(other)] == [4, 2]
    assert [batch.source for batch in first] != [batch.source for batch in second]
    halves = [{q for b in epoch if b.source == str(other) for q in _queries([b])} for epoch in (first, second)]
    assert len(halves[0] | halves[1]) == 12


def test_no_document_or_query_twice_and_none_lost(repeated: Path) -> None:
    plan = _plan(data_options(repeated))
    batches = [batch for _ in range(4) for batch in _epoch(plan)]
    for batch in batches:
        keys = [key for item in batch.examples for key in item.document_keys]
        assert len(keys) == len(set(keys)) == 4
    # 16 of 40 examples share a document; it can stand in each of the 40 batches once, which leaves out nobody else.
    counts = Counter(_queries(batches))
    assert sum(counts[f"query {i}"] for i in range(16)) == 40
    assert all(counts[f"query {i}"] >= 3 for i in range(16, 40))
    assert all(counts[f"query {i}"] >= 1 for i in range(16))


def test_rows_of_one_query_do_not_share_a_batch(tmp_path: Path) -> None:
    rows = [{"query": f"query {i // 4}", "pos_doc": f"text {i}"} for i in range(16)]
    plan = _plan(data_options(write_jsonl(tmp_path / "a.jsonl", rows)))
    for _ in range(40):
        queries = _queries([plan.next_batch()])
        assert len(queries) == len(set(queries))


def test_waiting_examples_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    positives = ["same"] * 900 + [f"text {i}" for i in range(100)]
    plan = _plan(data_options(write_pairs(tmp_path / "a.jsonl", positives), num_negatives=0))
    caplog.set_level(logging.INFO, logger="ostro.data.plan")
    _epoch(plan)
    assert len(plan.state_dict()["streams"][0]["waiting"]) == 8 * 4
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "not every query gets a turn" in caplog.text


def test_a_source_with_one_document_gives_short_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = _plan(data_options(write_pairs(tmp_path / "a.jsonl", ["same"] * 7)))
    assert [len(batch.examples) for _ in range(3) for batch in _epoch(plan)] == [1] * 6
    assert "batches stay short, the first with 1 of 4 queries" in caplog.text


def test_positives_and_negatives_are_drawn_anew(tmp_path: Path) -> None:
    rows = [
        {"query": f"q{i}", "pos_doc": [f"p{i}{j}" for j in range(3)], "neg_doc": [f"n{i}{j}" for j in range(6)]}
        for i in range(4)
    ]
    plan = _plan(data_options(write_jsonl(tmp_path / "a.jsonl", rows), num_negatives=2))
    shown: dict[str, list[str]] = {f"q{i}": [] for i in range(4)}
    for _ in range(60):
        for item in plan.next_batch().examples:
            texts = [item.example.documents[document_id] for document_id in item.document_ids]
            assert [text[0] for text in texts] == ["p", "n", "n"]
            assert len(set(texts)) == 3
            shown[item.example.query] += texts
    for number, texts in enumerate(shown.values()):
        counts = Counter(texts)
        assert set(counts) == {f"p{number}{j}" for j in range(3)} | {f"n{number}{j}" for j in range(6)}
        assert min(counts.values()) >= 8  # of 60; 20 expected
    # each query has draws of its own: the numbers drawn do not run in step
    assert len({tuple(text[2] for text in texts) for texts in shown.values()}) == 4


def test_known_positives_are_never_negatives_and_are_listed_where_they_are_in_the_batch(tmp_path: Path) -> None:
    # every query has two positives, one of which the next query has too; labelled negatives are all documents
    qrels = [(f"q{i}", f"d{j}", 1) for i in range(4) for j in (i, (i + 1) % 4)]
    qrels += [(f"q{i}", f"d{j}", 0) for i in range(4) for j in range(10) if j not in (i, (i + 1) % 4)]
    folder = write_beir(tmp_path / "a", qrels, num_documents=10)
    plan = _plan(data_options(folder, num_negatives=1))
    known_of_others = 0
    for _ in range(40):
        batch = plan.next_batch()
        in_batch = {key for item in batch.examples for key in item.document_keys}
        assert len(in_batch) == sum(len(item.document_keys) for item in batch.examples)
        for item in batch.examples:
            assert not set(item.document_ids[1:]) & set(item.example.positive_ids)
            known = {document_key(document_id) for document_id in item.example.positive_ids} & in_batch
            assert set(item.known_positive_keys) == known
            known_of_others += len(known) - 1
    assert known_of_others > 20


@pytest.mark.parametrize("num_done", [0, 1, 6, 13, 30])
def test_a_saved_position_continues_exactly(tmp_path: Path, repeated: Path, distinct: Path, num_done: int) -> None:
    rows = [{"query": f"q{i}", "pos_doc": [f"p{i}", f"r{i}"], "neg_doc": ["a", "b", "c"]} for i in range(9)]
    options = data_options(
        repeated,
        distinct,
        write_jsonl(tmp_path / "b.jsonl", rows),
        weights=[1, 0.7, 2],
        num_negatives=1,
    )
    plan = _plan(options)
    for _ in range(num_done):
        plan.next_batch()
    state = json.loads(json.dumps(plan.state_dict()))
    expected = [_contents(plan.next_batch()) for _ in range(40)]
    resumed = _plan(options)
    for _ in range(5):
        resumed.next_batch()
    resumed.load_state_dict(state)
    assert [_contents(resumed.next_batch()) for _ in range(40)] == expected
    assert num_done < 13 or state["streams"][0]["waiting"]


@pytest.mark.parametrize(
    ("settings", "seed", "message"),
    [
        ({}, 4, "seed: the saved position was made with 3, got 4"),
        ({"global_batch_queries": 5}, 3, "data.global_batch_queries: .* made with 4, got 5"),
        ({"weights": [2.0]}, 3, "data.train: .*'10 examples, 10 per epoch'.*'10 examples, 20 per epoch'"),
        ({"shuffle": False}, 3, "data.shuffle: "),
    ],
)
def test_a_position_of_another_run_is_refused(
    distinct: Path, settings: dict[str, Any], seed: int, message: str
) -> None:
    state = _plan(data_options(distinct)).state_dict()
    with pytest.raises(DataError, match=f"^{message}"):
        _plan(data_options(distinct, **settings), seed=seed).load_state_dict(state)

"""Evaluation shared out over ranks: the report of one process, on every rank, and an error that is told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ostro.errors import OstroError, ToldElsewhere
from ostro.inference.chat import Chat
from ostro.inference.encoder import Encoder
from ostro.retrieval.options import EvaluateOptions
from ostro.train import vlm, vlm_result
from ostro.train.answers import AnswerReport, evaluate_answers, open_held_out
from ostro.train.judges import Judges
from ostro.train.options import AnswerOptions
from ostro.train.ranks import Ranks
from ostro.train.embed_result import search
from ostro.train.shared import SharedEncoder
from tests.helpers import runs, vlm_runs
from tests.helpers.ranks import RankPool
from tests.unit.data.files import write_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`embed/` and `vlm/`, each with weights and data."""
    folder = tmp_path_factory.mktemp("shared")
    runs.make_inputs(folder / "embed")
    vlm_runs.make_inputs(folder / "vlm")
    return folder


def _options(inputs: Path, **settings: Any) -> EvaluateOptions:
    block = runs.recipe(inputs / "embed", inputs / "run").test
    assert block is not None
    return block.model_copy(update=settings)


def _encoder(inputs: Path) -> Encoder:
    return Encoder.from_pretrained(inputs / "embed" / "weights", dtype=torch.float32, device="cpu")


def _search(group: dist.ProcessGroup | None, inputs: Path) -> tuple[dict[str, float], torch.Tensor]:
    encoder, judges = _encoder(inputs), Judges(Ranks.current(), Ranks.current())
    shared = SharedEncoder(encoder, judges).encode_document(["one", "two words", "three"])
    return dict(search(_options(inputs), encoder, judges).metrics), shared


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_search_is_that_of_one_process(ranks: RankPool, inputs: Path, num_ranks: int) -> None:
    encoder = _encoder(inputs)
    alone = search(_options(inputs), encoder, Judges())
    vectors = encoder.encode_document(["one", "two words", "three"])  # fewer than four ranks
    for metrics, shared in ranks.run(_search, inputs, world_size=num_ranks):
        assert metrics == alone.metrics
        torch.testing.assert_close(shared, vectors, atol=1e-6, rtol=0)


def _fail(group: dist.ProcessGroup | None, inputs: Path) -> str:
    try:
        search(_options(inputs, ks=(10_000,)), _encoder(inputs), Judges(Ranks.current(), Ranks.current()))
    except ToldElsewhere:
        return "silent"
    except OstroError as error:
        return str(error)
    return "no error"


def test_an_error_is_told_by_one_rank(ranks: RankPool, inputs: Path) -> None:
    told, silent = ranks.run(_fail, inputs)
    assert told.startswith("ks: ")
    assert silent == "silent"


def _answer(group: dist.ProcessGroup | None, inputs: Path) -> AnswerReport:
    recipe = vlm_runs.recipe(inputs / "vlm", inputs / "run")
    model, encoder = vlm.build_model(recipe)
    assert recipe.test is not None
    judges = Judges(Ranks.current(), Ranks.current())
    return evaluate_answers(Chat(model, encoder), open_held_out(recipe.test, "test"), recipe.test, judges)


def test_answers_are_those_of_one_process(ranks: RankPool, inputs: Path) -> None:
    alone = _answer(None, inputs)
    for report in ranks.run(_answer, inputs):
        assert report.answers == alone.answers
        assert report.conversations == alone.conversations
        assert report.loss == pytest.approx(alone.loss, rel=1e-5)


def _unreadable(group: dist.ProcessGroup | None, inputs: Path, path: Path) -> str:
    recipe = vlm_runs.recipe(inputs / "vlm", inputs / "run")
    model, encoder = vlm.build_model(recipe)
    judges = Judges(Ranks.current(), Ranks.current())
    options = AnswerOptions(path=str(path), max_new_tokens=2)
    try:
        vlm_result.answer_test(options, Chat(model, encoder), judges)
    except OstroError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_picture_that_one_rank_cannot_read_is_told_by_that_rank(ranks: RankPool, inputs: Path) -> None:
    data = inputs / "vlm" / "data"
    rows = [vlm_runs.picture_row(data, 400 + number, "red") for number in range(2)]
    write_jsonl(data / "unreadable.jsonl", rows)
    (data / "images" / "401.png").write_bytes(b"no picture")
    silent, told = ranks.run(_unreadable, inputs, data / "unreadable.jsonl")
    assert silent == "ToldElsewhere: rank 1 failed and tells why"
    assert told.startswith("DataError: ")
    assert "401.png" in told


def test_shares_come_back_in_order() -> None:
    items = [*range(7)]
    three = [Ranks(rank, 3) for rank in range(3)]
    assert [list(ranks.share_of(items)) for ranks in three] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks().gather_shares(items) == items

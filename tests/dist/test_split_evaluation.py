"""Evaluation of a model that ranks hold in parts, between steps: what one process gives, and steps that it leaves as
they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ostro.inference.chat import Chat
from ostro.parallel.mesh import build_mesh
from ostro.parallel.options import ParallelOptions
from ostro.train import embed, embed_result, vlm, vlm_result
from ostro.train.answers import AnswerReport
from ostro.train.options import AnswerOptions
from ostro.train.ranks import Ranks
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from ostro.train.shared import SharedEncoder
from ostro.train.split_chat import SplitChat
from tests.dist.test_data_parallel import embed_recipe, vlm_recipe
from tests.dist.test_pipeline import with_four_layers
from tests.helpers import runs, vlm_runs
from tests.helpers.ranks import RankPool
from tests.unit.data.files import write_jsonl

TEXTS = ["one", "two words", "three of them here", "four", "five"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`embed/` and `vlm/`; five held-out conversations, so that the last of two ranks has fewer, and no pictures."""
    folder = tmp_path_factory.mktemp("split")
    runs.make_inputs(folder / "embed")
    vlm_runs.make_inputs(folder / "vlm")
    with_four_layers(folder / "vlm" / "weights", folder / "vlm" / "four")
    data = folder / "vlm" / "data"
    pictures = [vlm_runs.picture_row(data, 300 + number, colour) for number, colour in enumerate(vlm_runs.COLOURS)]
    texts = [vlm_runs.text_row(number) for number in range(2)]
    write_jsonl(data / "held_out.jsonl", [pictures[0], texts[0], pictures[1], texts[1], pictures[2]])
    return folder


def laid_out(recipe: Any, sizes: dict[str, int]) -> Any:
    return recipe.model_copy(update={"parallel": ParallelOptions(**{"dp_replicate": 1, **sizes})})


def _search(
    group: dist.ProcessGroup | None, recipe: EmbedRecipe
) -> tuple[list[dict[str, float]], list[dict[str, float]], torch.Tensor]:
    mesh = build_mesh(recipe.parallel, Ranks.current().world_size, "cpu")
    embedder, tokenizer = embed.build_embedder(recipe, mesh)
    trainer = embed.EmbedTrainer(recipe, embedder, embed.open_loader(recipe, tokenizer, mesh), mesh)
    encoder = embed_result.run_encoder(recipe, embedder, tokenizer)
    encoder.micro_batch_tokens = 6  # the texts of one rank are then one pass more
    rows, found = [], []
    for _ in range(2):
        rows.append(trainer.train_step())
        found.append(dict(trainer.judge(lambda: embed_result.search(recipe.test, encoder, trainer.judges)).metrics))
    return rows, found, SharedEncoder(encoder, trainer.judges).encode_document(TEXTS)


@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "dp_shard": 2}])
def test_a_search_is_that_of_one_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    recipe = embed_recipe(inputs, tmp_path)
    rows, found, vectors = _search(None, recipe)
    world_size = 4 if len(sizes) > 1 else 2
    for rank_rows, rank_found, rank_vectors in ranks.run(_search, laid_out(recipe, sizes), world_size=world_size):
        torch.testing.assert_close(rank_vectors, vectors, rtol=0, atol=1e-5)
        assert rank_found == found
        for row, rank_row in zip(rows, rank_rows, strict=True):
            assert rank_row == pytest.approx(row, rel=5e-5)


def _answers(
    group: dist.ProcessGroup | None, recipe: VlmRecipe, options: AnswerOptions
) -> tuple[list[dict[str, float]], list[AnswerReport]]:
    mesh = build_mesh(recipe.parallel, Ranks.current().world_size, "cpu")
    model, encoder = vlm.build_model(recipe, mesh)
    trainer = vlm.VlmTrainer(recipe, model, vlm.open_loader(recipe, encoder, mesh), mesh)
    chat = SplitChat(model, encoder, trainer.judges) if mesh.splits_model else Chat(model, encoder)
    rows, reports = [], []
    for _ in range(2):
        rows.append(trainer.train_step())
        reports.append(trainer.judge(lambda: vlm_result.answer_test(options, chat, trainer.judges)))
    return rows, reports


@pytest.mark.parametrize(
    "sizes",
    [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"pp": 2, "dp_shard": 2}, {"pp": 2, "tp": 2}, {"pp": 2, "dp_replicate": 2}, {"pp": 2, "schedule": "interleaved", "stages_per_rank": 2}],
)
def test_answers_are_those_of_one_process(
    ranks: RankPool, inputs: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    """Those of transformers' own decoding."""
    weights = "four" if "schedule" in sizes else "weights"
    recipe = vlm_recipe(inputs, tmp_path, model={"weights": str(inputs / "vlm" / weights), "dtype": "float32"})
    path = inputs / "vlm" / "data" / "held_out.jsonl"
    options = AnswerOptions(path=str(path), max_new_tokens=5, batch_samples=2)
    rows, reports = _answers(None, recipe, options)
    world_size = 4 if len(sizes) == 2 else 2
    for rank_rows, rank_reports in ranks.run(_answers, laid_out(recipe, sizes), options, world_size=world_size):
        for report, rank_report in zip(reports, rank_reports, strict=True):
            assert rank_report.answers == report.answers
            assert rank_report.loss == pytest.approx(report.loss, rel=1e-5)
        for row, rank_row in zip(rows, rank_rows, strict=True):
            assert rank_row == pytest.approx(row, rel=5e-5)

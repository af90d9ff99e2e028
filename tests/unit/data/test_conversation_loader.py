"""Steps of packed conversations from a worker thread, at a position that is one number."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from ostro.config import Options, load_recipe
from ostro.data.conversation import open_conversations
from ostro.data.conversation_collate import ConversationBatch, collate
from ostro.data.conversation_loader import ConversationLoader, ConversationStep
from ostro.data.conversation_options import ConversationDataOptions
from ostro.data.conversation_tokens import NOTHING, ConversationEncoder
from ostro.errors import DataError, RecipeError
from tests.unit.data.conversation_files import (
    IMAGE_TOKENS,
    conversation_options,
    image_row,
    picture,
    write_conversations,
    write_tekken,
)
from tests.unit.data.files import write_jsonl

EOS, IMG = 2, 10
SIZES = [(32, 16), None, (16, 16), (64, 48), None, (20, 30), (32, 32), None, (16, 64), (64, 16), None]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ConversationEncoder:
    return ConversationEncoder(write_tekken(tmp_path_factory.mktemp("tekken"), "v13"), IMAGE_TOKENS, max_tokens=64)


@pytest.fixture
def options(tmp_path: Path) -> ConversationDataOptions:
    return conversation_options(write_conversations(tmp_path, SIZES))


def _loader(options: ConversationDataOptions, encoder: ConversationEncoder, **ranks: Any) -> ConversationLoader:
    return ConversationLoader(open_conversations(options.train), encoder, options, seed=3, **ranks)


def _samples(batch: ConversationBatch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation of a batch."""
    ids, labels = batch.input_ids.split(list(batch.lengths)), batch.labels.split(list(batch.lengths))
    return [(one.tolist(), other.tolist()) for one, other in zip(ids, labels, strict=True)]


def _answers(step: ConversationStep, encoder: ConversationEncoder) -> list[int]:
    """Numbers of the rows of a step, which their answers say."""
    supervised = [batch.labels[batch.labels != NOTHING] for batch in step.micro_batches]
    text = encoder._template.tokenizer._to_string(torch.cat(supervised).tolist())
    return [int(answer.removeprefix("answer ")) for answer in text.split("</s>")[:-1]]


def _equal(one: ConversationStep, other: ConversationStep) -> bool:
    def tensors(batch: ConversationBatch) -> list[torch.Tensor | None]:
        return [batch.input_ids, batch.labels, batch.pixel_values, batch.image_sizes]

    def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    plain = ("num_supervised", "num_tokens", "num_images", "epoch", "num_samples")
    return (
        all(getattr(one, name) == getattr(other, name) for name in plain)
        and len(one.micro_batches) == len(other.micro_batches)
        and all(
            a.lengths == b.lengths and all(map(same, tensors(a), tensors(b)))
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
        )
    )


def test_a_batch_is_its_conversations_laid_end_to_end(tmp_path: Path, encoder: ConversationEncoder) -> None:
    source = open_conversations(conversation_options(write_conversations(tmp_path, SIZES[:4])).train)[0]
    encoded = [encoder.encode(conversation) for conversation in source]
    batch = collate(encoded)
    assert _samples(batch) == [(item.token_ids, item.labels) for item in encoded]
    lengths = [len(item.token_ids) for item in encoded]
    assert batch.lengths == tuple(lengths)
    assert batch.num_supervised == int((batch.labels != NOTHING).sum())
    assert (batch.num_tokens, batch.num_images) == (sum(lengths), 3)

    merged = IMAGE_TOKENS.merged_patch_size
    processor = PixtralImageProcessorPil(patch_size={"height": merged, "width": merged}, size={"longest_edge": 64})
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES[:4]) if size is not None]
    expected = processor(pictures, return_tensors="pt")
    assert batch.pixel_values is not None
    assert batch.image_sizes is not None
    assert torch.equal(batch.pixel_values, expected["pixel_values"])
    assert torch.equal(batch.image_sizes, torch.as_tensor(np.asarray(expected["image_sizes"])))
    patches = batch.image_sizes.div(merged, rounding_mode="floor").prod(1)
    assert int((batch.input_ids == IMG).sum()) == int(patches.sum())


def test_a_batch_without_images_has_no_pixels(tmp_path: Path, encoder: ConversationEncoder) -> None:
    options = conversation_options(write_conversations(tmp_path, [None, None]), global_batch_samples=2)
    with _loader(options, encoder) as loader:
        step = next(loader)
    (batch,) = step.micro_batches
    assert batch.pixel_values is None
    assert batch.image_sizes is None
    assert (batch.num_images, step.num_images) == (0, 0)
    assert batch.to("cpu").lengths == batch.lengths


def test_a_step_is_cut_into_micro_batches_longest_first(
    options: ConversationDataOptions, encoder: ConversationEncoder
) -> None:
    with _loader(options.model_copy(update={"global_batch_samples": 11}), encoder) as loader:
        step = next(loader)
    assert len(step.micro_batches) > 2
    assert all(batch.num_tokens <= options.micro_batch_tokens for batch in step.micro_batches)
    lengths = [length for batch in step.micro_batches for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(_answers(step, encoder)) == list(range(11))
    assert step.num_tokens == sum(lengths)
    assert step.num_images == sum(batch.num_images for batch in step.micro_batches) == 7
    assert step.num_supervised == sum(int((batch.labels != NOTHING).sum()) for batch in step.micro_batches)


def test_every_step_is_full_and_every_row_comes_once_per_epoch(
    options: ConversationDataOptions, encoder: ConversationEncoder
) -> None:
    with _loader(options, encoder) as loader:
        assert (loader.num_samples_per_epoch, loader.num_steps_per_epoch, loader.epoch) == (11, 3, 0)
        steps = [next(loader) for _ in range(11)]
        assert loader.epoch == 4
    assert [step.num_samples for step in steps] == list(range(4, 48, 4))
    assert [step.epoch for step in steps] == [first // 11 for first in range(0, 44, 4)]
    answers = [sorted(_answers(step, encoder)) for step in steps]
    assert all(len(rows) == 4 for rows in answers)
    assert Counter(itertools.chain.from_iterable(answers)) == Counter(dict.fromkeys(range(11), 4))
    with _loader(options.model_copy(update={"global_batch_samples": 11}), encoder) as loader:
        epochs = [_answers(next(loader), encoder) for _ in range(3)]
    assert all(sorted(rows) == list(range(11)) for rows in epochs)


def test_without_shuffling_the_order_is_that_of_the_files(tmp_path: Path, encoder: ConversationEncoder) -> None:
    path = write_conversations(tmp_path, [None] * 5)
    options = conversation_options(path, shuffle=False, global_batch_samples=1)
    with _loader(options, encoder) as loader:
        assert [_answers(next(loader), encoder) for _ in range(7)] == [[0], [1], [2], [3], [4], [0], [1]]


def test_sources_are_mixed_by_weight(tmp_path: Path, encoder: ConversationEncoder) -> None:
    paths = []
    for number, rows in enumerate([range(6), range(100, 104), range(200, 207)]):
        paths.append(write_jsonl(tmp_path / f"{number}.jsonl", (image_row(row, None) for row in rows)))
    options = conversation_options(*paths, weights=[0.5, 2.0, 1.0], global_batch_samples=18)
    with _loader(options, encoder) as loader:
        assert loader.num_samples_per_epoch == 3 + 8 + 7
        epochs = [Counter(_answers(next(loader), encoder)) for _ in range(2)]
    for epoch in epochs:
        assert sum(count for row, count in epoch.items() if row < 100) == 3
        assert {epoch[row] for row in range(100, 104)} == {2}
        assert {epoch[row] for row in range(200, 207)} == {1}
    # the second half of the first source follows the first half
    assert {row for epoch in epochs for row in epoch if row < 100} == set(range(6))


@pytest.mark.parametrize("num_done", [0, 1, 5])
def test_resume_continues_with_the_step_after_the_last_one_handed_out(
    options: ConversationDataOptions, encoder: ConversationEncoder, num_done: int
) -> None:
    with _loader(options, encoder) as loader:
        for _ in range(num_done):
            next(loader)
        state = loader.state_dict()
        expected = list(itertools.islice(loader, 6))
        again = loader.state_dict()
    assert (state["num_samples"], again["num_samples"]) == (4 * num_done, expected[-1].num_samples)
    with _loader(options, encoder) as resumed:
        next(resumed)
        resumed.load_state_dict(state)
        assert resumed.epoch == 4 * num_done // 11
        assert all(_equal(step, next(resumed)) for step in expected)
        assert resumed.state_dict() == again


def test_a_closed_loader_goes_on_where_it_was(options: ConversationDataOptions, encoder: ConversationEncoder) -> None:
    with _loader(options, encoder) as loader, _loader(options, encoder) as closed:
        for step in itertools.islice(loader, 5):
            assert _equal(step, next(closed))
            closed.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_samples": 5}, "data.global_batch_samples: the saved position was made with 4, got 5"),
        ({"shuffle": False}, "data.shuffle: the saved position was made with True, got False"),
        ({"weights": [2.0]}, "data.train: the saved position was made with .*11 rows, 11 per epoch.*, got .*22 per"),
    ],
)
def test_a_position_of_another_run_is_refused(
    tmp_path: Path, encoder: ConversationEncoder, change: dict[str, Any], message: str
) -> None:
    path = write_conversations(tmp_path, SIZES)
    state = _loader(conversation_options(path), encoder).state_dict()
    other = _loader(conversation_options(path, **change), encoder)
    with pytest.raises(DataError, match=f"^{message}.*; resume with what it was"):
        other.load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_steps_also_after_a_resume(
    options: ConversationDataOptions, encoder: ConversationEncoder, world_size: int
) -> None:
    with _loader(options, encoder) as loader:
        next(loader)
        state = loader.state_dict()
        whole = list(itertools.islice(loader, 3))
    shares = []
    for rank in range(world_size):
        with _loader(options, encoder, rank=rank, world_size=world_size) as loader:
            loader.load_state_dict(state)
            shares.append(list(itertools.islice(loader, 3)))
            assert loader.state_dict()["num_samples"] == whole[-1].num_samples
    for step, *parts in zip(whole, *shares, strict=True):
        assert sorted(row for part in parts for row in _answers(part, encoder)) == sorted(_answers(step, encoder))
        assert step.num_supervised == sum(part.num_supervised for part in parts)
        assert step.num_tokens == sum(part.num_tokens for part in parts)
        assert all(part.micro_batches for part in parts)


def test_more_ranks_than_conversations_are_refused(
    options: ConversationDataOptions, encoder: ConversationEncoder
) -> None:
    message = "^data.global_batch_samples: must be at least the number of ranks that share it, 5, got 4"
    with pytest.raises(RecipeError, match=message):
        _loader(options, encoder, rank=0, world_size=5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "ends with the turn of role user"),
        ({"text": "a"}, "expected a column messages"),
        (image_row(99), "image .*99.png: no such file"),
        (image_row(0, None, answer="word " * 100), "has [0-9]+ tokens, more than data.max_tokens, 64"),
    ],
)
def test_a_wrong_row_reaches_the_consumer_and_costs_no_step(
    tmp_path: Path, encoder: ConversationEncoder, row: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*(image_row(i, None) for i in range(8)), row])
    options = conversation_options(path, shuffle=False)
    with _loader(options, encoder) as loader:
        assert [next(loader).num_samples, next(loader).num_samples] == [4, 8]
        for _ in range(2):
            with pytest.raises(DataError, match=f"^{path}:9: {message}"):
                next(loader)
        assert loader.state_dict()["num_samples"] == 8


def test_no_thread_is_left(options: ConversationDataOptions, encoder: ConversationEncoder) -> None:
    with _loader(options, encoder) as loader:
        next(loader)
        assert any(thread.name.startswith("conversation-loader") for thread in threading.enumerate())
    assert not any(thread.name.startswith("conversation-") for thread in threading.enumerate())


class _Recipe(Options):
    kind: Literal["toy"]
    data: ConversationDataOptions


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("micro_batch_tokens=512", "data.micro_batch_tokens: a micro-batch of 512 tokens does not hold .* 4096; raise"),
        ("max_tokens=10000", "data: a micro-batch of 8192 tokens does not hold a conversation of max_tokens, 10000"),
        ("too_long=cut", "data.too_long: must be 'refuse' or 'truncate', got \"cut\""),
        ("train.0.format=llava", "data.train.0.format: must be 'auto', 'messages' or 'sharegpt'"),
        ("train=[]", "data.train: must have at least 1 entries"),
    ],
)
def test_bad_options_are_refused_by_their_key(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "toy.yaml").write_text("kind: toy\ndata: {train: [{path: a.jsonl}]}\n")
    assert load_recipe(tmp_path / "toy.yaml", [], {"toy": _Recipe}).data.global_batch_samples == 32
    with pytest.raises(RecipeError, match=f"^{message}"):
        load_recipe(tmp_path / "toy.yaml", [f"data.{override}"], {"toy": _Recipe})


def test_a_pipeline_gets_the_number_of_micro_batches_it_takes(
    options: ConversationDataOptions, encoder: ConversationEncoder
) -> None:
    asked: list[int] = []

    def fit(number: int) -> int:
        asked.append(number)
        return number + 2

    with _loader(options, encoder, fit=fit) as loader:
        step = next(loader)
    samples = sum(len(batch.lengths) for batch in step.micro_batches)
    assert samples == options.global_batch_samples
    assert len(step.micro_batches) == min(asked[0] + 2, samples)

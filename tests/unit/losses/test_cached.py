"""The two-pass form on a real tiny Ministral-3: loss, every gradient and the random state equal the plain form."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import Ministral3Model

from ostro.losses import cached
from ostro.losses.cached import cached_backward
from ostro.losses.contrastive import ContrastiveOutput, ContrastiveTargets, LearnedTemperature, contrastive_loss
from ostro.losses.options import ContrastiveOptions
from ostro.models.embedder import Embedder
from ostro.models.packed import PackedTexts
from tests.helpers.tiny import text_config, token_ids

LENGTHS = [5, 9, 3, 3, 7, 20, 1, 4, 6, 2, 11, 8]
NUM_QUERIES = 5
ONE_GROUP = [list(range(len(LENGTHS)))]
PARTITIONS = {
    "pairs": [[10, 5], [1, 11], [4, 8], [0, 7], [3, 2], [9, 6]],
    "uneven": [[5], [10, 1, 11, 4, 8, 0], [7, 3, 2, 9, 6]],
    "singles": [[i] for i in range(len(LENGTHS))],
}


class Batch:
    """A tiny model in training mode, a learned temperature, and 5 queries with 7 documents."""

    def __init__(self, *, dropout: float) -> None:
        torch.manual_seed(0)
        backbone = Ministral3Model(text_config(is_causal=False, attention_dropout=dropout))
        self.embedder = Embedder(backbone).train()
        self.temperature = LearnedTemperature(0.1)
        self.token_ids = token_ids(LENGTHS)
        documents = torch.arange(len(LENGTHS) - NUM_QUERIES)
        self.targets = ContrastiveTargets(documents[:NUM_QUERIES], documents, documents[:NUM_QUERIES, None])
        self.loss_calls = 0

    def texts(self, rows: list[list[int]]) -> list[PackedTexts]:
        return [PackedTexts.from_token_ids([self.token_ids[row] for row in group]) for group in rows]

    def loss(self, embeddings: torch.Tensor) -> ContrastiveOutput:
        self.loss_calls += 1
        query, document = embeddings[:NUM_QUERIES], embeddings[NUM_QUERIES:]
        options = ContrastiveOptions(symmetric=True, matryoshka_dims=(8,))
        return contrastive_loss(query, document, self.targets, temperature=self.temperature(), options=options)

    def gradients(self) -> dict[str, torch.Tensor]:
        parameters = [*self.embedder.named_parameters(), *self.temperature.named_parameters()]
        return {name: parameter.grad for name, parameter in parameters}


def plain(rows: list[list[int]], *, dropout: float) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and the next random number of the plain form: one graph over all texts."""
    batch = Batch(dropout=dropout)
    embeddings = torch.cat([batch.embedder(texts) for texts in batch.texts(rows)])
    order = torch.tensor([row for group in rows for row in group])
    loss = batch.loss(torch.zeros_like(embeddings).index_copy(0, order, embeddings)).loss
    loss.backward()
    return loss.detach(), batch.gradients(), torch.rand(())


def two_pass(rows: list[list[int]], *, dropout: float) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """The same values of `cached_backward`."""
    batch = Batch(dropout=dropout)
    output = cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss)
    assert batch.loss_calls == 1
    assert not output.loss.requires_grad
    return output.loss, batch.gradients(), torch.rand(())


@pytest.mark.parametrize("rows", [ONE_GROUP, *PARTITIONS.values()], ids=["one", *PARTITIONS])
def test_equals_the_plain_form_with_dropout(rows: list[list[int]]) -> None:
    expected, actual = plain(rows, dropout=0.3), two_pass(rows, dropout=0.3)
    assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
    # float32: the gradients of micro-batches are added in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_without_replay_the_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PARTITIONS["uneven"]
    _, expected, _ = plain(rows, dropout=0.3)
    monkeypatch.setattr(cached, "_set_random_state", lambda state: None)
    _, actual, _ = two_pass(rows, dropout=0.3)
    error = max(((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)
    assert error > 0.05


def test_any_partition_gives_the_same_gradients() -> None:
    loss, expected, _ = plain(ONE_GROUP, dropout=0.0)
    shuffled = random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS))
    for rows in [*PARTITIONS.values(), ONE_GROUP, [shuffled], [shuffled[:4], shuffled[4:]]]:
        actual_loss, actual, _ = two_pass(rows, dropout=0.0)
        torch.testing.assert_close(actual_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradients_add_to_those_already_there() -> None:
    batch = Batch(dropout=0.0)
    rows = PARTITIONS["pairs"]
    cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss)
    once = {name: gradient.clone() for name, gradient in batch.gradients().items()}
    cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss)
    twice = {name: 2 * gradient for name, gradient in once.items()}
    torch.testing.assert_close(batch.gradients(), twice, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["uneven", "one"])
def test_a_replay_takes_the_place_of_the_second_pass(name: str) -> None:
    plain, batch = Batch(dropout=0.0), Batch(dropout=0.0)
    rows = {"one": ONE_GROUP, **PARTITIONS}[name]
    texts = batch.texts(rows)
    expected = cached_backward(plain.embedder, plain.texts(rows), rows, plain.loss)

    def replay(gradients: Sequence[torch.Tensor]) -> None:
        for packed, gradient in zip(texts, gradients, strict=True):
            batch.embedder(packed).backward(gradient)

    def encode(packed: PackedTexts) -> torch.Tensor:
        with torch.no_grad():
            return batch.embedder(packed)

    output = cached_backward(encode, texts, rows, batch.loss, replay=replay)
    assert output.loss == expected.loss
    torch.testing.assert_close(batch.gradients(), plain.gradients(), rtol=1e-5, atol=1e-7)


def test_one_micro_batch_is_encoded_once() -> None:
    for rows, num_encodings in [(ONE_GROUP, 1), (PARTITIONS["uneven"], 6)]:
        batch = Batch(dropout=0.0)
        calls: list[object] = []
        batch.embedder.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(module))
        cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss)
        assert len(calls) == num_encodings


def kept_for_backward(run: Callable[[], object]) -> int:
    """Peak bytes that autograd holds during `run`."""
    kept, peak = 0, 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal kept, peak
            self.tensor = tensor.detach()
            kept += tensor.nbytes
            peak = max(peak, kept)

        def __del__(self) -> None:
            nonlocal kept
            kept -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda held: held.tensor):
        run()
    return peak


def test_memory_is_that_of_the_largest_micro_batch() -> None:
    batch = Batch(dropout=0.0)
    rows = PARTITIONS["singles"]
    largest = kept_for_backward(lambda: batch.embedder(batch.texts([[5]])[0]))
    whole = kept_for_backward(lambda: batch.loss(torch.cat([batch.embedder(texts) for texts in batch.texts(rows)])))
    two_passes = kept_for_backward(lambda: cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss))
    assert two_passes <= largest
    assert two_passes < whole / 3


def test_under_autocast_every_parameter_gets_its_gradient() -> None:
    batch = Batch(dropout=0.0)
    rows = PARTITIONS["uneven"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in batch.gradients().values())


@pytest.mark.parametrize("rows", [[], [[0, 1], [1]], [[0], [2]]])
def test_rows_that_are_no_permutation_are_refused(rows: list[list[int]]) -> None:
    batch = Batch(dropout=0.0)
    with pytest.raises(ValueError, match="rows: must hold each of 0"):
        cached_backward(batch.embedder, batch.texts(rows), rows, batch.loss)

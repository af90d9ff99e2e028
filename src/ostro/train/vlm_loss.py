"""The loss of packed conversations: what a training step differentiates, and what held-out conversations are scored by.

Batches are left to `data`, the head's product and its gradient to `losses.linear_ce`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from ostro.data.conversation_collate import ConversationBatch, blank_batch, collate, filled, with_blank
from ostro.data.conversation_tokens import EncodedConversation
from ostro.data.images import ImageTokens
from ostro.losses.linear_ce import fused_linear_cross_entropy, get_final_hidden_states
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import PackedTexts, fill_up, micro_batches, packed_rows
from ostro.parallel.pipeline import Stage, pass_through
from ostro.train.judges import Judges
from ostro.train.ranks import Ranks


def packed_loss(
    model: Mistral3FP8VLMForConditionalGeneration,
    batch: ConversationBatch,
    num_supervised: int,
    received: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens of a batch, divided by `num_supervised`.

    Equal to running each sample by itself; the logits are never held whole.

    Args:
        model: With packed attention; its head whole, or split by rows of the vocabulary.
        batch: On the model's device.
        num_supervised: Supervised tokens of the whole step, over all its batches and ranks, >= 1.
        received: As for `packed_states`.

    Returns:
        0-d float32, with gradient where it is enabled.

    Distributed: with a split model, its collectives and those of `fused_linear_cross_entropy` over the ranks that split
        the head; all of them pass the same batch and get the same loss.
    """
    hidden_states = packed_states(model, batch, received)[0, : batch.num_tokens]
    weight: torch.Tensor = model.lm_head.weight
    rows = weight.to_local() if isinstance(weight, DTensor) else weight
    group = weight.device_mesh.get_group() if isinstance(weight, DTensor) else None
    return fused_linear_cross_entropy(hidden_states, rows, batch.labels, num_tokens=num_supervised, vocab_group=group)


def packed_states(
    model: Mistral3FP8VLMForConditionalGeneration, batch: ConversationBatch, received: torch.Tensor | None = None
) -> torch.Tensor:
    """The final hidden states of a batch; of a pipeline stage, those after its layers.

    Args:
        model: With packed attention.
        batch: On the model's device.
        received: `[1, T, H]` hidden states of the stage before, in place of tokens and images.

    Returns:
        `[1, T', H]`, T' >= T where the batch was filled up to a round number of rows.
    """
    texts = PackedTexts(batch.input_ids, batch.lengths)
    if texts.input_ids.device.type == "cpu" and model.dtype != torch.float32:
        texts = fill_up(texts)
    is_first = received is None
    output = model(
        input_ids=texts.input_ids[None] if is_first else None,
        pixel_values=batch.pixel_values if is_first else None,
        image_sizes=batch.image_sizes if is_first else None,
        inputs_embeds=received,
        output_hidden_states=True,
        logits_to_keep=1,
        packed_lengths=texts.lengths,
        packed_offsets=texts.cu_seqlens(),
    )
    return get_final_hidden_states(output)


def stage_output(
    model: Mistral3FP8VLMForConditionalGeneration,
    stage: Stage,
    batch: ConversationBatch,
    received: torch.Tensor | None,
    *,
    num_tokens: int,
    num_supervised: int,
) -> torch.Tensor:
    """What a stage of a pipeline makes of a batch: `packed_loss` on the last, else `packed_states`.

    Args:
        model: What is left of it on this rank.
        stage: Which one of those that this rank holds.
        batch: The same on all stages.
        received: As for `packed_states`.
        num_tokens: T, up to which the batch is filled; `packed_rows` of the batch or more.
        num_supervised: As for `packed_loss`.
    """
    batch = filled(batch if stage.is_first else replace(batch, pixel_values=None, image_sizes=None), num_tokens)
    batch = batch.to(model.device)
    if stage.is_last:
        return packed_loss(model, batch, num_supervised, received)
    return packed_states(model, batch, received)


def in_step(
    batches: Iterable[ConversationBatch],
    *,
    num_batches: int,
    num_images: int,
    image_tokens: ImageTokens,
    ranks: Ranks,
    fit: Callable[[int], int] = int,
) -> Iterator[ConversationBatch]:
    """Batches, each with an image where any rank has one, and as many as the rank with most.

    Args:
        batches: Of this rank.
        num_batches: How many there are.
        num_images: In all of them.
        image_tokens: Of the model.
        ranks: Those that have to run the same parts of a model equally often.
        fit: Maps that many batches to the number there have to be, no fewer.

    Distributed: two all-reduces of an int64, before the first batch.
    """
    has_images = bool(ranks.maximum(num_images))
    missing = fit(ranks.maximum(num_batches)) - num_batches
    empty = blank_batch(image_tokens if has_images else None)
    for batch in itertools.chain(batches, itertools.repeat(empty, missing)):
        yield with_blank(batch, empty) if has_images and not batch.num_images else batch


@torch.no_grad()
def held_out_loss(
    model: Mistral3FP8VLMForConditionalGeneration,
    samples: Sequence[EncodedConversation],
    image_tokens: ImageTokens,
    judges: Judges,
    *,
    micro_batch_tokens: int,
) -> float:
    """Mean cross-entropy over the supervised tokens of the samples of all judges.

    Args:
        model: With packed attention; the part that this rank holds.
        samples: This rank's share; at least one supervised token in those of all.
        image_tokens: Of the model.
        judges: The ranks.
        micro_batch_tokens: Tokens per forward pass.

    Distributed: three reductions, the collectives of the passes, and where ranks run in step those of `in_step`.
    """
    [num_supervised] = map(int, judges.data.sum([sum(sample.num_supervised for sample in samples)]))
    groups = micro_batches([len(sample.token_ids) for sample in samples], micro_batch_tokens)
    batches: Iterable[ConversationBatch] = (collate([samples[row] for row in rows]) for rows in groups)
    if judges.in_step.group is not None:
        num_images = sum(len(sample.images) for sample in samples)
        ranks = judges.in_step
        batches = in_step(
            batches, num_batches=len(groups), num_images=num_images, image_tokens=image_tokens, ranks=ranks
        )
    training = model.training
    model.eval()
    loss = sum(_share_of_loss(model, batch, judges, num_supervised) for batch in batches)
    model.train(training)
    return Ranks.of(judges.pipeline).sum(judges.data.sum([loss]))[0]


def _share_of_loss(
    model: Mistral3FP8VLMForConditionalGeneration, batch: ConversationBatch, judges: Judges, num_supervised: int
) -> float:
    """A batch's share of the loss, on the last rank of a pipeline; 0 on the others."""
    if judges.pipeline is None:
        return float(packed_loss(model, batch.to(model.device), num_supervised))
    rows = packed_rows(batch.num_tokens, model.device, judges.dtype)

    def compute(stage: Stage, received: torch.Tensor | None) -> torch.Tensor:
        return stage_output(model, stage, batch, received, num_tokens=rows, num_supervised=num_supervised)

    width = model.config.get_text_config().hidden_size
    states = torch.empty(1, rows, width, dtype=judges.dtype, device=model.device)
    output = pass_through(model, judges.own_stages, compute, states, group=judges.pipeline)
    return float(output) if judges.own_stages[-1].is_last else 0.0

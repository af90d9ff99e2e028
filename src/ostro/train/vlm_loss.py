"""The loss of packed conversations: what a training step differentiates, and what held-out conversations are scored by.

Batches are left to `data`, the head's product and its gradient to `losses.linear_ce`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from ostro.data.conversation_collate import ConversationBatch, collate
from ostro.data.conversation_tokens import EncodedConversation
from ostro.losses.linear_ce import fused_linear_cross_entropy, get_final_hidden_states
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import PackedTexts, fill_up, micro_batches


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


@torch.no_grad()
def held_out_loss(
    model: Mistral3FP8VLMForConditionalGeneration, samples: Sequence[EncodedConversation], micro_batch_tokens: int
) -> float:
    """Mean cross-entropy over the supervised tokens of samples.

    Args:
        model: With packed attention.
        samples: At least one supervised token in all.
        micro_batch_tokens: Tokens per forward pass.
    """
    num_supervised = sum(sample.num_supervised for sample in samples)
    training = model.training
    model.eval()
    loss = 0.0
    for rows in micro_batches([len(sample.token_ids) for sample in samples], micro_batch_tokens):
        batch = collate([samples[row] for row in rows]).to(model.device)
        loss += float(packed_loss(model, batch, num_supervised))
    model.train(training)
    return loss

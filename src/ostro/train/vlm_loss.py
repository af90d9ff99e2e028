"""The loss of packed conversations: what a training step differentiates, and what held-out conversations are scored by.

Batches are left to `data`, the head's product and its gradient to `losses.linear_ce`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ostro.data.conversation_collate import ConversationBatch, collate
from ostro.data.conversation_tokens import EncodedConversation
from ostro.losses.linear_ce import FusedLinearCrossEntropy, get_final_hidden_states
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import PackedTexts, fill_up, micro_batches

_LOSS = FusedLinearCrossEntropy()


def packed_loss(
    model: Mistral3FP8VLMForConditionalGeneration, batch: ConversationBatch, num_supervised: int
) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens of a batch, divided by `num_supervised`.

    Equal to running each sample by itself; the logits are never held whole.

    Args:
        model: With packed attention.
        batch: On the model's device.
        num_supervised: Supervised tokens of the whole step, over all its batches and ranks, >= 1.

    Returns:
        0-d float32, with gradient where it is enabled.
    """
    texts = PackedTexts(batch.input_ids, batch.lengths)
    if texts.input_ids.device.type == "cpu" and model.dtype != torch.float32:
        texts = fill_up(texts)
    output = model(
        input_ids=texts.input_ids[None],
        pixel_values=batch.pixel_values,
        image_sizes=batch.image_sizes,
        output_hidden_states=True,
        logits_to_keep=1,
        packed_lengths=texts.lengths,
        packed_offsets=texts.cu_seqlens(),
    )
    hidden_states = get_final_hidden_states(output)[0, : batch.num_tokens]
    loss: torch.Tensor = _LOSS(hidden_states, model.lm_head.weight, batch.labels, num_supervised)
    return loss


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

"""From encoded conversations to the packed batch that a forward pass receives.

Which conversations share a batch is left to `conversation_loader`, attention that keeps them apart to the model. The
idea: conversations are laid end to end, so nothing is spent on padding text; images are padded to the largest of the
batch, because that is how transformers takes them, with their true sizes beside them.

Shapes: S conversations, T tokens in all, N images, Hmax and Wmax the largest height and width among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ostro.data.conversation_tokens import NOTHING, EncodedConversation
from ostro.data.images import ImageTokens, Pixels, normalize


@dataclass(frozen=True)
class ConversationBatch:
    """Conversations laid end to end.

    Attributes:
        input_ids: `[T]` int64.
        labels: `[T]` int64, the id that should follow each position within its conversation, else -100.
        lengths: S lengths in tokens, summing to T.
        pixel_values: `[N, 3, Hmax, Wmax]` float32, in the order of their tokens, zeros beyond each image; None without
            images.
        image_sizes: `[N, 2]` int64 height and width of each image; None without images.
        num_supervised: Labels that are not -100.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_sizes: torch.Tensor | None
    num_supervised: int

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in all conversations."""
        return self.input_ids.shape[0]

    @property
    def num_images(self) -> int:
        """N, the number of images."""
        return 0 if self.image_sizes is None else self.image_sizes.shape[0]

    def to(self, device: torch.device | str) -> ConversationBatch:
        """The same batch with its tensors on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device, non_blocking=True),
            image_sizes=None if self.image_sizes is None else self.image_sizes.to(device, non_blocking=True),
        )


def collate(conversations: Sequence[EncodedConversation]) -> ConversationBatch:
    """Packs conversations in the order given.

    Args:
        conversations: At least one.

    Returns:
        The batch, on the CPU.
    """
    labels = torch.tensor(_flat([item.labels for item in conversations]), dtype=torch.int64)
    pixel_values, image_sizes = _collate_images([image for item in conversations for image in item.images])
    return ConversationBatch(
        input_ids=torch.tensor(_flat([item.token_ids for item in conversations]), dtype=torch.int64),
        labels=labels,
        lengths=tuple(len(item.token_ids) for item in conversations),
        pixel_values=pixel_values,
        image_sizes=image_sizes,
        num_supervised=sum(item.num_supervised for item in conversations),
    )


def blank_batch(image_tokens: ImageTokens | None) -> ConversationBatch:
    """A batch that trains on nothing: one conversation without a label, with one merged patch of zeros as its image.

    Args:
        image_tokens: Of the model; None for a batch without an image.
    """
    side = image_tokens.merged_patch_size if image_tokens else 0
    ids = image_tokens.token_ids(1, 1) if image_tokens else [0]
    return ConversationBatch(
        input_ids=torch.tensor(ids),
        labels=torch.full((len(ids),), NOTHING),
        lengths=(len(ids),),
        pixel_values=torch.zeros(1, 3, side, side) if image_tokens else None,
        image_sizes=torch.tensor([[side, side]]) if image_tokens else None,
        num_supervised=0,
    )


def with_blank(batch: ConversationBatch, blank: ConversationBatch) -> ConversationBatch:
    """A batch without images, and after it the conversation of `blank_batch`, which changes no loss and no gradient."""
    return replace(
        blank,
        input_ids=torch.cat((batch.input_ids, blank.input_ids)),
        labels=torch.cat((batch.labels, blank.labels)),
        lengths=batch.lengths + blank.lengths,
        num_supervised=batch.num_supervised,
    )


def filled(batch: ConversationBatch, num_tokens: int) -> ConversationBatch:
    """A batch with so many tokens in all: where some are missing, a last conversation without a label has them.

    Args:
        batch: On the CPU.
        num_tokens: At least those of the batch.
    """
    missing = num_tokens - batch.num_tokens
    if not missing:
        return batch
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, missing)),
        labels=F.pad(batch.labels, (0, missing), value=NOTHING),
        lengths=(*batch.lengths, missing),
    )


def _collate_images(images: Sequence[Pixels]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not images:
        return None, None
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64)
    height, width = sizes.amax(dim=0).tolist()
    # padded after normalizing, as transformers does: zeros are not black but the mean colour
    pixel_values = torch.zeros(len(images), 3, height, width)
    for image, values in zip(images, pixel_values.numpy(), strict=True):
        normalize(image, values[:, : image.shape[0], : image.shape[1]])
    return pixel_values, sizes


def _flat(rows: Sequence[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(rows))

"""The embedder: a bidirectional text tower, its pooling and the normalisation, as one module from packed texts to
vectors.

It leaves tokens and prompts to the tokenizer and the collator, and temperature to the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ostro.models.cpu_linear import onednn_is_faster, use_onednn
from ostro.models.packed import PackedTexts, fill_up, forward_packed, use_packed_attention
from ostro.models.pooling import pool, pool_packed

SINGLE_VECTOR_POOLING = ("avg", "mean", "weighted_avg", "cls", "last")


class Embedder(torch.nn.Module):
    """Packed texts in, one vector per text out.

    Naive equivalent: pad the texts, run the tower, `pool(last_hidden_state, attention_mask, pooling)`, divide by the
    norm.
    """

    def __init__(self, backbone: PreTrainedModel, *, pooling: str = "avg", normalize: bool = True) -> None:
        """Prepares the tower for packed attention and, in float32, for the faster of the CPU's product libraries.

        Args:
            backbone: A bidirectional text tower.
            pooling: One of `SINGLE_VECTOR_POOLING`.
            normalize: Whether vectors get length 1.

        Raises:
            ValueError: When the pooling does not give one vector per text.
        """
        super().__init__()
        if pooling not in SINGLE_VECTOR_POOLING:
            raise ValueError(
                f"pooling: must be one of {', '.join(SINGLE_VECTOR_POOLING)} for one vector per text, got {pooling!r}"
            )
        use_packed_attention(backbone)
        if backbone.dtype == torch.float32 and onednn_is_faster():
            use_onednn(backbone)
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize

    @property
    def device(self) -> torch.device:
        """Where the tower's weights are."""
        return self.backbone.device

    @property
    def num_dims(self) -> int:
        """D, the size of a vector."""
        size: int = self.backbone.config.hidden_size
        return size

    def forward(self, packed: PackedTexts) -> torch.Tensor:
        """Embeds packed texts.

        Args:
            packed: B texts, on any device.

        Returns:
            Embeddings `[B, D]`, float32.
        """
        filled = packed.to(self.device)
        if self.device.type == "cpu" and self.backbone.dtype != torch.float32:
            filled = fill_up(filled)
        hidden_states = forward_packed(self.backbone, filled)[: packed.num_tokens]
        return self._finish(pool_packed(hidden_states, packed.lengths, self.pooling))

    def forward_padded(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The reference form on padded texts: the same vectors, at the cost of the padding.

        Args:
            input_ids: `[B, S]`, padded on either side.
            attention_mask: `[B, S]`, 1 for tokens and 0 for padding.

        Returns:
            Embeddings `[B, D]`, float32.
        """
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self._finish(pool(output.last_hidden_state, attention_mask, self.pooling))

    def _finish(self, vectors: torch.Tensor) -> torch.Tensor:
        # float32: a bf16 vector's norm is off by up to 1/256, which the temperature then magnifies
        vectors = vectors.float()
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

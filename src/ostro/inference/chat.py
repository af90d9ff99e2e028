"""Answers to questions about images with a trained vision-language model: `Chat.from_pretrained(folder).answer(...)`.

Template and images are left to `data`, loading to `checkpoint`. The idea: questions are answered in batches, sorted by
length so that little is padded, each by its most probable token at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import GenerationConfig, Mistral3Config

from ostro.checkpoint.fetch import fetch_weights
from ostro.checkpoint.load import load_vlm
from ostro.data.conversation import Message
from ostro.data.conversation_collate import collate
from ostro.data.conversation_tokens import ConversationEncoder, EncodedConversation
from ostro.data.images import ImageTokens
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import use_packed_attention

DEFAULT_MAX_NEW_TOKENS = 256
# Ids of the family that no configuration names, as every tekken.json of it has them; the encoder compares them.
_IMAGE_BREAK, _IMAGE_END = 12, 13


def open_conversation_encoder(
    folder: Path, config: Mistral3Config, *, max_tokens: int, too_long: Literal["refuse", "truncate"] = "refuse"
) -> ConversationEncoder:
    """What turns conversations into the tokens of a model.

    Args:
        folder: Weights folder with its tokenizer.
        config: Of the model.
        max_tokens: Tokens of a conversation, at most.
        too_long: What happens to a longer one.

    Raises:
        LayoutError: When the folder has no Mistral tokenizer, or it does not belong to the model.
    """
    vision: Any = config.vision_config  # transformers annotates sub-configs as dict or None too
    image_tokens = ImageTokens(
        image_token_id=config.image_token_id,
        image_break_token_id=_IMAGE_BREAK,
        image_end_token_id=_IMAGE_END,
        patch_size=vision.patch_size,
        spatial_merge_size=config.spatial_merge_size,
        max_image_size=vision.image_size,
    )
    return ConversationEncoder(folder, image_tokens, max_tokens=max_tokens, too_long=too_long)


class Chat:
    """A vision-language model with its tokenizer.

    Attributes:
        model: The model, prepared for packed attention.
        encoder: Conversations to tokens.
    """

    def __init__(self, model: Mistral3FP8VLMForConditionalGeneration, encoder: ConversationEncoder) -> None:
        """Wraps a model that is already in memory; see `from_pretrained` for a folder."""
        self.model, self.encoder = model, encoder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
    ) -> Self:
        """Opens a weights folder.

        Args:
            folder: Any Mistral-3 vision-language folder, FP8 or BF16, or a hub id.
            dtype: Of weights and activations.
            device: Where to put it; CUDA when there is one, else the CPU, when None.

        Raises:
            LayoutError: When the folder is of another family, or has no tokenizer of Mistral's.
            CheckpointError: When a file cannot be read.
        """
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = fetch_weights(folder)
        model = load_vlm(folder, dtype=dtype, device=chosen)
        use_packed_attention(model)
        text: Any = model.config.text_config
        limit = text.max_position_embeddings
        return cls(model, open_conversation_encoder(folder, model.config, max_tokens=limit))

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        batch_samples: int = 64,
    ) -> list[str]:
        """The next assistant turn of each conversation, by greedy decoding.

        Args:
            conversations: B conversations, each ending with a user turn.
            max_new_tokens: Tokens of an answer, at most.
            batch_samples: Conversations answered at once; bounds memory.

        Returns:
            B answers without special tokens, white space at both ends removed.

        Raises:
            DataError: When an image cannot be read, or a conversation does not end with a user turn or is too long.
        """
        prompts = [self.encoder.encode_prompt(messages) for messages in conversations]
        return self.answer_prompts(prompts, max_new_tokens=max_new_tokens, batch_samples=batch_samples)

    def answer_prompts(
        self, prompts: Sequence[EncodedConversation], *, max_new_tokens: int, batch_samples: int
    ) -> list[str]:
        """The answers of `answer` to conversations that are encoded already.

        Args:
            prompts: B prompts of `encoder.encode_prompt`.
            max_new_tokens: As for `answer`.
            batch_samples: As for `answer`.
        """
        training = self.model.training
        self.model.eval()
        # pictures or none: one batch hands the model one kind of input
        order = sorted(range(len(prompts)), key=lambda row: (not prompts[row].images, -len(prompts[row].token_ids)))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_samples):
            rows = order[start : start + batch_samples]
            for row, text in zip(rows, self._generate([prompts[row] for row in rows], max_new_tokens), strict=True):
                answers[row] = text
        self.model.train(training)
        return answers

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[EncodedConversation], max_new_tokens: int) -> list[str]:
        """Answers of one batch."""
        inputs, stop = self._inputs(prompts), self.encoder.eos_token_id
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=stop
        )
        model: Any = self.model  # generate is annotated for another base class than the models'
        generated = model.generate(**inputs, generation_config=settings)
        return self._texts(generated[:, inputs["input_ids"].shape[1] :])

    def _inputs(self, prompts: Sequence[EncodedConversation]) -> dict[str, torch.Tensor]:
        """What the model is handed for a batch, padded on the left so that all prompts end together."""
        lengths = [len(prompt.token_ids) for prompt in prompts]
        width, device, stop = max(lengths), self.model.device, self.encoder.eos_token_id
        # masked, so any id of the vocabulary serves as padding, which also fills an answer after its end
        rows = [[stop] * (width - len(prompt.token_ids)) + prompt.token_ids for prompt in prompts]
        mask = [[0] * (width - length) + [1] * length for length in lengths]
        images = collate(prompts).to(device)
        inputs = {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "pixel_values": images.pixel_values,
            "image_sizes": images.image_sizes,
        }
        return {name: value for name, value in inputs.items() if value is not None}

    def _texts(self, generated: torch.Tensor) -> list[str]:
        """Texts of generated ids `[B, N]`."""
        return [self.encoder.decode(ids).strip() for ids in generated.tolist()]

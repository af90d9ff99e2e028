"""Answers of a model that ranks hold in parts: transformers' own decoding needs the whole one, and stages have to wait
for each token of the last.

The answers are those of `Chat`: each the most probable token after token, with keys and values kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ostro.data.conversation_tokens import NOTHING, ConversationEncoder, EncodedConversation
from ostro.inference.chat import Chat
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.parallel.pipeline import Stage, pass_through, share_last
from ostro.train.judges import Judges


class SplitChat(Chat):
    """A `Chat` whose model is split over ranks, which all call its methods together, those of a pipeline with the same
    conversations."""

    def __init__(
        self, model: Mistral3FP8VLMForConditionalGeneration, encoder: ConversationEncoder, judges: Judges
    ) -> None:
        """Keeps all of them.

        Args:
            model: What this rank holds.
            encoder: Conversations to tokens.
            judges: The ranks.
        """
        super().__init__(model, encoder)
        self._judges = judges

    def answer_prompts(
        self, prompts: Sequence[EncodedConversation], *, max_new_tokens: int, batch_samples: int
    ) -> list[str]:
        """As `Chat.answer_prompts`.

        Distributed: those of the model's passes; for each token one broadcast over a pipeline, and an all-reduce of an
            int64 over the ranks that gather each other's weights, which all run as many passes as the one with most.
        """
        num_batches = -(-len(prompts) // batch_samples)
        missing = self._judges.in_step.maximum(num_batches) - num_batches
        answers = super().answer_prompts(prompts, max_new_tokens=max_new_tokens, batch_samples=batch_samples)
        training = self.model.training
        self.model.eval()
        for _ in range(missing):
            self._generate([], max_new_tokens)
        self.model.train(training)
        return answers

    # inference mode would leave its tensors in the buffers of FSDP2, where training meets them
    @torch.no_grad()
    def _generate(self, prompts: Sequence[EncodedConversation], max_new_tokens: int) -> list[str]:
        judges, stop = self._judges, self.encoder.eos_token_id
        has_images = any(prompt.images for prompt in prompts)
        needs_image = bool(judges.in_step.maximum(has_images)) and not has_images
        rows = [*prompts, self._blank(needs_image)] if needs_image or not prompts else prompts
        inputs = self._inputs(rows)
        token_ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        cache, done = DynamicCache(), torch.arange(len(rows), device=mask.device) >= len(prompts)
        generated = []
        for _ in range(max_new_tokens):
            new = self._next(token_ids, mask, cache, inputs).masked_fill(done, stop)
            generated.append(new)
            done |= new == stop
            if not judges.in_step.maximum(not done.all()):
                break
            token_ids, mask, inputs = new[:, None], torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1), {}
        return self._texts(torch.stack(generated, dim=1)[: len(prompts)])

    def _next(
        self, token_ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache, images: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The most probable id `[B]` after each row, on all stages.

        Args:
            token_ids: `[B, S]`, those that the cache does not have yet.
            mask: `[B, P + S]`, 1 for tokens and 0 for padding, P tokens being in the cache.
            cache: Keys and values of this rank's layers; S are added.
            images: For the first stage, with the tokens that stand for them.
        """
        num_new, judges = token_ids.shape[1], self._judges
        model: Any = self.model  # transformers leaves calls of its models without annotation
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
        allowed = self._allowed(mask, num_new)

        def compute(stage: Stage | None, received: torch.Tensor | None) -> torch.Tensor:
            tokens = {"input_ids": token_ids, **images} if received is None else {"inputs_embeds": received}
            output = model(
                **tokens,
                attention_mask=allowed,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
                logits_to_keep=1,
            )
            is_last = stage is None or stage.is_last
            made: torch.Tensor = output.logits[:, -1].argmax(dim=-1) if is_last else output.hidden_states
            return made

        if judges.pipeline is None:
            return compute(None, None)
        width = model.config.get_text_config().hidden_size
        states = torch.empty(*token_ids.shape, width, dtype=judges.dtype, device=model.device)
        output = pass_through(model, judges.own_stages, compute, states, group=judges.pipeline)
        if not judges.own_stages[-1].is_last:
            output = torch.empty_like(token_ids[:, 0])
        return share_last(output, judges.pipeline)

    def _allowed(self, mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Which tokens each new one sees, `[B, 1, S, P + S]`: transformers would make it from the cache of layer 0,
        which only the first stage has."""
        places = torch.arange(mask.shape[1], device=mask.device)
        distances = places[-num_new:, None] - places
        seen = distances >= 0
        if (window := self.model.config.get_text_config().sliding_window) is not None:
            seen &= distances < window
        # a padded place sees itself, as a row of nothing has no softmax
        return (mask.bool()[:, None, None] & seen) | (distances == 0)

    def _blank(self, with_image: bool) -> EncodedConversation:
        """A prompt whose answer nobody reads."""
        tokens = self.encoder.image_tokens
        side = tokens.merged_patch_size
        images = (np.zeros((side, side, 3), dtype=np.uint8),) if with_image else ()
        ids = tokens.token_ids(1, 1) if with_image else [self.encoder.eos_token_id]
        return EncodedConversation(list(ids), [NOTHING] * len(ids), images, "blank")

"""Conversations to token ids and labels, through Mistral's own chat template.

Rows are left to `conversation`, batches to `conversation_collate`. The idea: mistral_common encodes a conversation
message by message, so which tokens an assistant has to learn is known from where they were made, and no text is ever
searched for. A label is the id that should follow a position:

    ids      <s> [INST] [IMG] ... Which? [/INST] A    bag  </s>
    labels    .    .      .         .      A     bag  </s>  .       (. is -100, nothing to learn)

The library is handed an image encoder that makes tokens only, from a size that is known by then: pixels go another
way, and its own encoder needs OpenCV. Like every server of these models, it puts an image that ends a user's message
before the text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageURLChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.image import ImageEncoding
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ostro.data.conversation import Conversation, ImagePart, Message
from ostro.data.images import ImageTokens, Pixels, read_pixels
from ostro.errors import DataError, LayoutError

logger = logging.getLogger(__name__)

NOTHING = -100
"""Label of a position after which nothing is learnt, as in `torch.nn.functional.cross_entropy`."""

TEKKEN_NAME = "tekken.json"


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as the model reads it.

    Attributes:
        token_ids: T ids, `<s>` first.
        labels: T ids, the one that should follow each position; -100 where nothing is learnt. The last is -100.
        images: Resized images, `[H, W, 3]` uint8 each, in the order of their tokens.
        where: File and row.
    """

    token_ids: list[int]
    labels: list[int]
    images: tuple[Pixels, ...]
    where: str

    @property
    def num_supervised(self) -> int:
        """How many positions have a label."""
        return len(self.labels) - self.labels.count(NOTHING)


class ConversationEncoder:
    """Mistral's chat template over the tokenizer of a weights folder; safe to call from several threads.

    Attributes:
        image_tokens: How the model turns images into tokens.
        eos_token_id: Id of `</s>`, which ends an answer.
    """

    def __init__(
        self,
        folder: str | Path,
        image_tokens: ImageTokens,
        *,
        max_tokens: int,
        too_long: Literal["refuse", "truncate"] = "refuse",
    ) -> None:
        """Opens the tokenizer.

        Args:
            folder: Weights folder with `tekken.json`.
            image_tokens: From the model's configuration.
            max_tokens: Longest conversation, tokens of its images included.
            too_long: Whether a longer one is an error, or loses its last turns until it fits.

        Raises:
            LayoutError: When there is no `tekken.json` that can be read, or its image tokens are not the model's.
        """
        path = Path(folder) / TEKKEN_NAME
        self.image_tokens, self._max_tokens, self._too_long = image_tokens, max_tokens, too_long
        self._template = _open_template(path, image_tokens)
        tekken = self._template.tokenizer
        self.eos_token_id: int = tekken.eos_id
        self._normalizer = get_normalizer(tekken.version, tekken.model_settings_builder)
        self._training = get_validator(tekken.version, ValidationMode.finetuning)
        self._generating = get_validator(tekken.version, ValidationMode.test)
        self._has_reported = False

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Ids and labels of a conversation for training: each assistant turn and its `</s>` are learnt.

        Args:
            conversation: It ends with an assistant turn.

        Returns:
            At most `max_tokens` tokens, the last of them `</s>`.

        Raises:
            DataError: When it does not end with an assistant turn, its turns are in no order the template knows, an
                image cannot be read, or it is too long.
        """
        return self._encode_whole(conversation, self._read(conversation.messages))

    def encode_held_out(self, conversation: Conversation) -> tuple[EncodedConversation, EncodedConversation]:
        """A conversation as `encode` gives it, and as `encode_prompt` does without its last turn, the reference.

        Its images are read once, and both hold the same.

        Args:
            conversation: It ends with an assistant turn.

        Raises:
            DataError: As both.
        """
        images = self._read(conversation.messages)
        messages, _ = conversation.split_reference()
        return self._encode_whole(conversation, images), self._encode_prompt(messages, images, conversation.where)

    def _encode_whole(self, conversation: Conversation, images: Sequence[Pixels]) -> EncodedConversation:
        messages, where = conversation.messages, conversation.where
        if messages[-1].role != "assistant":
            raise DataError(
                f"{where}: ends with the turn of role {messages[-1].role}; expected assistant, the answer to learn"
            )
        ids, labels, order = self._encode(messages, images, where, self._training)
        if len(ids) > self._max_tokens:
            ids, labels, order = self._truncate(conversation, images, len(ids))
        return EncodedConversation(ids, labels, tuple(images[index] for index in order), where)

    def encode_prompt(self, messages: Sequence[Message], where: str = "prompt") -> EncodedConversation:
        """Ids of messages to be answered; nothing is learnt.

        Args:
            messages: The last one is the user's.
            where: What it is, the beginning of every error about it.

        Returns:
            At most `max_tokens` ids that end with `[/INST]`.

        Raises:
            DataError: When the last turn is not the user's, the turns are in no order the template knows, an image
                cannot be read, or it is too long, whatever `too_long` says: a prompt is never cut.
        """
        return self._encode_prompt(messages, self._read(messages), where)

    def _encode_prompt(self, messages: Sequence[Message], images: Sequence[Pixels], where: str) -> EncodedConversation:
        if not messages or messages[-1].role != "user":
            last = f"the turn of role {messages[-1].role}" if messages else "nothing"
            raise DataError(f"{where}: ends with {last}; expected a user turn to answer")
        ids, _, order = self._encode(messages, images, where, self._generating)
        if len(ids) > self._max_tokens:
            raise DataError(f"{where}: has {len(ids)} tokens, more than {self._max_tokens}; shorten it or its images")
        return EncodedConversation(ids, [NOTHING] * len(ids), tuple(images[index] for index in order), where)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        text: str = self._template.decode(list(token_ids))
        return text

    def _read(self, messages: Sequence[Message]) -> list[Pixels]:
        return [read_pixels(image, self.image_tokens) for message in messages for image in message.images]

    def _encode(
        self, messages: Sequence[Message], images: Sequence[Pixels], where: str, validator: Any
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels, and the images in the order of their tokens."""
        request = self._request(messages, images, where, validator)
        ids: list[int] = self._template.start()
        labels = [NOTHING] * len(ids)
        order: list[int] = []
        first_user, last_user = self._template.find_first_last_user(request)
        for index, message in enumerate(request.messages):
            if message.role == "assistant":
                new = self._template.encode_assistant_message(message, index < last_user)
                # the label of a position is the next id: this turn's first one belongs to the position before it
                labels[-1:] = [*new, NOTHING]
            else:
                new, places = self._encode_other(message, request, index == first_user, index == last_user)
                order += [int(place) for place in places]
                labels += [NOTHING] * len(new)
            ids += new
        return ids, labels, order

    def _encode_other(
        self, message: Any, request: InstructRequest[Any, Any], is_first: bool, is_last: bool
    ) -> tuple[list[int], list[Any]]:
        """Ids of a user's or system message, and its images by number."""
        if message.role == "system":
            return self._template.encode_system_message(message)[0], []
        ids, places, _ = self._template.encode_user_message(
            message,
            request.available_tools,
            is_last=is_last,
            is_first=is_first,
            system_prompt=request.system_prompt,
            force_img_first=True,
            settings=request.settings,
        )
        return ids, places

    def _request(
        self, messages: Sequence[Message], images: Sequence[Pixels], where: str, validator: Any
    ) -> InstructRequest[Any, Any]:
        """The messages as the library wants them; an image is a URL that says its number and grid."""
        merged = self.image_tokens.merged_patch_size
        urls = (f"{i}:{image.shape[0] // merged}:{image.shape[1] // merged}" for i, image in enumerate(images))
        turns: list[Any] = []
        for message in messages:
            if message.role == "user":
                chunks = [
                    ImageURLChunk(image_url=next(urls)) if isinstance(part, ImagePart) else TextChunk(text=part.text)
                    for part in message.parts
                ]
                turns.append(UserMessage(content=chunks))
            else:
                kind = AssistantMessage if message.role == "assistant" else SystemMessage
                turns.append(kind(content=message.text))
        try:
            validated = validator.validate_request(ChatCompletionRequest(messages=turns))
            request: InstructRequest[Any, Any] = self._normalizer.from_chat_completion_request(validated)
        except MistralCommonException as error:
            raise DataError(f"{where}: no conversation the chat template knows ({error.message})") from error
        return request

    def _truncate(
        self, conversation: Conversation, images: Sequence[Pixels], num_tokens: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Leaves out the last turns until the rest fits and ends with an assistant turn."""
        messages, where = conversation.messages, conversation.where
        too_long = f"{where}: has {num_tokens} tokens"
        limit = f"more than data.max_tokens, {self._max_tokens}"
        if self._too_long == "refuse":
            raise DataError(
                f"{too_long}, {limit}; raise it, set data.too_long to truncate, or leave the row out or shorten it"
            )
        ends = [end for end in range(len(messages) - 1, 0, -1) if _ends_a_turn(messages, end)]
        for end in ends:
            ids, labels, order = self._encode(messages[:end], images, where, self._training)
            if len(ids) <= self._max_tokens:
                self._report(where, num_tokens, len(ids))
                return ids, labels, order
            num_tokens = len(ids)
        raise DataError(
            f"{where}: has {num_tokens} tokens up to its first answer, {limit}; raise it or leave the row out"
        )

    def _report(self, where: str, num_tokens: int, kept: int) -> None:
        if not self._has_reported:
            self._has_reported = True
            logger.warning(
                "%s: %d tokens, more than %d; keeps its first turns, %d tokens, and so do others from here on",
                where,
                num_tokens,
                self._max_tokens,
                kept,
            )


class _ImageTokenEncoder:
    """Stands in for mistral_common's `ImageEncoder`: tokens of an image whose URL says its number and grid."""

    def __init__(self, image_tokens: ImageTokens) -> None:
        self._image_tokens = image_tokens

    def __call__(self, content: Any) -> ImageEncoding:
        number, rows, columns = map(int, content.get_url().split(":"))
        return ImageEncoding(tokens=self._image_tokens.token_ids(rows, columns), image=np.asarray(number))


def _ends_a_turn(messages: Sequence[Message], end: int) -> bool:
    return messages[end - 1].role == "assistant" and messages[end].role != "assistant"


def _open_template(path: Path, image_tokens: ImageTokens) -> Any:
    """The library's instruct tokenizer, which is the chat template of the file's version."""
    try:
        template: Any = MistralTokenizer.from_file(path).instruct_tokenizer
        special = template.tokenizer.get_special_token
        stored = {name: special(name) for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")}
    except (MistralCommonException, OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LayoutError(
            f"{path}: not a Tekken tokenizer that can be read ({reason:.200}); conversations need Mistral's own "
            "tekken.json, copy it from the release of the weights"
        ) from error
    wanted = (image_tokens.image_token_id, image_tokens.image_break_token_id, image_tokens.image_end_token_id)
    if tuple(stored.values()) != wanted:
        raise LayoutError(
            f"{path}: {stored}, but the model's configuration has {wanted}; use the tokenizer of the weights"
        )
    template.image_encoder = _ImageTokenEncoder(image_tokens)
    return template

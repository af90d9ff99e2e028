"""Options of conversation data: sources and batches of a vision-language run. Ranges and defaults live here only."""

from __future__ import annotations

from typing import Literal

import pydantic

from ostro.config import Options, PathField


class ConversationSourceOptions(Options):
    """One source of conversations."""

    path: PathField
    """JSONL, JSON or Parquet file, folder that `datasets` loads, or name of a data set on the hub."""
    format: Literal["auto", "messages", "sharegpt"] = "auto"
    """`messages` of role and content, or `conversations` of from and value; `auto` tells them apart by the columns."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    split: str | None = None
    """Split of a hub data set or folder; `train` where not given."""
    image_folder: PathField | None = None
    """Where relative image paths start; the folder of the file where not given."""
    weight: float = pydantic.Field(1.0, gt=0, le=1000)
    """Passes over this source per epoch; 0.5 takes one half in the first epoch and the other half in the second."""


class ConversationDataOptions(Options):
    """Training sources, and how their conversations become batches."""

    train: tuple[ConversationSourceOptions, ...] = pydantic.Field(min_length=1)
    """Sources of training conversations, mixed in every batch; a path alone stands for one source."""
    global_batch_samples: int = pydantic.Field(32, ge=1)
    """Conversations per optimizer step, over all ranks."""
    max_tokens: int = pydantic.Field(4096, ge=16, le=262_144)
    """Tokens of a conversation, those of its images included."""
    too_long: Literal["refuse", "truncate"] = "refuse"
    """A conversation of more than `max_tokens` is an error, or loses its last turns until it fits."""
    micro_batch_tokens: int = pydantic.Field(8192, ge=16, validate_default=True)
    """Tokens of one forward pass of a rank; bounds memory, changes no result."""
    shuffle: bool = True
    """New order in every epoch; false keeps the order of the sources and their files."""

    @pydantic.field_validator("micro_batch_tokens", mode="after")
    @classmethod
    def _holds_a_sample(cls, value: int, info: pydantic.ValidationInfo) -> int:
        longest = info.data.get("max_tokens", 0)
        if value < longest:
            raise ValueError(
                f"a micro-batch of {value} tokens does not hold a conversation of max_tokens, {longest}; "
                "raise micro_batch_tokens or lower max_tokens"
            )
        return value

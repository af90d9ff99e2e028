"""Options of the data room: sources, prompts and batches of a retrieval run. Ranges and defaults live here only."""

from __future__ import annotations

from typing import Literal

import pydantic

from ostro.config import Options, PathField


class SourceOptions(Options):
    """One source of training examples."""

    path: PathField
    """BEIR folder, corpus-id JSON, JSONL or Parquet file, folder of Parquet files, or name of a data set on the hub."""
    format: Literal["auto", "beir", "corpus_ids", "inline"] = "auto"
    """How examples are stored; `auto` tells them apart by their files."""
    subset: str | None = None
    """Configuration of a hub data set that has several."""
    split: str | None = None
    """`qrels/<split>.tsv` of a BEIR folder, or split of a hub data set or folder; `train` where not given."""
    weight: float = pydantic.Field(1.0, gt=0, le=1000)
    """Passes over this source per epoch; 0.5 takes one half in the first epoch and the other half in the second."""


class PromptOptions(Options):
    """Plain text put before every text, with its own trailing space where one is wanted."""

    query: str = ""
    """Put before queries, such as `query: `."""
    document: str = ""
    """Put before documents, such as `passage: `."""


class DataOptions(Options):
    """Training sources, and how their examples become batches; every batch comes from one source."""

    train: tuple[SourceOptions, ...] = pydantic.Field(min_length=1)
    """Sources of training examples; a path alone stands for one source."""
    prompts: PromptOptions = PromptOptions()
    """Texts put before queries and documents, in training, evaluation and the exported folder."""
    query_max_tokens: int = pydantic.Field(512, ge=4, le=262_144)
    """Tokens of a query, special tokens and prompt included; longer ones are cut."""
    document_max_tokens: int = pydantic.Field(512, ge=4, le=262_144)
    """Tokens of a document, special tokens and prompt included; longer ones are cut."""
    num_negatives: int = pydantic.Field(0, ge=0, le=1000)
    """Labelled negatives drawn per query, at most; the documents of the other queries are negatives in any case."""
    global_batch_queries: int = pydantic.Field(128, ge=2)
    """Queries of one contrastive batch, over all ranks."""
    micro_batch_tokens: int = pydantic.Field(16_384, ge=1)
    """Tokens of one forward pass of a rank; bounds memory, changes no result."""
    drop_last: bool = False
    """Leave out the last, shorter batch of each source in an epoch."""
    shuffle: bool = True
    """New order in every epoch; false keeps the order of the files."""

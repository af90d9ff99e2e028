"""Texts to vectors with a trained embedder: `Encoder.from_pretrained(folder).encode_query(["..."])`.

Prompts, pooling and the token limit come from the folder, so that a server or script cannot forget them. Search over
the vectors is left to `ostro.retrieval`. The idea: texts are sorted by length and packed under a token budget, so no
work is spent on padding and memory is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from ostro.errors import LayoutError
from ostro.models.backbone import build_encoder_backbone
from ostro.models.embedder import SINGLE_VECTOR_POOLING, Embedder
from ostro.models.packed import PackedTexts, micro_batches
from ostro.models.tokenizer import TextTokenizer, check_vocabulary, load_tokenizer
from ostro.parallel.apply import without_gradients

DEFAULT_MAX_TOKENS = 512
DEFAULT_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
# Tokenised texts held at once: bounds memory for a large input, and is enough to sort by length.
_CHUNK_TEXTS = 16384


class Encoder:
    """An embedder with its tokenizer and prompts.

    Attributes:
        embedder: The model.
        tokenizer: Its tokenizer.
        prompts: Text put before a query (`query`) and a document (`document`).
        max_tokens: Longer texts are cut to this many tokens.
        num_dims: Size of the vectors returned; below the model's own size for a Matryoshka-trained model.
        micro_batch_tokens: Tokens per forward pass.
    """

    def __init__(
        self,
        embedder: Embedder,
        tokenizer: TextTokenizer,
        *,
        prompts: Mapping[str, str] | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        num_dims: int | None = None,
        micro_batch_tokens: int | None = None,
    ) -> None:
        """Wraps a model that is already in memory; see `from_pretrained` for a folder.

        Raises:
            ValueError: When `num_dims` exceeds the size of the model's vectors.
        """
        if num_dims is not None and not 1 <= num_dims <= embedder.num_dims:
            raise ValueError(f"num_dims: must be between 1 and the model's {embedder.num_dims}, got {num_dims}")
        self.embedder = embedder
        self.tokenizer = tokenizer
        self.prompts = dict(prompts or {})
        self.max_tokens = max_tokens
        self.num_dims = num_dims or embedder.num_dims
        self.micro_batch_tokens = micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[embedder.device.type]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        num_dims: int | None = None,
        micro_batch_tokens: int | None = None,
    ) -> Encoder:
        """Opens a weights folder: an export of Ostro, or any Mistral-3 checkpoint (its language tower then embeds
        untrained).

        Args:
            name_or_path: Folder or hub id.
            device: Where to run; CUDA when there is one.
            dtype: Weights and activations; what the folder stores when None.
            num_dims: Cut vectors to their first dims and normalise again (Matryoshka).
            micro_batch_tokens: Tokens per forward pass; by device when None.

        Returns:
            The encoder, probed to be bidirectional.

        Raises:
            LayoutError: When the folder is not of the family, lacks weights or attends causally.
        """
        name = str(name_or_path)
        # "auto": what the folder stores
        backbone = build_encoder_backbone(name, "embedding", dtype=dtype or "auto")
        tokenizer = load_tokenizer(name)
        check_vocabulary(tokenizer, backbone.config.vocab_size)
        settings = _read_json(name, "config_sentence_transformers.json")
        limits = _read_json(name, "sentence_bert_config.json")
        modules = _read_json(name, "modules.json")
        pooling = backbone.config.to_dict().get("pooling", "avg")
        if pooling not in SINGLE_VECTOR_POOLING:
            known = ", ".join(SINGLE_VECTOR_POOLING)
            raise LayoutError(f"{name}: config.json: pooling must be one of {known} for one vector, got {pooling!r}")
        embedder = Embedder(
            backbone,
            pooling=pooling,
            normalize=not modules or any(str(module["type"]).endswith("Normalize") for module in modules),
        )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            embedder.to(device).eval(),
            tokenizer,
            prompts=settings.get("prompts", {}) if settings else {},
            max_tokens=limits.get("max_seq_length", DEFAULT_MAX_TOKENS) if limits else DEFAULT_MAX_TOKENS,
            num_dims=num_dims,
            micro_batch_tokens=micro_batch_tokens,
        )

    def encode(self, texts: Sequence[str] | str, *, prompt: str = "") -> torch.Tensor:
        """Embeds texts.

        Args:
            texts: N texts, or one. Longer ones are cut to `max_tokens`.
            prompt: Put before every text as it is.

        Returns:
            Embeddings `[N, num_dims]` (`[num_dims]` for a single text), float32 on the CPU, in the order of `texts`.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt=prompt)[0]
        embeddings = torch.empty(len(texts), self.num_dims)
        for start in range(0, len(texts), _CHUNK_TEXTS):
            chunk = (
                [prompt + text for text in texts[start : start + _CHUNK_TEXTS]]
                if prompt
                else texts[start : start + _CHUNK_TEXTS]
            )
            self._encode_into(embeddings[start : start + _CHUNK_TEXTS], self.tokenizer.encode(chunk, self.max_tokens))
        return embeddings

    def encode_query(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Embeds what is searched for, with the folder's query prompt; shapes as `encode`."""
        return self.encode(texts, prompt=self.prompts.get("query", ""))

    def encode_document(self, texts: Sequence[str] | str) -> torch.Tensor:
        """Embeds what is found, with the folder's document prompt; shapes as `encode`."""
        return self.encode(texts, prompt=self.prompts.get("document", ""))

    @staticmethod
    def similarity(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """Cosine of every query with every document.

        Args:
            queries: `[Q, D]`.
            documents: `[N, D]`.

        Returns:
            `[Q, N]` float32, between -1 and 1.
        """
        normalize = torch.nn.functional.normalize
        return normalize(queries.float(), dim=-1) @ normalize(documents.float(), dim=-1).T

    def passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which texts go through the model together.

        Args:
            lengths: Tokens of each text.

        Returns:
            Indices into `lengths`, each of them once. A pass without any still runs the model.
        """
        return micro_batches(lengths, self.micro_batch_tokens)

    def _encode_into(self, embeddings: torch.Tensor, token_ids: Sequence[Sequence[int]]) -> None:
        """Fills the rows of `embeddings` `[N, num_dims]`, longest texts first."""
        training = self.embedder.training
        self.embedder.eval()
        with without_gradients(self.embedder):
            for rows in self.passes([len(ids) for ids in token_ids]):
                texts = [token_ids[row] for row in rows] or [[0]]
                vectors = self.embedder(PackedTexts.from_token_ids(texts))[: len(rows), : self.num_dims]
                if self.embedder.normalize and self.num_dims < self.embedder.num_dims:
                    vectors = torch.nn.functional.normalize(vectors, dim=-1)
                embeddings[rows] = vectors.cpu()
        self.embedder.train(training)


def _read_json(name_or_path: str, filename: str) -> Any:
    """A JSON file of a folder or hub repository; None when it has no such file."""
    found = cached_file(
        name_or_path,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LayoutError(f"{found}: not valid JSON ({error}); export the weights again") from error

"""What lies in a weights folder, from file names and headers: `weight_files(folder)`, `read_headers(folder)`.

Tensor data is not touched, and what the names mean is left to `layout`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ostro.errors import CheckpointError, LayoutError
from ostro.models.folder import INDEX_NAME, find_weights, read_dtypes


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    Attributes:
        key: Its stored name.
        file: The safetensors file.
        dtype: In the words of safetensors, such as `BF16` or `F8_E4M3`.
        shape: Its dims; empty for a scalar.
        num_bytes: Its size in the file.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the dims."""
        return prod(self.shape)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that together hold each tensor once: `model.safetensors`, else those its index names.

    `consolidated*.safetensors`, which hold the same weights again under Mistral's own names, are left out.

    Args:
        folder: A weights folder in Hugging Face layout.

    Raises:
        LayoutError: When `config.json` or the weights are absent, or there in Mistral's native layout only.
        CheckpointError: When the folder does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a weights folder")
    entry = find_weights(folder)
    if entry.name != INDEX_NAME:
        return (entry,)
    return tuple(sorted({folder / name for name in _weight_map(folder).values()}))


def read_headers(folder: Path) -> tuple[StoredTensor, ...]:
    """Every tensor of a weights folder, in the order of the files.

    Args:
        folder: A weights folder in Hugging Face layout.

    Raises:
        LayoutError: As `weight_files`.
        CheckpointError: When the folder does not exist; when a file is missing, truncated or unreadable; when the index
            and the files disagree about where a tensor is.
    """
    files = weight_files(folder)
    tensors = tuple(tensor for file in files for tensor in _read_header(file))
    if files != (folder / "model.safetensors",):
        found = {tensor.key: tensor.file.name for tensor in tensors}
        listed = _weight_map(folder)
        wrong = sorted(key for key in listed.keys() | found.keys() if listed.get(key) != found.get(key))
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX_NAME}: disagrees with the files about {len(wrong)} tensors "
                f"({', '.join(wrong[:10])}); the folder mixes two sets of shards, download or export it again"
            )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: The file.

    Raises:
        LayoutError: When it is not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LayoutError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LayoutError(f"{path}: not JSON ({error}); restore or download the file again") from error
    if not isinstance(content, dict):
        raise LayoutError(f"{path}: must hold an object, got {type(content).__name__}")
    return content


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict):
        raise LayoutError(f"{folder / INDEX_NAME}: has no weight_map; restore or download the file again")
    return weight_map


def _read_header(file: Path) -> list[StoredTensor]:
    read_dtypes(file)  # refuses what is truncated or not a safetensors file
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    tensors = []
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors.append(StoredTensor(key, file, entry["dtype"], tuple(entry["shape"]), end - begin))
    return tensors

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
from ostro.models.folder import (
    INDEX_NAME,
    NATIVE_INDEX_NAME,
    NATIVE_NAME,
    find_native_weights,
    find_weights,
    read_header,
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    Attributes:
        key: Its stored name.
        file: The safetensors file.
        dtype: In the words of safetensors, such as `BF16` or `F8_E4M3`.
        shape: Its dims; empty for a scalar.
        begin: Where its bytes begin in the file.
        num_bytes: Its size in the file.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Product of the dims."""
        return prod(self.shape)


def is_native(folder: Path) -> bool:
    """Whether a folder is to be read in Mistral's native layout: it has those files, and not the Hugging Face ones.

    Args:
        folder: Any folder.

    Raises:
        CheckpointError: When an index cannot be read.
    """
    stock = (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in ("model.safetensors", INDEX_NAME)
    )
    return not stock and bool(find_native_weights(folder))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that together hold each tensor once: `model.safetensors`, else those its index names.

    `consolidated*.safetensors`, which hold the same weights under Mistral's own names, are left out beside them, and
    taken where they are alone.

    Args:
        folder: A weights folder in Hugging Face or native layout.

    Raises:
        LayoutError: When there are no weights, or no `config.json` or `params.json` with them.
        CheckpointError: When the folder does not exist.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a weights folder")
    if is_native(folder):
        return find_native_weights(folder)
    entry = find_weights(folder)
    if entry.name != INDEX_NAME:
        return (entry,)
    return tuple(sorted({folder / name for name in _weight_map(entry).values()}))


def read_headers(folder: Path) -> tuple[StoredTensor, ...]:
    """Every tensor of a weights folder, in the order of the files.

    Args:
        folder: A weights folder in Hugging Face or native layout.

    Raises:
        LayoutError: As `weight_files`.
        CheckpointError: When the folder does not exist; when a file is missing, truncated, damaged or unreadable; when
            the index and the files disagree about where a tensor is.
    """
    files = weight_files(folder)
    index = folder / (NATIVE_INDEX_NAME if is_native(folder) else INDEX_NAME)
    is_indexed = files not in ((folder / "model.safetensors",), (folder / NATIVE_NAME,)) and index.is_file()
    if is_indexed and (absent := [file.name for file in files if not file.is_file()]):
        raise CheckpointError(
            f"{index}: names {len(absent)} files that are not there ({', '.join(absent[:10])}); download them"
        )
    tensors = tuple(
        StoredTensor(key, file, entry.dtype, entry.shape, entry.begin, entry.end - entry.begin)
        for file in files
        for key, entry in read_header(file).items()
    )
    if is_indexed:
        found = {tensor.key: tensor.file.name for tensor in tensors}
        listed = _weight_map(index)
        wrong = sorted(key for key in listed.keys() | found.keys() if listed.get(key) != found.get(key))
        if wrong:
            raise CheckpointError(
                f"{index}: disagrees with the files about {len(wrong)} tensors "
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


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise LayoutError(f"{index}: has no weight_map; restore or download the file again")
    return weight_map

"""What a weights folder must hold before transformers reads it, so that a bad folder gets a clear error.

It leaves keys and shapes to `backbone`, and hub ids (whose files transformers fetches and verifies) to transformers.
The idea: a safetensors file begins with 8 bytes of header length and a JSON header that gives the byte range of every
tensor, so a truncated file is known by its size alone.

Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ostro.errors import CheckpointError, LayoutError, shorten

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
NATIVE_NAME, NATIVE_INDEX_NAME = "consolidated.safetensors", "consolidated.safetensors.index.json"
PARAMS_NAME = "params.json"
"""What a folder in Mistral's native layout has instead of `config.json`."""

# Bytes of an element by the format's type names, of those that weights have.
_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
}


def is_local(model_name_or_path: str) -> bool:
    """Whether a name means a folder here rather than a hub id (`organisation/name`).

    A mistyped path must not be looked for on the hub, which takes half a minute to fail where there is no network: what
    has not the form of a hub id, or begins with a folder that is here, can only be a path.

    Args:
        model_name_or_path: What the user wrote.

    Raises:
        CheckpointError: When the name can only be a path, and nothing is there.
        LayoutError: When it is a file.
    """
    path = Path(model_name_or_path)
    if path.is_dir():
        return True
    if path.is_file():
        raise LayoutError(f"{path}: is a file, expected the weights folder that holds it")
    is_id = model_name_or_path.count("/") == 1 and not model_name_or_path.startswith((".", "~", os.sep))
    if not is_id or path.parent.is_dir():
        raise CheckpointError(
            f"{path}: no such folder{_nearest(path)}; give a weights folder or a hub id such as organisation/name"
        )
    logger.info("%s: no such folder here%s; taken as a hub id", path, _nearest(path))
    return False


def _nearest(path: Path) -> str:
    """The entry most like the first part of a path that is not there, for a message."""
    while not path.parent.is_dir():
        path = path.parent
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f" (nearest: {path.parent / near[0]})" if near else ""


def check_weights_folder(folder: Path) -> None:
    """Checks that a folder holds a configuration and whole safetensors files in Hugging Face layout.

    Args:
        folder: An existing folder.

    Raises:
        LayoutError: When the configuration or the weights are absent, or there in Mistral's native layout only; when an
            FP8 weight has no scale, without which its values mean nothing.
        CheckpointError: When a weights file is missing, truncated or unreadable.
    """
    entry = find_weights(folder)
    dtypes: dict[str, str] = {}
    for file in _indexed_files(entry) if entry.name == INDEX_NAME else [entry]:
        dtypes |= read_dtypes(file)
    bare = [key for key, dtype in dtypes.items() if dtype == "F8_E4M3" and f"{key}_scale_inv" not in dtypes]
    if bare:
        raise LayoutError(f"{folder}: {len(bare)} FP8 weights without weight_scale_inv ({shorten(bare)})")


def find_weights(folder: Path) -> Path:
    """`model.safetensors` of a folder, else the index of its shards.

    Args:
        folder: An existing folder in Hugging Face layout.

    Raises:
        LayoutError: When `config.json` or the weights are absent, or there in Mistral's native layout only.
    """
    single, index = folder / "model.safetensors", folder / INDEX_NAME
    absent = [] if (folder / "config.json").is_file() else ["config.json"]
    if not single.is_file() and not index.is_file():
        absent.append(single.name)
    if absent:
        native = sorted(path.name for name in ("params.json", "consolidated*") for path in folder.glob(name))
        hint = "expected a folder in Hugging Face layout, as save_pretrained writes it"
        if native:
            hint = (
                f"it holds Mistral's native layout ({', '.join(native[:3])}), which transformers does not load; add "
                "the Hugging Face files of the same release (config.json and model*.safetensors)"
            )
        raise LayoutError(f"{folder}: no {' and no '.join(absent)}; {hint}")
    return single if single.is_file() else index


def find_native_weights(folder: Path) -> tuple[Path, ...]:
    """The weights files of a folder in Mistral's native layout: one, or those of its index, or all that are numbered.

    Args:
        folder: Any folder.

    Returns:
        `consolidated*.safetensors` in order; none when the folder has no `params.json` or no such file.

    Raises:
        CheckpointError: When the index cannot be read.
    """
    if not (folder / PARAMS_NAME).is_file():
        return ()
    if (folder / NATIVE_NAME).is_file():
        return (folder / NATIVE_NAME,)
    if (folder / NATIVE_INDEX_NAME).is_file():
        return tuple(_indexed_files(folder / NATIVE_INDEX_NAME))
    return tuple(sorted(folder.glob("consolidated*.safetensors")))


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as the header of its file describes it.

    Attributes:
        dtype: In the words of the format, such as `BF16` or `F8_E4M3`.
        shape: Its dims; empty for a scalar.
        begin: Where its bytes begin in the file.
        end: Where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, HeaderEntry]:
    """Reads the header of a safetensors file and checks it: a flipped bit or a missing end does not pass for a model.

    Sizes must follow from types and shapes, tensors lie side by side without a gap, and the file have the length that
    the header promises.

    Args:
        file: The file.

    Returns:
        The entries by key, in the file's order.

    Raises:
        CheckpointError: When it is absent, unreadable, truncated, damaged or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            if sys.platform == "linux":  # else storage reads some MiB of tensors ahead, in every file on every rank
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size)) if header_size <= size - 8 else {}
        header.pop("__metadata__", None)
        start = 8 + header_size
        entries = {key: _entry(value, start) for key, value in header.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); restore or download it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error!r}); download it again") from error
    expected = max((entry.end for entry in entries.values()), default=start)
    if size != expected:
        raise CheckpointError(f"{file}: has {size} bytes, its header promises {expected}; download it again")
    for key, entry in entries.items():
        num_bytes = prod(entry.shape) * _ITEM_BYTES.get(entry.dtype, -1)
        if num_bytes >= 0 and num_bytes != entry.end - entry.begin:
            raise CheckpointError(
                f"{file}: the header is damaged: {key} is {entry.dtype} {list(entry.shape)}, so {num_bytes} bytes, and "
                f"is given {entry.end - entry.begin}; download it again"
            )
    end = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise CheckpointError(
                f"{file}: the header is damaged: {key} begins at byte {entry.begin}, the one before it ends at {end}; "
                "download it again"
            )
        end = entry.end
    return entries


def _entry(value: Mapping[str, Any], start: int) -> HeaderEntry:
    begin, end = value["data_offsets"]
    if not isinstance(value["dtype"], str):
        raise TypeError(value["dtype"])
    return HeaderEntry(value["dtype"], tuple(map(int, value["shape"])), start + begin, start + end)


def read_dtypes(file: Path) -> dict[str, str]:
    """Types of the tensors in a safetensors file, in the format's words (such as `BF16`), by key.

    Args:
        file: The file.

    Raises:
        CheckpointError: As `read_header`.
    """
    return {key: entry.dtype for key, entry in read_header(file).items()}


def _indexed_files(index: Path) -> list[Path]:
    """The weights files an index lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}); restore or download it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download it again") from error
    return [index.parent / name for name in sorted(names)]

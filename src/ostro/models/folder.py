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
from collections.abc import Iterable
from pathlib import Path

from ostro.errors import CheckpointError, LayoutError

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"


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
        raise LayoutError(f"{folder}: {len(bare)} FP8 weights without weight_scale_inv ({first_ten(bare)})")


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


def read_dtypes(file: Path) -> dict[str, str]:
    """Reads the header of a safetensors file and checks that the file has the length it promises.

    Args:
        file: The file.

    Returns:
        The format's dtype name (such as `BF16`) by key.

    Raises:
        CheckpointError: When it is absent, unreadable, truncated or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size)) if header_size <= size - 8 else {}
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        expected = 8 + header_size + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        dtypes = {key: str(entry["dtype"]) for key, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); restore or download it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error!r}); download it again") from error
    if size != expected:
        raise CheckpointError(f"{file}: has {size} bytes, its header promises {expected}; download it again")
    return dtypes


def first_ten(keys: Iterable[str]) -> str:
    """Up to ten of the keys, in order, for a message."""
    ordered = sorted(keys)
    return ", ".join(ordered[:10]) + (", ..." if len(ordered) > 10 else "")


def _indexed_files(index: Path) -> list[Path]:
    """The weights files an index lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}); restore or download it again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r}); download it again") from error
    return [index.parent / name for name in sorted(names)]

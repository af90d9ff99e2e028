"""Writing a weights folder: it appears whole or not at all, and its tensors pass through memory one shard at a time.

Which tensors there are, and their values, is the caller's business.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ostro.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together and stored in the same shard, such as an FP8 weight and its scales.

    Attributes:
        num_bytes: Their size in the file.
        make: Makes them, by stored key.
    """

    num_bytes: int
    make: Callable[[], Mapping[str, torch.Tensor]]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder written under another name and renamed at the end: what stops the writing leaves nothing half-done.

    Args:
        folder: The folder to make; absent or empty.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: When the folder exists and is not empty, or something cannot be written.
    """
    folder = folder.absolute()
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder}: exists already, expected no folder or an empty one; choose another or remove it"
            )
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():  # a killed run's
            shutil.rmtree(partial)
        try:
            partial.mkdir(parents=True)
            yield partial
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{folder}: cannot be written ({reason}); free some space or choose another folder"
        ) from error


@contextmanager
def replace_folder(folder: Path, is_export: Callable[[Path], bool], *, overwrite: bool) -> Iterator[Path]:
    """`new_folder`, which takes the place of an earlier export when it is whole.

    Args:
        folder: The folder to make.
        is_export: Whether what is in a folder is an earlier export, and not something of the user's.
        overwrite: Whether such a folder is replaced.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: When the folder holds anything else, or an export that is not to be replaced, or something
            cannot be written.
    """
    if not is_export(folder):
        with new_folder(folder) as new:
            yield new
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: holds an earlier export; pass overwrite=True or choose another folder")
    replacement, earlier = (folder.with_name(f".{folder.name}.ostro-{suffix}") for suffix in ("new", "earlier"))
    for leftover in (replacement, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    with new_folder(replacement) as new:
        yield new
    folder.rename(earlier)
    replacement.rename(folder)
    shutil.rmtree(earlier)


def write_shards(folder: Path, pieces: Sequence[Piece], *, max_shard_gib: float, stem: str = "model") -> None:
    """Writes `model.safetensors`, or numbered shards and their index; memory holds one shard at a time.

    Args:
        folder: An existing folder.
        pieces: All tensors, in the order of the files.
        max_shard_gib: Size above which a shard is closed, in GiB; a single larger piece has a shard to itself.
        stem: What the file names begin with; `consolidated` in Mistral's native layout.
    """
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + piece.num_bytes > max_shard_gib * 2**30:
            shards.append([])
        shards[-1].append(piece)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        name = f"{stem}{part}.safetensors"
        weight_map |= dict.fromkeys(_write_shard(folder / name, shard), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(piece.num_bytes for piece in pieces)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def _write_shard(file: Path, pieces: Sequence[Piece]) -> list[str]:
    """Writes one file and returns its keys; its tensors are gone from memory on return."""
    tensors = {key: tensor for piece in pieces for key, tensor in piece.make().items()}
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors leaves the file readable by its owner only, and a server is often another user
    return list(tensors)

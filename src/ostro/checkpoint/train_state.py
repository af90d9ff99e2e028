"""Train state on disk, to go on from after a stop: `save_train_state`, `latest_train_state`, `load_train_state`.

What is in the state is the training loop's business. The idea: a checkpoint is a folder of its own, written beside
under a `.tmp` name, flushed to the disk and renamed, so that a kill at any moment leaves the earlier ones as they were;
`latest` names the one to go on from. A state is split in two: tensors, which torch.distributed.checkpoint stores by
dotted name (so that later each rank can write and read its own part), and the same nested mapping with a mark in place
of each tensor, which is pickled and comes back exactly. As with any pickle, load only checkpoints you trust.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ostro.errors import CheckpointError, shorten

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-([0-9]{8,})")
_LATEST, _MANIFEST, _TMP = "latest", "files.json", ".tmp"
# Name of the pickled part among the tensors; theirs begin with a key of the state, which is not empty.
_PLAIN = ".plain"
SINGLE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"
"""How a warning of torch begins that is none: one rank writes, and each reads on its own."""


@dataclass(frozen=True)
class _TensorMark:
    """Stands for a tensor in the pickled part of a state."""

    name: str


@dataclass(frozen=True)
class _Plain:
    """The pickled part, wrapped so that torch.distributed.checkpoint stores it whole instead of entry by entry."""

    state: dict[str, Any]


def save_train_state(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep_last: int,
    keep: Collection[int] = (),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes a checkpoint and drops old ones; whatever goes wrong, the earlier checkpoints stay loadable.

    Args:
        folder: Where the checkpoints of a run are; made when it does not exist.
        step: Optimizer steps done, >= 0.
        state: Nested mappings of tensors and plain (picklable) values; a tensor's dotted path is its name in the files.
        keep_last: Checkpoints to keep, this one included, >= 1.
        keep: Steps whose checkpoints are kept besides.
        group: Ranks that write it together, after one of them has called `prepare_folder`; None for one process.

    Returns:
        The checkpoint, `folder/step-00000100`.

    Raises:
        CheckpointError: When it cannot be written, for want of space or rights.
        ValueError: When `step` or `keep_last` is out of range, or two tensors have the same dotted path.
        TypeError: When a list or tuple in the state holds a tensor.

    Distributed: with `group`, every rank calls it and writes its part of the split tensors; rank 0 writes the rest, and
        publishes when all parts are there. What fails before that fails on every rank.
    """
    with _single_process():
        return write_train_state(folder, step, state, keep_last=keep_last, keep=keep, group=group)


def write_train_state(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep_last: int,
    keep: Collection[int] = (),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """`save_train_state` for a thread, which must not silence torch's warning (`SINGLE_PROCESS`) for the others."""
    if step < 0 or keep_last < 1:
        raise ValueError(f"step must be >= 0 and keep_last >= 1, got {step} and {keep_last}")
    plain, tensors = _split(state)
    path = train_state_path(folder, step)
    partial = path.with_name(path.name + _TMP)
    try:
        if group is None:
            prepare_folder(folder)
        entries = {**tensors, _PLAIN: _Plain(plain)}
        save(entries, checkpoint_id=partial, process_group=group, no_dist=group is None)
        if group is not None and group.rank() > 0:
            return path
        _write_file(partial / _MANIFEST, json.dumps({file.name: file.stat().st_size for file in partial.iterdir()}))
        _flush_folder(partial)
        if path.exists():  # torn, or of a run that started again further back
            path.rename(path.with_name(f"{path.name}.replaced{_TMP}"))
        partial.rename(path)
        _write_file(folder / f"{_LATEST}{_TMP}", path.name)
        (folder / f"{_LATEST}{_TMP}").replace(folder / _LATEST)
        _flush_folder(folder)
    except (CheckpointException, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _not_written(path, error) from error
    _drop_old(folder, path, keep_last, keep)
    return path


def prepare_folder(folder: Path) -> None:
    """Makes the folder of the checkpoints where it is missing, and removes what a kill left in it.

    Raises:
        CheckpointError: When it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written ({_reason(error)}); free some space or mend the rights and start again: "
        "the run goes on from the checkpoint before, which is intact"
    )


def train_state_path(folder: Path, step: int) -> Path:
    """Where `save_train_state` writes the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def latest_train_state(folder: Path) -> Path | None:
    """The checkpoint to go on from: the one `latest` names, else the whole one with the most steps.

    A checkpoint that is torn or incomplete is passed over, with one warning in the log for all of them.

    Args:
        folder: Where the checkpoints of a run are.

    Returns:
        Its path; None when there is none.
    """
    named = _read_latest(folder)
    candidates = sorted(_checkpoints(folder), key=lambda path: (path.name == named, _step_of(path)), reverse=True)
    skipped = []
    for path in candidates:
        if damage := _damage(path):
            skipped.append(f"{path} ({damage})")
            continue
        if skipped:
            logger.warning("passed over damaged checkpoints: %s; going on from %s", ", ".join(skipped), path)
        return path
    if skipped:
        logger.warning("passed over damaged checkpoints: %s; no other is left", ", ".join(skipped))
    return None


def tensor_names(state: Mapping[str, Any]) -> list[str]:
    """The names that the tensors of a state have in the files."""
    return list(_split(state)[1])


def load_train_state(path: Path, state: Mapping[str, Any], *, elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """Reads a checkpoint into a state of the same form.

    Args:
        path: A checkpoint, as `latest_train_state` returns it.
        state: The state as it stands now. Its tensors are overwritten in place. An entry without a tensor, such as an
            optimizer's before the first step, says nothing about form: it is read as it was saved, its tensors on the
            CPU.
        elsewhere: Names of tensors that other ranks have in their states: not read, and not missed here.

    Returns:
        The saved mapping: plain values as they were saved, tensors those of `state` or new ones.

    Raises:
        CheckpointError: When the checkpoint cannot be read, or is of a state with other entries, tensors, shapes or
            types; `state` is then partly overwritten if the files turned out damaged midway, and untouched otherwise.
    """
    if damage := _damage(path):
        raise CheckpointError(f"{path}: not a whole checkpoint ({damage}); use another, or none to start again")
    targets = _split(state)[1]
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        absent = set(elsewhere) - targets.keys()
        saved = {
            name: entry
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata) and name not in absent
        }
        plain = _load(path, {_PLAIN: _Plain({})})[_PLAIN].state
        _check_form(path, state, plain, targets, saved)
        for name, entry in saved.items():
            targets.setdefault(name, torch.empty(entry.size, dtype=entry.properties.dtype))
        _load(path, targets)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_reason(error)}); use an earlier checkpoint") from error
    return _join(plain, targets)


def _load(path: Path, entries: dict[str, Any]) -> dict[str, Any]:
    if entries:
        with _single_process():
            load(entries, checkpoint_id=path, no_dist=True)
    return entries


def _check_form(
    path: Path,
    state: Mapping[str, Any],
    plain: Mapping[str, Any],
    targets: Mapping[str, torch.Tensor],
    saved: Mapping[str, TensorStorageMetadata],
) -> None:
    """Compares what is in memory with what is in the files, before anything is overwritten."""
    if state.keys() != plain.keys():
        raise CheckpointError(
            f"{path}: has the entries {', '.join(plain)}, expected {', '.join(state)}; "
            "it is of another kind of run or another version"
        )
    shaped = {name.partition(".")[0] for name in targets}
    missing = [name for name in targets if name not in saved]
    unexpected = [name for name in saved if name not in targets and name.partition(".")[0] in shaped]
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: other tensors than this run's; missing: {shorten(missing) or 'none'}; "
            f"unexpected: {shorten(unexpected) or 'none'}; use the recipe and versions of the run that saved it"
        )
    for name, tensor in targets.items():
        here, there = (tensor.dtype, tuple(tensor.shape)), (saved[name].properties.dtype, tuple(saved[name].size))
        if here != there:
            raise CheckpointError(
                f"{path}: {name} is {there[0]} {there[1]}, expected {here[0]} {here[1]}; "
                "use the recipe of the run that saved it"
            )


def _split(state: Mapping[Any, Any], prefix: str = "") -> tuple[dict[Any, Any], dict[str, torch.Tensor]]:
    """The state with marks for its tensors, and the tensors by dotted path."""
    plain: dict[Any, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            plain[key], found = _TensorMark(name), {name: value.detach()}
        elif isinstance(value, Mapping):
            plain[key], found = _split(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
            raise TypeError(f"{name}: a {type(value).__name__} with tensors; give them names in a mapping")
        else:
            plain[key], found = value, {}
        if doubled := found.keys() & tensors.keys():
            raise ValueError(f"{', '.join(sorted(doubled))}: two tensors have this path")
        tensors |= found
    return plain, tensors


def _join(plain: Mapping[Any, Any], tensors: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    def restore(value: Any) -> Any:
        if isinstance(value, _TensorMark):
            return tensors[value.name]
        return _join(value, tensors) if isinstance(value, Mapping) else value

    here = (item for item in plain.items() if not isinstance(item[1], _TensorMark) or item[1].name in tensors)
    return {key: restore(value) for key, value in here}


@contextmanager
def _single_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SINGLE_PROCESS, UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """What went wrong, out of torch's collection of tracebacks by rank; an interrupt inside it is raised again."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, (KeyboardInterrupt, SystemExit)):
                raise cause
        error = causes[0]
    # torch's zip writer covers a failed write with an error of its own about positions
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__context__
    text = (str(error) or type(error).__name__).splitlines()[0]
    # the cause stays behind on the rank that met it
    return "a rank could not write its file, as on a full disk" if "inline_container" in text else text


def _damage(path: Path) -> str:
    """Why a checkpoint cannot be loaded, from its list of files and their sizes; empty when it is whole."""
    try:
        sizes: dict[str, int] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
    except FileNotFoundError as error:
        return f"no {Path(str(error.filename)).name}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read_latest(folder: Path) -> str:
    try:
        return (folder / _LATEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _drop_old(folder: Path, newest: Path, keep_last: int, keep: Collection[int]) -> None:
    """Removes all but the newest `keep_last` whole checkpoints; torn ones count last."""
    ranked = sorted(
        _checkpoints(folder), key=lambda path: (path == newest, not _damage(path), _step_of(path)), reverse=True
    )
    try:
        for path in ranked[keep_last:]:
            if _step_of(path) not in keep:
                # first out of the way: a kill halfway through the removal must not leave what looks like a checkpoint
                path.rename(path.with_name(path.name + _TMP))
        _remove_leftovers(folder)
    except OSError as error:
        logger.warning("%s: an old checkpoint could not be removed (%s)", error.filename, error.strerror)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"*{_TMP}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_file(path: Path, text: str) -> None:
    """Writes a small file and has it on the disk before returning."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    """Has the renames in a folder on the disk before returning."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A weights folder as storage that torch.distributed.checkpoint loads a model from: `Fp8StorageReader(folder)`.

Making the model, and deciding what each rank owns, is left to `load`. The idea: to the planner of
torch.distributed.checkpoint the folder holds every parameter under its name in the model and with its shape there, so
that sharding is the planner's business alone; what a rank asks for is then read row by row:

* with `os.preadv` into a small buffer, or straight into the parameter where nothing has to change. Files are never
  mapped and their read-ahead is off, so that storage delivers the rows that were asked for and not a folder's worth of
  neighbours; of a column range whole rows are read, which costs storage no more;
* FP8 is dequantised piece by piece into the parameter's own memory, on its device: beyond the parameters a process
  holds a few MiB. The scale is looked up by the weight's name, whichever file it is in;
* rows that Mistral's native layout stores in another order are put in the model's order on the way.

Each rank reads by itself, without a collective, so that ranks with nothing to read wait for none.

Source: the format section of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ostro.checkpoint.files import StoredTensor, read_headers
from ostro.errors import CheckpointError, LayoutError, shorten
from ostro.fp8.quantize import FP8_DTYPE, dequantize, scale_of_rows
from ostro.models.fp8_adapter import match_keys, to_runtime_rows

_DTYPES = {"F8_E4M3": FP8_DTYPE, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8_NAME = "F8_E4M3"
_FP8_LARGEST = 448.0
# Bytes read at once: few enough to stay in the cache of a core, or enough to keep the link to a device busy.
_CPU_PIECE_BYTES, _DEVICE_PIECE_BYTES = 1 << 21, 1 << 25


class Fp8StorageReader(StorageReader):
    """Reads the parameters of `Mistral3ForConditionalGeneration` from a folder in any layout, FP8 or not.

    Attributes:
        keys: Which stored key holds what, and the layout.
        shapes: Of every stored weight, by runtime name.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype = torch.bfloat16, head_dim: Callable[[str], int] | None = None
    ) -> None:
        """Reads all headers once, and checks them.

        Args:
            folder: A weights folder.
            dtype: What the values are rounded to; parameters have this type or a wider one.
            head_dim: Rows of one attention head by runtime name of a q or k weight; needed for the native layout.

        Raises:
            LayoutError: When keys, types or scales are not those of a known layout.
            CheckpointError: When a file is missing, truncated, damaged or unreadable.
        """
        tensors = read_headers(folder)
        self._tensors = {tensor.key: tensor for tensor in tensors}
        self._folder, self._dtype, self._head_dim = folder, dtype, head_dim
        self._scales: dict[str, torch.Tensor] = {}
        try:
            self.keys = match_keys((tensor.key, tensor.dtype == _FP8_NAME, tensor.shape) for tensor in tensors)
        except LayoutError as error:
            raise LayoutError(f"{folder}: {error}") from error
        used = (*self.keys.weights.values(), *self.keys.scales.values(), *self.keys.activation_scales.values())
        if strange := [
            f"{key} ({self._tensors[key].dtype})" for key in used if self._tensors[key].dtype not in _DTYPES
        ]:
            raise LayoutError(f"{folder}: expected tensors of type {', '.join(_DTYPES)}, got {shorten(strange)}")
        self.shapes = {name: self._tensors[key].shape for name, key in self.keys.weights.items()}

    def scale(self, name: str) -> torch.Tensor:
        """The scale of an FP8 weight as it is stored, on the CPU.

        Args:
            name: Runtime name of the weight.

        Raises:
            CheckpointError: When it is not a finite number above 0, or makes the largest FP8 value infinite.
        """
        if name not in self._scales:
            tensor = self._tensors[self.keys.scales[name]]
            scale = self._read_whole(tensor)
            largest = (scale.float() * _FP8_LARGEST).to(self._dtype)
            if not bool(((scale.float() > 0) & torch.isfinite(largest)).all()):
                raise CheckpointError(
                    f"{tensor.file}: {tensor.key}: must be > 0 and finite in {self._dtype} times {_FP8_LARGEST:.0f}, "
                    f"got {scale.float().min().item():g} to {scale.float().max().item():g}; download the file again"
                )
            self._scales[name] = scale
        return self._scales[name]

    def scales(self) -> dict[str, torch.Tensor]:
        """The scale of every FP8 weight, by its runtime name.

        Raises:
            CheckpointError: As `scale`.
        """
        return {name: self.scale(name) for name in self.keys.scales}

    def activation_scales(self) -> dict[str, torch.Tensor]:
        """Static activation scales as they are stored, by the runtime name of the weight they belong to."""
        return {name: self._read_whole(self._tensors[key]) for name, key in self.keys.activation_scales.items()}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every weight under its runtime name as one whole tensor.

        Args:
            *args: Not used.
            **kwargs: Not used.
        """
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=self._dtype),
                    size=torch.Size(shape),
                    chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))],
                )
                for name, shape in self.shapes.items()
            }
        )

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget: a reader is for one folder.

        Args:
            checkpoint_id: Not used.
        """

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: headers are read already.

        Args:
            metadata: Not used.
            is_coordinator: Not used.
            *args: Not used.
            **kwargs: Not used.
        """

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is.

        Args:
            plan: What this rank will read.
        """
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are.

        Args:
            plans: Of all ranks that were planned together.
        """
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a path is a folder.

        Args:
            checkpoint_id: A path.
        """
        return Path(checkpoint_id).is_dir()

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads all parts of a plan, in the order of the files, and checks that they are finite.

        Args:
            plan: What this rank reads.
            planner: Knows where it goes.

        Raises:
            CheckpointError: When a file cannot be read, or holds infinite or nan values.
        """
        by_file: dict[Path, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self._stored(item.storage_index.fqn).file, []).append(item)
        for file, items in sorted(by_file.items()):
            with _opened(file) as descriptor:
                for item in sorted(items, key=lambda item: self._stored(item.storage_index.fqn).begin):
                    target = planner.resolve_tensor(item).detach()
                    self._read(descriptor, item.storage_index.fqn, item.storage_offsets, item.lengths, target)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _stored(self, name: str) -> StoredTensor:
        return self._tensors[self.keys.weights[name]]

    def _read(
        self, descriptor: int, name: str, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor
    ) -> None:
        """Fills `target` with the part of a weight that begins at `offsets` and has size `lengths`."""
        stored, on_cpu = self._stored(name), target.device.type == "cpu"
        dtype, row_shape = _DTYPES[stored.dtype], stored.shape[1:]
        first, count = (offsets[0], lengths[0]) if stored.shape else (0, 1)
        columns = tuple(slice(offset, offset + length) for offset, length in zip(offsets[1:], lengths[1:], strict=True))
        target = target.view(count, *target.shape[1:])
        row_bytes = dtype.itemsize * prod(row_shape)
        unit = self._unit(name)
        piece_bytes = _CPU_PIECE_BYTES if on_cpu else _DEVICE_PIECE_BYTES
        step = max(1, piece_bytes // max(1, row_bytes) // unit) * unit
        # straight into the parameter, where bytes stay as they are
        is_copy = on_cpu and unit == 1 and dtype == self._dtype == target.dtype and target.shape[1:] == row_shape
        is_copy = is_copy and target.is_contiguous()
        if not is_copy:
            staging = torch.empty(min(step, -(-(count + unit) // unit) * unit), *row_shape, dtype=dtype)
        for begin in range(first // unit * unit, first + count, step):
            end = min(begin + step, -(-(first + count) // unit) * unit)
            low, high = max(begin, first), min(end, first + count)
            part = target[low - first : high - first]
            raw = part if is_copy else staging[: end - begin]
            _fill(descriptor, raw, stored, stored.begin + begin * row_bytes)
            _check_finite(raw, stored, begin)
            if is_copy:
                continue
            rows = slice(low - begin, high - begin)
            if dtype == FP8_DTYPE:
                self._place_fp8(name, raw, begin, rows, columns, part)
            else:
                values = to_runtime_rows(raw, unit) if unit > 1 else raw
                values = values[(rows, *columns)]
                # a narrower type rounds as it is written, a wider one is to hold what that would be
                part.copy_(values if part.dtype == self._dtype else values.to(self._dtype))

    def _place_fp8(
        self,
        name: str,
        raw: torch.Tensor,
        begin: int,
        rows: slice,
        columns: tuple[slice, ...],
        part: torch.Tensor,
    ) -> None:
        """Dequantises whole stored rows from `begin` on, and writes `rows` of them and `columns` to `part`."""
        shape, unit = self._stored(name).shape, self._unit(name)
        scale = scale_of_rows(self.scale(name), shape, torch.arange(begin, begin + len(raw))).to(part.device)
        if part.shape[1] != shape[1] and (not scale.dim() or scale.shape[1] == 1):
            raw = raw[:, columns[0]].contiguous()
            columns = (slice(None),)
        raw = raw.to(part.device)
        if part.shape == raw.shape and part.dtype == self._dtype and unit == 1:
            dequantize(raw, scale, part.dtype, out=part)
        else:
            values = dequantize(raw, scale, self._dtype)
            values = to_runtime_rows(values, unit) if unit > 1 else values
            part.copy_(values[(rows, *columns)])

    def _unit(self, name: str) -> int:
        """Rows that have to be read together: a head where its rows are interleaved, else one."""
        if not self.keys.layout.interleaves(name):
            return 1
        if self._head_dim is None:
            raise ValueError("head_dim: needed to read a folder in the native layout")
        return self._head_dim(name)

    def _read_whole(self, tensor: StoredTensor) -> torch.Tensor:
        result = torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype])
        with _opened(tensor.file) as descriptor:
            _fill(descriptor, result, tensor, tensor.begin)
        return result


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); restore or download it again") from error
    try:
        if sys.platform == "linux":
            # without this, storage reads some MiB around every row range, and so nearly the whole folder on every rank
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_finite(raw: torch.Tensor, stored: StoredTensor, begin: int) -> None:
    """Refuses infinite and nan values; FP8 has no infinite one, and its scale is checked by itself."""
    if not raw.numel():
        return
    if raw.dtype == FP8_DTYPE:
        # 0x7f and 0xff, each the largest byte in one reading
        is_finite = int(raw.view(torch.int8).amax()) != 0x7F and int(raw.view(torch.uint8).amax()) != 0xFF
    else:
        is_finite = all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(raw))  # nan passes through
    if not is_finite:
        raise CheckpointError(
            f"{stored.file}: {stored.key}: has infinite or nan values in rows {begin} to {begin + len(raw) - 1}; "
            "download the file again"
        )


def _fill(descriptor: int, target: torch.Tensor, stored: StoredTensor, position: int) -> None:
    """Fills a contiguous tensor on the CPU with the bytes of a file from `position` on."""
    if not target.numel():
        return
    buffer = memoryview(target.view(-1).view(torch.uint8).numpy().data)
    while buffer:
        try:
            count = os.preadv(descriptor, [buffer], position)
        except OSError as error:
            raise CheckpointError(f"{stored.file}: {stored.key}: cannot be read ({error.strerror})") from error
        if not count:
            raise CheckpointError(
                f"{stored.file}: {stored.key}: the file ends at byte {position}, was it changed while it was read?"
            )
        buffer, position = buffer[count:], position + count

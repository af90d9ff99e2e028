"""Rows of a data file by number, with the file left on disk.

What the rows mean is left to `corpus`, `retrieval` and `conversation`. The idea: exact shuffling, exact resuming and
data larger than memory all ask for the same thing, row i at any time. A JSONL file is memory-mapped and indexed by the
byte offsets of its lines (8 bytes per row, found in one pass that parses nothing); Parquet files and hub data sets are
the memory-mapped Arrow tables of `datasets`. A row is parsed when it is asked for, and what is wrong with it is
reported by file and line. Only a JSON file that is one list is read into memory: its rows have no lines of their own.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ostro.errors import DataError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]

_SCAN_BYTES = 1 << 22


class Records(Protocol):
    """Rows in file order, read on demand; iterating reads them all once, in order."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int) -> Row:
        """Row `index`, from 0."""

    def __iter__(self) -> Iterator[Row]:
        """All rows in order."""

    def where(self, index: int) -> str:
        """File and line (or row) of row `index`, the beginning of every error about it."""


class JsonLines:
    """The JSON objects of a JSONL file; blank lines count as lines but not as rows."""

    def __init__(self, path: Path) -> None:
        """Indexes the line ends of a file.

        Args:
            path: A UTF-8 file with one JSON object per line.

        Raises:
            DataError: When the file cannot be read or has no rows.
        """
        self.path = path
        self._bytes = _map_file(path)
        self._ends = _line_ends(self._bytes)
        self._lines: Sequence[int] | npt.NDArray[np.int64] = range(len(self._ends))
        # One byte is a blank line or "\r"; JSON objects have at least two.
        short = np.flatnonzero(np.diff(self._ends, prepend=-1) <= 2)
        if len(short):
            blank = [line for line in short if not self._line(line).strip()]
            self._lines = np.delete(np.arange(len(self._ends)), blank)
        if not len(self._lines):
            raise DataError(f"{path}: has no rows; expected one JSON object per line")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._lines)

    def __getitem__(self, index: int) -> Row:
        """The object of row `index`.

        Raises:
            DataError: When the line is not a JSON object in UTF-8.
            IndexError: When there is no such row.
        """
        return read_object(self._line(int(self._lines[index])), self.where(index))

    def __iter__(self) -> Iterator[Row]:
        """All rows in order."""
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """`file:line` of row `index`, lines from 1."""
        return f"{self.path}:{int(self._lines[index]) + 1}"

    def _line(self, line: int) -> bytes:
        start = int(self._ends[line - 1]) + 1 if line else 0
        return self._bytes[start : int(self._ends[line])]


def read_object(line: bytes, where: str) -> Row:
    """The JSON object on a line.

    Args:
        line: Its bytes.
        where: File and line, for errors.

    Raises:
        DataError: When the line is not a JSON object in UTF-8.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); every line must be a JSON object"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, got {type(row).__name__}")
    return row


def read_json_file(path: Path, expected: str) -> Any:
    """What a JSON file holds, whatever it is.

    Args:
        path: A UTF-8 file.
        expected: What the file should hold, for the message when it is not JSON.

    Raises:
        DataError: When the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}); convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}); {expected}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class JsonList:
    """The objects of a JSON file that is one list; read whole, so JSONL is the better form for large data."""

    def __init__(self, path: Path) -> None:
        """Reads a file.

        Args:
            path: A UTF-8 file with a JSON list.

        Raises:
            DataError: When the file cannot be read, is not a JSON list or has no rows.
        """
        self.path = path
        content = read_json_file(
            path, "expected a list of objects; a file with one object per line must be named .jsonl"
        )
        if not isinstance(content, list):
            raise DataError(f"{path}: must be a list of objects, got {type(content).__name__}")
        if not content:
            raise DataError(f"{path}: has no rows; expected a list of objects")
        self._rows: list[Any] = content

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """The object of row `index`.

        Raises:
            DataError: When it is not an object.
            IndexError: When there is no such row.
        """
        row = self._rows[index]
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)}: must be a JSON object, got {type(row).__name__}")
        return row

    def __iter__(self) -> Iterator[Row]:
        """All rows in order."""
        return (self[index] for index in range(len(self)))

    def where(self, index: int) -> str:
        """`file: row` of row `index`, rows from 1."""
        return f"{self.path}: row {index + 1}"


class ArrowRows:
    """The rows of a `datasets` table, memory-mapped from its cache.

    Values are as they are stored: an image is its bytes or path, not decoded.
    """

    def __init__(self, name: str, table: datasets.Dataset) -> None:
        """Wraps a table.

        Args:
            name: File, folder or hub name, for error messages.
            table: The rows.

        Raises:
            DataError: When there are no rows.
        """
        if not len(table):
            raise DataError(f"{name}: has no rows")
        self.path = name
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._table)

    def __getitem__(self, index: int) -> Row:
        """Row `index`."""
        (row,) = self._table[index].to_pylist()
        stored: Row = row
        return stored

    def __iter__(self) -> Iterator[Row]:
        """All rows in order."""
        return (row for part in self._table for row in part.to_pylist())

    def where(self, index: int) -> str:
        """`name: row`, rows from 1."""
        return f"{self.path}: row {index + 1}"


def open_parquet(files: Sequence[Path], name: Path) -> ArrowRows:
    """Opens Parquet files as one table.

    Args:
        files: The files, in order.
        name: What to call them in errors.

    Raises:
        DataError: When a file is not readable as Parquet, or there are no rows.
    """
    import datasets

    try:
        table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: cannot be read as Parquet ({_first_line(error)})") from error
    return ArrowRows(str(name), table)


def open_hub(name: str, *, subset: str | None, split: str) -> ArrowRows:
    """Opens a data set of the hub, or a local folder in the form that `datasets` loads.

    Args:
        name: Hub name, or folder.
        subset: Configuration, where the data set has several.
        split: Split to take.

    Raises:
        DataError: When it cannot be loaded.
    """
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: split {split!r} cannot be loaded by datasets ({_first_line(error)})") from error
    return ArrowRows(name, table)


def may_be_hub_name(path: str) -> bool:
    """Whether a path that is not there may be the name `owner/name` of a data set on the hub.

    It may not when it has the name of a data file or begins with a folder that is here.
    """
    return (
        path.count("/") == 1
        and not path.startswith((".", "/", "~"))
        and not Path(path).suffix.startswith((".json", ".parquet"))
        and not Path(path).parent.is_dir()
    )


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Reads a text file line by line.

    Args:
        path: A UTF-8 file.

    Yields:
        `file:line` and the line without its end, blank lines left out.

    Raises:
        DataError: When the file cannot be read or a line is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}:{number}", error) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise DataError(f"{path}: is empty; expected one JSON object per line") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _line_ends(content: mmap.mmap) -> npt.NDArray[np.int64]:
    """Offsets of the line ends; the end of the file is the last one."""
    size = len(content)
    parts = []
    for start in range(0, size, _SCAN_BYTES):
        block = np.frombuffer(content, np.uint8, min(_SCAN_BYTES, size - start), start)
        parts.append(np.flatnonzero(block == ord("\n")).astype(np.int64) + start)
    if content[-1] != ord("\n"):
        parts.append(np.array([size], dtype=np.int64))
    return np.concatenate(parts)


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{where}: not UTF-8 (byte {error.start + 1} of the line is 0x{byte:02x}); convert the file to UTF-8"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

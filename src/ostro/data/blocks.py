"""A corpus in blocks that can be read apart, on any machine: `cut_into_blocks`, then `read_block` for each.

What is done with the texts is left to the caller. The idea: a block is a byte range of a JSONL or text file and owns
the lines that begin in it, so cutting needs file sizes only and no index; in Parquet it is a range of rows within one
row group. Lines are counted only to tell where a wrong one is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ostro.data.corpus import ID_COLUMNS, Document, read_document
from ostro.data.records import read_object
from ostro.errors import DataError

if TYPE_CHECKING:
    import pyarrow.parquet

_PARQUET = ".parquet"


@dataclass(frozen=True)
class Block:
    """A part of a file.

    Attributes:
        file: JSONL, text or Parquet, by its suffix.
        begin: Its first byte; in Parquet, its first row.
        end: The byte, or row, after its last.
    """

    file: str
    begin: int
    end: int


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The files of a corpus.

    Args:
        paths: Files, BEIR folders (their `corpus.jsonl` is taken) and folders of files; those in them with another
            suffix, and folders, are left out.

    Returns:
        Absolute paths in the order of their names.

    Raises:
        DataError: For a path that is not there, a suffix that is not read, a folder without files, and two files of one
            name.
    """
    files: dict[str, Path] = {}
    for path in paths:
        for file in _files_of(path.resolve()):
            if file.suffix not in _SUFFIXES:
                raise DataError(f"{file}: unknown suffix; expected one of {', '.join(_SUFFIXES)}")
            if files.setdefault(file.name, file) != file:
                raise DataError(f"{file}: has the name of {files[file.name]}; shards go by name, so rename one")
    return [files[name] for name in sorted(files)]


def cut_into_blocks(files: Iterable[Path], block_bytes: int) -> list[Block]:
    """Cuts files into blocks, always the same ones; reads file sizes and the footers of Parquet files.

    Args:
        files: What `find_files` found.
        block_bytes: Size of a block; in Parquet, of its rows without compression, about.

    Raises:
        DataError: When a file cannot be read.
    """
    return [block for file in files for block in _cut(file, block_bytes)]


def read_block(block: Block) -> Iterator[Document]:
    """The documents of a block in order.

    A JSONL line or Parquet row has `text`, and where known `title` and an id (`_id`, `id` or `docid`). A line of a text
    file is a text, taken as it is. Where there is no id, it is the SHA-1 of the text.

    Raises:
        DataError: For a row that is wrong, with its line, and for a file that cannot be read.
    """
    if block.file.endswith(_PARQUET):
        yield from _read_rows(block)
        return
    parse = _PARSERS[Path(block.file).suffix]
    for offset, line in _lines(block):
        try:
            document = parse(line, "")
        except DataError:
            # parsed again with its place, which takes a pass over all of the file before it
            document = parse(line, f"{block.file}:{_line_number(block.file, offset)}")
        if document is not None:
            yield document


def read_text(line: bytes, where: str) -> str:
    """The text on a line, without the line end.

    Args:
        line: Its bytes.
        where: File and line, for errors.

    Raises:
        DataError: When it is blank or not UTF-8.
    """
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); convert the text first") from error
    if not text.strip():
        raise DataError(f"{where}: empty line; every line is one text")
    return text


def _files_of(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if (path / "corpus.jsonl").is_file():
        return [path / "corpus.jsonl"]
    files = [file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file()]
    if not files:
        raise DataError(f"{path}: has no file to read; expected corpus.jsonl, or files named {', '.join(_SUFFIXES)}")
    return files


def _cut(file: Path, block_bytes: int) -> Iterator[Block]:
    if file.suffix == _PARQUET:
        with _open_parquet(str(file)) as table:
            begin = 0
            for group in map(table.metadata.row_group, range(table.metadata.num_row_groups)):
                step = max(1, group.num_rows * block_bytes // max(group.total_byte_size, block_bytes))
                end = begin + group.num_rows
                yield from (Block(str(file), row, min(row + step, end)) for row in range(begin, end, step))
                begin = end
        return
    size = file.stat().st_size
    for begin in range(0, size, block_bytes):
        yield Block(str(file), begin, min(begin + block_bytes, size))


def _lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line that begins in the block."""
    try:
        with open(block.file, "rb") as file:
            offset = block.begin
            if offset:
                # from the byte before: when that is a line end, the line after it is ours
                file.seek(offset - 1)
                offset += len(file.readline()) - 1
            while offset < block.end:
                line = file.readline()
                if not line:
                    raise DataError(f"{block.file}: ends before byte {block.end}; it was cut short meanwhile")
                yield offset, line
                offset += len(line)
    except OSError as error:
        raise DataError(f"{block.file}: cannot be read ({error.strerror})") from error


def _line_number(path: str, offset: int) -> int:
    """Number of the line that begins at an offset, from 1."""
    number = 1
    with open(path, "rb") as file:
        while offset > 0:
            part = file.read(min(offset, 1 << 22))
            number += part.count(b"\n")
            offset -= len(part)
    return number


def _parse_json(line: bytes, where: str) -> Document | None:
    """A blank line is no document, as in `records.JsonLines`."""
    return read_document(read_object(line, where), where) if line.strip() else None


def _parse_text(line: bytes, where: str) -> Document:
    text = read_text(line, where)
    return Document(hashlib.sha1(text.encode()).hexdigest(), text)


_PARSERS: dict[str, Callable[[bytes, str], Document | None]] = {".jsonl": _parse_json, ".txt": _parse_text}
_SUFFIXES = (*_PARSERS, _PARQUET)


def _read_rows(block: Block) -> Iterator[Document]:
    with _open_parquet(block.file) as file:
        group = first = 0
        while first + file.metadata.row_group(group).num_rows <= block.begin:
            first += file.metadata.row_group(group).num_rows
            group += 1
        columns = [name for name in file.schema_arrow.names if name in (*ID_COLUMNS, "title", "text")]
        with _told_as_parquet(block.file):
            rows = file.read_row_group(group, columns=columns).slice(block.begin - first, block.end - block.begin)
    for number, row in enumerate(rows.to_pylist(), block.begin + 1):
        yield read_document(row, f"{block.file}: row {number}")


def _open_parquet(path: str) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet

    with _told_as_parquet(path):
        return pyarrow.parquet.ParquetFile(path)


@contextmanager
def _told_as_parquet(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: cannot be read as Parquet ({reason})") from error

"""Blocks: whatever the cut, every document once and in order, and a wrong one with its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from ostro.data.blocks import cut_into_blocks, find_files, read_block
from ostro.data.corpus import Corpus, Document
from ostro.data.records import JsonLines
from ostro.errors import DataError

ROWS = [{"_id": f"d{number}", "title": "t" * (number % 3), "text": f"text {'x' * (7 * number)}"} for number in range(9)]


def read(*paths: Path, block_bytes: int) -> Iterator[Document]:
    for block in cut_into_blocks(find_files(paths), block_bytes):
        yield from read_block(block)


@pytest.mark.parametrize("block_bytes", [1, 2, 40, 41, 64, 4096])
def test_jsonl_is_the_corpus_whatever_the_cut(tmp_path: Path, block_bytes: int) -> None:
    file = tmp_path / "corpus.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    file.write_text("\n".join(lines[:4]) + "\n\n\r\n" + "\r\n".join(lines[4:]), encoding="utf-8")
    corpus = Corpus(JsonLines(file))
    expected = [Document(id, corpus[id]) for id in corpus]
    assert list(read(tmp_path, block_bytes=block_bytes)) == expected


@pytest.mark.parametrize("block_bytes", [1, 3, 1024])
def test_lines_of_text_are_taken_as_they_are(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.txt").write_bytes(b" one \r\ntwo\n")
    (tmp_path / "b.txt").write_bytes("\u00e9t\u00e9".encode())
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    documents = list(read(tmp_path, block_bytes=block_bytes))
    assert [document.text for document in documents] == [" one ", "two", "\u00e9t\u00e9"]
    assert documents[1].id == "ad782ecdac770fc6eb9a62e44f90873fb97fb26b"  # printf two | sha1sum


@pytest.mark.parametrize("block_bytes", [1, 150, 1 << 20])
def test_parquet_rows(tmp_path: Path, block_bytes: int) -> None:
    rows = [{**row, "other": 1.0} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=4)
    blocks = cut_into_blocks([tmp_path / "x.parquet"], block_bytes)
    assert len(blocks) == {1: 9, 1 << 20: 3}.get(block_bytes, len(blocks))
    documents = [document for block in blocks for document in read_block(block)]
    assert [document.id for document in documents] == [row["_id"] for row in ROWS]
    assert documents[8].text == f"tt {ROWS[8]['text']}"


@pytest.mark.parametrize("block_bytes", [10, 1024])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n\n{"text": 2}\n{"text": "x"}\n', "a.jsonl:3: no text"),
        ("a.jsonl", b'{"text": "one"}\n{"text"\n', "a.jsonl:2: not JSON"),
        ("a.txt", b"one line\n\xff\nthree\n", "a.txt:2: not UTF-8"),
        ("a.txt", b"a longer line\nanother\n \n", "a.txt:3: empty line"),
    ],
)
def test_a_wrong_row_is_told_by_its_line(
    tmp_path: Path, block_bytes: int, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read(tmp_path, block_bytes=block_bytes))
    assert str(error.value).startswith(f"{tmp_path}/{message}")


def test_a_wrong_parquet_row_is_told_by_its_number(tmp_path: Path) -> None:
    rows = [{"text": "a"}] * 5 + [{"text": " "}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=4)
    with pytest.raises(DataError, match=r"x\.parquet: row 6: empty text"):
        list(read(tmp_path, block_bytes=1 << 20))


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("a.jsonl", "other/a.jsonl", "x.csv", "empty/x.md", "bad.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    for paths, message in {
        ("a.json",): "a.json: no such file or folder",
        ("x.csv",): "x.csv: unknown suffix; expected one of .jsonl, .txt, .parquet",
        ("empty",): "empty: has no file to read",
        ("a.jsonl", "other"): "other/a.jsonl: has the name of",
    }.items():
        with pytest.raises(DataError, match=message):
            find_files([tmp_path / path for path in paths])
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet"):
        cut_into_blocks([tmp_path / "bad.parquet"], 64)

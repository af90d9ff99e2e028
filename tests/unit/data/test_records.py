"""Rows by number from files that stay on disk."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from ostro.data import records
from ostro.data.records import JsonLines, open_parquet, read_lines
from ostro.errors import DataError
from tests.unit.data.files import write_jsonl


@pytest.mark.parametrize("scan_bytes", [1, 7, 1 << 22])
@pytest.mark.parametrize("last_line_end", ["\n", ""])
def test_rows_are_found_at_any_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_bytes: int, last_line_end: str
) -> None:
    monkeypatch.setattr(records, "_SCAN_BYTES", scan_bytes)
    rows = [{"a": 1}, {"b": "zwölf\u2028"}, {"c": [1, 2]}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + last_line_end
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    lines = JsonLines(tmp_path / "a.jsonl")
    assert [lines[2], lines[0], lines[1]] == [rows[2], rows[0], rows[1]]
    assert list(lines) == rows


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n\r\n{"a": 2}\n\n')
    lines = JsonLines(path)
    assert list(lines) == [{"a": 1}, {"a": 2}]
    assert lines.where(1) == f"{path}:4"


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": "x" * 10_000} for _ in range(3_000)))
    tracemalloc.start()
    lines = JsonLines(path)
    assert lines[2_999]["text"] == "x" * 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 30_000_000
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"a": 1}\n{"a": \n', 2, "not JSON"),
        (b'{"a": 1}\n{"a": "\xff"}\n', 2, "not UTF-8 \\(byte 8 of the line is 0xff\\)"),
        (b'{"a": 1}\n\n[1]\n', 3, "must be a JSON object, got list"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    lines = JsonLines(path)
    assert lines[0] == {"a": 1}
    with pytest.raises(DataError, match=f"^{path}:{line}: {message}"):
        lines[1]


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"", "is empty"), (b"\n\n", "no rows")])
def test_a_file_without_rows_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        JsonLines(path)


def test_lines_of_text_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("größe\t1\r\n\nb\n\xff\n".encode("latin-1").replace(b"gr\xf6\xdfe", "größe".encode()))
    lines = read_lines(path)
    assert [next(lines), next(lines)] == [(f"{path}:1", "größe\t1"), (f"{path}:3", "b")]
    with pytest.raises(DataError, match=f"^{path}:4: not UTF-8"):
        next(lines)


def test_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=f"^{path}: cannot be read as Parquet"):
        open_parquet([path], path)

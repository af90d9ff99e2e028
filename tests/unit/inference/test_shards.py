"""The folder of an encoded corpus: what is finished, what is refused, and how it is read."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest

from ostro.errors import DataError, RecipeError
from ostro.inference.shards import MANIFEST, ShardFolder, fingerprint, write_shard

SETTINGS = {"weights": "ab", "num_dims": 4, "input_bytes": {"a.jsonl": 10, "b.jsonl": 20}}
NUM_ROWS = {"shard-000000.parquet": 3, "shard-000001.parquet": 2, "shard-000003.parquet": 2}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with a manifest of `NUM_ROWS` and the first of its shards."""
    folder = ShardFolder(tmp_path / "out", SETTINGS)
    folder.start(NUM_ROWS)
    write_shard(folder.path / "shard-000000.parquet", ["a", "b", "c"], vectors(3))
    return folder.path


def vectors(num_rows: int) -> numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float32]]:
    return numpy.arange(num_rows * 4, dtype=numpy.float32).reshape(num_rows, 4)


def test_what_is_missing_is_left_to_do(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ShardFolder(path, SETTINGS)
    assert folder.num_rows == NUM_ROWS
    assert folder.unfinished() == ["shard-000001.parquet", "shard-000003.parquet"]
    write_shard(path / "shard-000001.parquet", ["d", "e"], vectors(2))
    write_shard(path / "shard-000003.parquet", ["f"], vectors(1))
    torn = (path / "shard-000000.parquet").read_bytes()[:-9]
    (path / "shard-000000.parquet").write_bytes(torn)
    with caplog.at_level(logging.INFO, "ostro"):
        assert folder.unfinished() == ["shard-000000.parquet", "shard-000003.parquet"]
    assert "shard-000000.parquet: cannot be read" in caplog.messages[0]
    assert caplog.messages[1].endswith("shard-000003.parquet: has 1 rows, not 2; encoded again")


def test_the_folder_is_read_as_one_table(path: Path) -> None:
    write_shard(path / "shard-000001.parquet", ["d", "e"], vectors(2))
    table = pyarrow.parquet.read_table(path)
    assert table["id"].to_pylist() == ["a", "b", "c", "d", "e"]
    stacked = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    numpy.testing.assert_array_equal(stacked, numpy.concatenate([vectors(3), vectors(2)]))
    assert list(path.glob(".*")) == []


def test_other_settings_are_refused_and_named(path: Path) -> None:
    other = {"weights": "cd", "num_dims": 4, "input_bytes": {"a.jsonl": 11, "c.jsonl": 5}}
    with pytest.raises(RecipeError) as error:
        ShardFolder(path, other)
    told = (
        "input_bytes a.jsonl was 10, now 11, input_bytes b.jsonl was 20, now absent, "
        "input_bytes c.jsonl was absent, now 5, weights was ab, now cd"
    )
    assert str(error.value) == f"--output: {path} was made with other settings ({told}); choose another folder"


def test_a_folder_that_is_not_ours_is_left_alone(path: Path) -> None:
    (path / MANIFEST).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        ShardFolder(path, SETTINGS)
    (path / MANIFEST).unlink()
    with pytest.raises(RecipeError, match=f"is there and has no {MANIFEST}"):
        ShardFolder(path, SETTINGS)


def test_a_failed_write_leaves_nothing(path: Path) -> None:
    (path / "shard-000009.parquet").mkdir()
    with pytest.raises(OSError):
        write_shard(path / "shard-000009.parquet", ["a"], vectors(1))
    assert list(path.glob(".*")) == []


def test_the_fingerprint_is_of_contents(tmp_path: Path) -> None:
    found = set()
    for name, content in (("a", b"x"), ("a", b"y"), ("b", b"y")):
        folder = tmp_path / f"{name}{content.decode()}"
        (folder / "1_Pooling").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
        (folder / "1_Pooling" / f"{name}.json").write_bytes(b"{}")
        before = fingerprint(folder)
        (folder / "README.md").write_bytes(content)
        assert fingerprint(folder) == before
        found.add(before)
    assert len(found) == 3

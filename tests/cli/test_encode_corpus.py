"""`ostro encode --engine ray`: a corpus in shards, interrupted and gone on with, by a real local Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest

from ostro.data.blocks import cut_into_blocks, find_files
from ostro.errors import DataError
from ostro.inference import ray_engine
from ostro.inference.encoder import Encoder
from tests.cli.conftest import Command, Outcome
from tests.unit.data.files import write_jsonl

TEXTS = [f"ship {number} {'sails north ' * (number % 7)}" for number in range(60)]


def encode(weights: Path, corpus: Path, output: Path, *words: str) -> Outcome:
    """The command in a process of its own: Ray leaves threads and handlers behind."""
    command = [sys.executable, "-m", "ostro", "encode", weights, "--engine", "ray"]
    given = [*command, "--input", corpus, "--output", output, *words]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(list(map(str, given)), capture_output=True, text=True, env=environment, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of 20 documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(3):
        rows = [{"_id": f"d{number}", "text": TEXTS[number]} for number in range(20 * part, 20 * part + 20)]
        write_jsonl(folder / f"part-{part}.jsonl", rows)
    return folder


@pytest.mark.timeout(600)  # two starts of Ray, 30 CPU seconds
def test_a_corpus_is_encoded_and_gone_on_with(weights: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors"
    first = encode(weights, corpus, output, "--num-dims", "64")
    assert (first.code, first.out) == (0, f"{output}: 60 vectors in 3 shards\n"), first.err
    table = pyarrow.parquet.read_table(output)
    assert table["id"].to_pylist() == [f"d{number}" for number in range(60)]
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 64)
    encoder = Encoder.from_pretrained(weights, num_dims=64)
    texts = [text.strip() for text in TEXTS]
    for part in range(3):
        rows = slice(20 * part, 20 * part + 20)
        numpy.testing.assert_array_equal(vectors[rows], encoder.encode_document(texts[rows]).numpy())
    # other texts beside a text change the order in which a bfloat16 product adds up
    numpy.testing.assert_allclose(vectors, encoder.encode_document(texts).numpy(), atol=2e-3)
    manifest = json.loads((output / "_manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["num_dims"] == 64
    assert manifest["settings"]["prompt"] == "document"
    assert manifest["total_rows"] == 60

    # what a kill leaves: a shard not there, one under its first name
    (output / "shard-000001.parquet").unlink()
    (output / ".shard-000001.parquet.0.tmp").write_bytes(b"PAR1")
    times = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    second = encode(weights, corpus, output, "--num-dims", "64")
    assert (second.code, second.out) == (0, first.out), second.err
    assert f"{output}: 2 of 3 shards are there and are skipped\n" in second.err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(times) == 2
    assert pyarrow.parquet.read_table(output).equals(table)
    assert sorted(path.name for path in output.iterdir()) == ["_manifest.json", *manifest["num_rows"]]


def test_what_is_refused_before_ray_starts(ostro: Command, weights: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["encode", weights, "--engine", "ray", "--input", corpus, "--output", tmp_path / "out"]
    (tmp_path / "empty.txt").touch()
    for more, code, message in (
        (["--num-dims", "1000"], 2, "--num-dims: 1000 exceeds the model's 192 dims"),
        (["--format", "npy"], 2, "Invalid value for --engine: ray: needs --input and --output, and no --format"),
        (["--input", tmp_path / "none"], 1, f"{tmp_path / 'none'}: no such file or folder"),
        (["--output", corpus], 2, f"--output: {corpus} is there and has no _manifest.json; choose an absent or empty "),
    ):
        outcome = ostro(*words, *more)
        assert outcome.code == code
        assert f"error: {message}" in outcome.err
    empty = ostro("encode", weights, "--engine", "ray", "--input", tmp_path / "empty.txt", "--output", tmp_path / "out")
    assert empty.err == f"error: {tmp_path / 'empty.txt'}: empty; expected at least one text\n"
    assert not (tmp_path / "out").exists()
    hub = ostro("encode", "organisation/name", *words[2:])
    assert "error: organisation/name: --engine ray takes a folder, which all machines see; fetch it with" in hub.err
    local = ostro("encode", weights, "--input", corpus, stdin=b"text\n")
    assert (local.code, local.out) == (2, "")
    assert "only with --engine ray; else texts are read from stdin" in local.err


def test_a_missing_extra_is_named(
    ostro: Command, weights: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = ostro("encode", weights, "--engine", "ray", "--input", corpus, "--output", tmp_path / "out")
    assert (outcome.code, outcome.err) == (1, "error: ray: not installed; run: pip install 'ostro[ray]'\n")


def test_all_rows_are_read_before_the_first_is_encoded(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_mapped", lambda tasks, function: map(function, reversed(tasks)))
    tasks = [
        {"shard": f"shard-{number}", **asdict(block)}
        for number, block in enumerate(cut_into_blocks(find_files([corpus]), 1 << 20))
    ]
    assert ray_engine._count_rows(tasks) == {"shard-0": 20, "shard-1": 20, "shard-2": 20}
    for part in (1, 2):
        with (corpus / f"part-{part}.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"text": ""}\n')
    tasks = [{**task, "end": task["end"] + 1} for task in tasks[1:]]
    with pytest.raises(DataError, match=r"part-1\.jsonl:21: empty text.*\(and 1 more parts of the corpus"):
        ray_engine._count_rows(tasks)
    for task in tasks:
        Path(task["file"]).write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"part-1\.jsonl: has no rows"):
        ray_engine._count_rows([{**task, "begin": 0, "end": 2} for task in tasks])

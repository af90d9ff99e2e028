"""Each command does its work on real files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import numpy
import pytest
import yaml

from ostro.config import shipped_recipes
from ostro.inference.encoder import Encoder
from tests.cli.conftest import Command

TEXTS = ["credentials from memory", "\u00e9t\u00e9", "a\tb"]
STDIN = "\r\n".join(TEXTS).encode()


def test_encode_writes_npy(ostro: Command, weights: Path, tmp_path: Path) -> None:
    outcome = ostro("encode", weights, "--output", tmp_path / "x.npy", stdin=STDIN)
    assert outcome.code == 0
    written = numpy.load(tmp_path / "x.npy")
    assert written.dtype == numpy.float32
    numpy.testing.assert_array_equal(written, Encoder.from_pretrained(weights).encode_document(TEXTS).numpy())


def test_encode_writes_jsonl_to_stdout(ostro: Command, weights: Path) -> None:
    outcome = ostro("encode", weights, "--prompt", "none", "--num-dims", "8", stdin=STDIN)
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    expected = Encoder.from_pretrained(weights, num_dims=8).encode(TEXTS).numpy()
    numpy.testing.assert_array_equal(numpy.array([row["embedding"] for row in rows], dtype=numpy.float32), expected)


def test_encode_format_wins_over_suffix(ostro: Command, weights: Path, tmp_path: Path) -> None:
    assert ostro("encode", weights, "--output", tmp_path / "x.npy", "--format", "jsonl", stdin=STDIN).code == 0
    assert len((tmp_path / "x.npy").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"one\ntwo\n\n", "stdin:3: empty line"),
        (b"one\n\xff\n", "stdin:2: not UTF-8"),
        (b"", "stdin: no lines"),
    ],
)
def test_encode_names_the_bad_line(ostro: Command, weights: Path, stdin: bytes, message: str) -> None:
    outcome = ostro("encode", weights, stdin=stdin)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {message}")


def test_encode_refuses_more_dims_than_there_are(ostro: Command, weights: Path) -> None:
    outcome = ostro("encode", weights, "--num-dims", "1000", stdin=STDIN)
    assert outcome.code == 2
    assert outcome.err.endswith("error: Invalid value for --num-dims: 1000 exceeds the model's 192 dims\n")


def test_encode_refuses_truncated_weights(ostro: Command, weights: Path, tmp_path: Path) -> None:
    copy(weights, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    outcome = ostro("encode", tmp_path, stdin=STDIN)
    assert outcome.code == 1
    assert f"error: {tmp_path / 'model.safetensors'}: " in outcome.err


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A BEIR folder of 12 documents and 3 queries, each with one relevant document of the same words."""
    folder = tmp_path / "corpus"
    (folder / "qrels").mkdir(parents=True)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
    documents = [{"_id": f"d{row}", "title": "", "text": f"{word} {word}"} for row, word in enumerate(words)]
    queries = [{"_id": f"q{row}", "text": words[row]} for row in range(3)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labels = "".join(f"q{row}\td{row}\t1\n" for row in range(3))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + labels, encoding="utf-8")
    return folder


def test_evaluate_prints_and_keeps_the_report(ostro: Command, weights: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["--data", corpus, "--k", "1", "--k", "5", "--bm25", "--output", tmp_path / "kept"]
    outcome = ostro("evaluate", weights, *words)
    assert outcome.code == 0
    title, names, model, bm25 = outcome.out.splitlines()
    assert title == "corpus/test: 3 queries, 12 documents"
    assert {"nDCG@1", "nDCG@5"} <= set(names.split())
    assert model.split()[0] == "model"
    assert bm25.split()[:2] == ["BM25", "1.0000"]
    kept = json.loads((tmp_path / "kept" / "metrics.json").read_text(encoding="utf-8"))
    assert f"{kept['metrics']['nDCG@5']:.4f}" == model.split()[1 + names.split().index("nDCG@5")]
    assert (tmp_path / "kept" / "bm25" / "per_query.jsonl").is_file()


def test_evaluate_refuses_fewer_documents_than_k(ostro: Command, weights: Path, corpus: Path) -> None:
    outcome = ostro("evaluate", weights, "--data", corpus, "--k", "13")
    assert outcome.code == 2
    assert "12 documents, fewer than k = 13" in outcome.err


def test_train_export_inspect(ostro: Command, weights: Path, corpus: Path, tmp_path: Path) -> None:
    labels = (corpus / "qrels" / "test.tsv").read_text(encoding="utf-8")
    (corpus / "qrels" / "train.tsv").write_text(labels, encoding="utf-8")
    recipe = {
        "kind": "embed",
        "output": str(tmp_path / "run"),
        "model": {"weights": str(weights)},
        "data": {"train": [{"path": str(corpus)}], "global_batch_queries": 3, "micro_batch_tokens": 64},
        "train": {"num_steps": 2, "save_every": 1},
        "schedule": {"warmup_steps": 0},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert ostro("train", file, "optimizer.learning_rate=1e-3").code == 0
    assert "learning_rate: 0.001" in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    refused = ostro("train", file, "optimizer.learning_rate=1e-4")
    assert refused.code == 2
    assert "learning_rate" in refused.err

    outcome = ostro("export", tmp_path / "run", "--output", tmp_path / "exported")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'exported'}: the weights after step 2\n")
    own, exported = (
        Encoder.from_pretrained(folder).encode(TEXTS) for folder in (tmp_path / "run/weights", tmp_path / "exported")
    )
    numpy.testing.assert_array_equal(own.numpy(), exported.numpy())
    told = ostro("inspect", tmp_path / "exported").out
    assert "attention        bidirectional" in told
    assert re.search(r"memory +frozen, BF16 \d+\.\d MiB; .*; over all ranks, before activations", told)


def copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_inspect_tells_what_init_made(ostro: Command, weights: Path) -> None:
    outcome = ostro("inspect", weights)
    assert outcome.code == 0
    lines = dict(line.split("  ", 1) for line in outcome.out.splitlines())
    told = {label: value.strip() for label, value in lines.items()}
    assert told["layout"] == "nested"
    assert told["fp8"].startswith("21 weights, 21 scales")
    assert told["attention"] == "causal"
    assert told["vocabulary"] == "2,048"


def test_inspect_fails_on_a_faulty_folder(ostro: Command, weights: Path, tmp_path: Path) -> None:
    copy(weights, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = 1500
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    outcome = ostro("inspect", tmp_path)
    assert outcome.code == 1
    assert "problem: " in outcome.out


def test_init_leaves_a_folder_alone_that_is_not_empty(ostro: Command, weights: Path) -> None:
    before = (weights / "model.safetensors").read_bytes()
    outcome = ostro("init", weights)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {weights}: ")
    assert (weights / "model.safetensors").read_bytes() == before


def test_recipes_are_listed_and_shown(ostro: Command) -> None:
    listed = ostro("recipes", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == list(shipped_recipes())
    assert ostro("recipes").out.splitlines() == listed
    for name, text in shipped_recipes().items():
        assert ostro("recipes", "show", name).out == text


def test_the_schema_accepts_shipped_recipes_and_no_typo(ostro: Command) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(ostro("recipes", "schema").out))
    for text in shipped_recipes().values():
        # As editors read YAML 1.2: PyYAML alone takes 1e-3 for text.
        recipe = yaml.safe_load(re.sub(r"\b[\d.]+e-\d+", lambda number: f"{float(number[0]):.9f}", text))
        assert [error.message for error in validator.iter_errors(recipe)] == []
        assert not validator.is_valid({**recipe, "optimiser": {}})

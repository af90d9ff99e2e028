"""What an embedding run is judged by: evaluation before, during and after training, the exported folder, and the result
page.

The loop itself is in `embed`; how a set is searched and scored is in `retrieval`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from ostro.checkpoint.export import export_embedder, verify_export
from ostro.checkpoint.model_card import EmbedderSettings, ModelCard
from ostro.data.evaluation_set import open_evaluation
from ostro.data.retrieval import open_sources
from ostro.errors import missing_extra
from ostro.inference.encoder import Encoder
from ostro.models.embedder import Embedder
from ostro.models.tokenizer import TextTokenizer
from ostro.retrieval.bm25 import bm25
from ostro.retrieval.options import EvaluateOptions
from ostro.retrieval.report import RetrievalReport
from ostro.train.judges import Judges
from ostro.train.metrics import LiveLine, RunLog
from ostro.train.recipe import EmbedRecipe
from ostro.train.report import write_report
from ostro.train.shared import shared_search
from ostro.train.table import metric_table, summarise

# Texts on which the exported folder must give the vectors of the model in memory.
_NUM_VERIFIED_TEXTS = 64


@dataclass(frozen=True)
class EmbedResult:
    """What a finished run leaves.

    Attributes:
        folder: Run folder.
        weights: Exported folder.
        metrics: Test metrics of the trained model; empty without a test block.
        baselines: The same metrics of `BM25` and `untrained`, where they were asked for.
    """

    folder: Path
    weights: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def check_extras(recipe: EmbedRecipe) -> None:
    """Raises for a package that the run will need only at its end, so that no training is lost to it.

    Raises:
        OstroError: When a package of an extra is not installed.
    """
    needed = {"matplotlib": ("eval", "matplotlib")}
    if recipe.evaluate or recipe.test:
        needed["ir_measures"] = ("eval", "ir-measures")
    if recipe.test and recipe.test.bm25:
        needed |= {"bm25s": ("search", "bm25s"), "Stemmer": ("search", "PyStemmer")}
    for module, (extra, package) in needed.items():
        if importlib.util.find_spec(module) is None:
            raise missing_extra(extra, package)


def run_encoder(recipe: EmbedRecipe, embedder: Embedder, tokenizer: TextTokenizer) -> Encoder:
    """An encoder over the model being trained, with the prompts and limits that the exported folder will have."""
    return Encoder(embedder, tokenizer, prompts=recipe.data.prompts.model_dump(), max_tokens=recipe.max_tokens)


def evaluate_untrained(recipe: EmbedRecipe, encoder: Encoder, judges: Judges, log: RunLog, line: LiveLine) -> None:
    """Scores the model before its first step, on both held-out sets; `judges` share the texts."""
    if recipe.evaluate is not None:
        _search_and_log(recipe.evaluate, encoder, judges, 0, log)
    if recipe.test is not None:
        judges.keep_untrained(recipe.output, search(recipe.test, encoder, judges).metrics, line)


def evaluate_during(
    options: EvaluateOptions, encoder: Encoder, judges: Judges, step: int, log: RunLog, line: LiveLine
) -> float:
    """Scores the model after `step` steps, and gives the first metric; `judges` share the texts."""
    report = _search_and_log(options, encoder, judges, step, log)
    with judges.ranks.agreed():  # also the disk it prints to
        line.say(f"step {step}  {options.split}  {summarise(report.metrics)}")
    return next(iter(report.metrics.values()))


def _search_and_log(
    options: EvaluateOptions, encoder: Encoder, judges: Judges, step: int, log: RunLog
) -> RetrievalReport:
    report = search(options, encoder, judges)
    with judges.ranks.agreed():  # rank 0's disk may be full
        log.evaluation(step, options.split, report.metrics)
    return report


def finish(
    recipe: EmbedRecipe,
    embedder: Embedder,
    tokenizer: TextTokenizer,
    report: RetrievalReport | None,
    step: int,
    console: Console,
) -> EmbedResult:
    """Exports the trained model, verifies the export and writes the results.

    Args:
        recipe: The run.
        embedder: The trained model, whole.
        tokenizer: Its tokenizer.
        report: Its search of the test set; None without one.
        step: Optimizer steps done.
        console: Where the result is shown.

    Returns:
        The result, as also written to `result.json`.

    Raises:
        CheckpointError: When the exported folder does not give the vectors of the model in memory.
    """
    folder = Path(recipe.output)
    metrics: Mapping[str, float] = {}
    baselines: dict[str, Mapping[str, float]] = {}
    samples: list[dict[str, object]] = []
    if recipe.test is not None and report is not None:
        evaluation = open_evaluation(recipe.test.path, recipe.test.split)
        report.save(folder / "test")
        metrics = report.metrics
        if recipe.test.bm25:
            baselines["BM25"] = bm25(evaluation, recipe.test).metrics
        untrained = folder / "untrained.json"
        if untrained.exists():
            baselines["untrained"] = json.loads(untrained.read_text(encoding="utf-8"))
        samples = report.samples(evaluation)
    encoder = run_encoder(recipe, embedder, tokenizer)
    weights = export(recipe, encoder, folder / "weights", step=step, metrics=metrics)
    result = EmbedResult(folder, weights, metrics, baselines)
    page = {
        "kind": "embed",
        "metrics": dict(metrics),
        "baselines": {name: dict(values) for name, values in baselines.items()},
        "samples": samples,
    }
    (folder / "result.json").write_text(json.dumps(page, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(folder)
    show(result, console)
    return result


def export(recipe: EmbedRecipe, encoder: Encoder, folder: Path, *, step: int, metrics: Mapping[str, float]) -> Path:
    """Writes the folder that other libraries open, and proves that it gives the same vectors.

    Args:
        recipe: The run.
        encoder: Encoder over the trained model.
        folder: Where to write; an earlier export there is replaced.
        step: Optimizer steps done, for the model card.
        metrics: Test metrics for the model card.

    Returns:
        `folder`.

    Raises:
        CheckpointError: When the folder cannot be written, or read back to the same vectors.
    """
    embedder = encoder.embedder
    card = ModelCard(
        base_model=recipe.model.weights,
        datasets=tuple(source.path for source in recipe.data.train),
        metrics=dict(metrics),
        num_steps=step,
        loss=recipe.loss.model_dump(mode="json"),
    )
    settings = EmbedderSettings(
        encoder.prompts, encoder.max_tokens, embedder.pooling, embedder.normalize, recipe.loss.matryoshka_dims
    )
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.export.dtype]
    export_embedder(
        embedder.backbone, encoder.tokenizer, folder, settings=settings, card=card, dtype=dtype, overwrite=True
    )
    texts = _texts_to_verify(recipe)
    verify_export(folder, texts, encoder.encode(texts))
    return folder


def _texts_to_verify(recipe: EmbedRecipe) -> list[str]:
    """Real queries of the first training source, from its whole length."""
    source = open_sources(recipe.data)[0]
    picked = range(0, len(source), max(1, len(source) // _NUM_VERIFIED_TEXTS))
    return [source[index].query for index in picked][:_NUM_VERIFIED_TEXTS]


def show(result: EmbedResult, console: Console) -> None:
    """Prints the result table and where everything is."""
    if result.metrics:
        console.out(metric_table({"trained": result.metrics, **result.baselines}), highlight=False)
    console.out(f"weights  {result.weights}\nreport   {result.folder / 'report.html'}", highlight=False)


def search(options: EvaluateOptions, encoder: Encoder, judges: Judges) -> RetrievalReport:
    """Searches a held-out set, whose texts `judges` share; the same report on all of them.

    Distributed: as `Ranks.agreed` and `shared_search`.
    """
    with judges.ranks.agreed():
        evaluation = open_evaluation(options.path, options.split)
    return shared_search(evaluation, options, encoder, judges)

"""What a vision-language run is judged by: answers before, during and after training, the exported folder, and the
result page.

The loop itself is in `vlm`; how answers are made and scored is in `answers`.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ostro.checkpoint.export_vlm import export_vlm, verify_vlm
from ostro.checkpoint.fetch import fetch_weights
from ostro.data.conversation import Conversation, open_conversations
from ostro.errors import missing_extra
from ostro.inference.chat import Chat
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.train.answers import (
    AnswerReport,
    answer_by_question,
    evaluate_answers,
    open_held_out,
    question_of,
    reference_of,
)
from ostro.train.judges import Judges
from ostro.train.metrics import LiveLine, RunLog
from ostro.train.options import AnswerOptions
from ostro.train.recipe import VlmRecipe
from ostro.train.report import write_report
from ostro.train.table import metric_table, summarise

_NUM_SHOWN = 24
_THUMBNAIL_PIXELS = 160


@dataclass(frozen=True)
class VlmResult:
    """What a finished run leaves.

    Attributes:
        folder: Run folder.
        weights: Exported folder.
        metrics: Test metrics of the trained model; empty without a test block.
        baselines: The same metrics of `question only` and `untrained`.
    """

    folder: Path
    weights: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def check_extras() -> None:
    """Raises for a package that the run will need only at its end, so that no training is lost to it.

    Raises:
        OstroError: When matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("eval", "matplotlib")


def evaluate_untrained(recipe: VlmRecipe, chat: Chat, judges: Judges, log: RunLog, line: LiveLine) -> None:
    """Scores the model before its first step, on both held-out sets; `judges` share the conversations."""
    if recipe.evaluate is not None:
        _evaluate_and_log(recipe.evaluate, chat, judges, 0, log)
    if recipe.test is not None:
        judges.keep_untrained(recipe.output, answer_test(recipe.test, chat, judges).metrics, line)


def evaluate_during(
    options: AnswerOptions, chat: Chat, judges: Judges, step: int, log: RunLog, line: LiveLine
) -> float:
    """Scores the model after `step` steps, and gives the first metric; `judges` share the conversations."""
    metrics = _evaluate_and_log(options, chat, judges, step, log)
    with judges.ranks.agreed():  # also the disk it prints to
        line.say(f"step {step}  held out  {summarise(metrics)}")
    return next(iter(metrics.values()))


def answer_test(options: AnswerOptions, chat: Chat, judges: Judges) -> AnswerReport:
    """Has the model answer the test set; the same report on all judges, which share the conversations.

    Distributed: as `evaluate_answers`.
    """
    with judges.ranks.agreed():
        conversations = open_held_out(options, "test")
    return evaluate_answers(chat, conversations, options, judges)


def _evaluate_and_log(options: AnswerOptions, chat: Chat, judges: Judges, step: int, log: RunLog) -> dict[str, float]:
    with judges.ranks.agreed():
        conversations = open_held_out(options, "evaluate")
    report = evaluate_answers(chat, conversations, options, judges)
    assert report.loss is not None  # a model's, not a baseline's
    metrics = {**report.metrics, "loss": report.loss}
    with judges.ranks.agreed():  # rank 0's disk may be full
        log.evaluation(step, "held out", metrics)
    return metrics


def finish(
    recipe: VlmRecipe,
    model: Mistral3FP8VLMForConditionalGeneration,
    report: AnswerReport | None,
    step: int,
    console: Console,
) -> VlmResult:
    """Exports the trained model, verifies the export and writes the results.

    Args:
        recipe: The run.
        model: The trained model, whole.
        report: Its answers to the test set; None without one.
        step: Optimizer steps done.
        console: Where the result is shown.

    Returns:
        The result, as also written to `result.json`.

    Raises:
        CheckpointError: When the exported folder is not the model in memory.
    """
    folder = Path(recipe.output)
    metrics: Mapping[str, float] = {}
    baselines: dict[str, Mapping[str, float]] = {}
    samples: list[dict[str, Any]] = []
    if report is not None:
        report.save(folder / "test" / "answers.jsonl")
        metrics = report.metrics
        training = (conversation for source in open_conversations(recipe.data.train) for conversation in source)
        baselines["question only"] = answer_by_question(training, report.conversations).metrics
        untrained = folder / "untrained.json"
        if untrained.exists():
            baselines["untrained"] = json.loads(untrained.read_text(encoding="utf-8"))
        samples = _samples(report)
    weights = export(recipe, model, folder / "weights", step=step)
    result = VlmResult(folder, weights, metrics, baselines)
    page = {"kind": "vlm", "metrics": dict(metrics), "baselines": baselines, "samples": samples}
    (folder / "result.json").write_text(json.dumps(page, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(folder)
    if metrics:
        console.out(metric_table({"trained": metrics, **baselines}), highlight=False)
    console.out(f"weights  {weights}\nreport   {folder / 'report.html'}", highlight=False)
    return result


def export(recipe: VlmRecipe, model: Mistral3FP8VLMForConditionalGeneration, folder: Path, *, step: int) -> Path:
    """Writes the weights in the form of the folder they came from, and proves that they read back the same.

    Args:
        recipe: The run.
        model: The trained model.
        folder: Where to write; an earlier export there is replaced.
        step: Optimizer steps done, for the model card.

    Returns:
        `folder`.

    Raises:
        CheckpointError: When the folder cannot be written, or read back to the same weights.
    """
    source = fetch_weights(recipe.model.weights)
    export_vlm(model, source, folder, precision=recipe.export.precision, num_steps=step)
    verify_vlm(folder, model)
    return folder


def _samples(report: AnswerReport) -> list[dict[str, Any]]:
    """Conversations at even steps through the set, with small pictures of their images."""
    every = max(1, len(report.conversations) // _NUM_SHOWN)
    rows = list(zip(report.conversations, report.answers, report.correct, strict=True))[::every][:_NUM_SHOWN]
    return [
        {
            "question": question_of(conversation),
            "reference": reference_of(conversation),
            "answer": answer,
            "correct": right,
            "kind": conversation.kind,
            "images": _thumbnails(conversation),
        }
        for conversation, answer, right in rows
    ]


def _thumbnails(conversation: Conversation) -> list[str]:
    """The images of a conversation as base64 PNG files of at most 160 pixels a side."""
    encoded = []
    for image in (image for message in conversation.messages for image in message.images):
        picture = image.load()
        picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return encoded

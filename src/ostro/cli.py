"""The `ostro` command: each entry parses its arguments, calls one room and turns errors into exit codes.

The work is in the rooms. They are imported inside the entries, so that `--help` answers at once. Exit codes: 0 done,
1 failed, 2 usage (a recipe counts as usage), 130 interrupted. An error is one line on stderr, `error: ...`; `--debug`
anywhere on the line adds the traceback.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import typer

from ostro import __version__
from ostro.checkpoint.presets import LAYOUT_NAMES, PRECISIONS, SIZES
from ostro.cli_recipes import recipes_app
from ostro.errors import DataError, OstroError, RecipeError, ToldElsewhere, first_line, is_out_of_memory

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="ostro",
    epilog="Add --debug to any command to see the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes_app, name="recipes")

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Values that replace those of the recipe.")
]
Weights = Annotated[str, typer.Argument(metavar="WEIGHTS", help="Weights folder or hub id.", show_default=False)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ostro {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adapt Mistral-3 models: train search embedders and vision-language models, evaluate, export and use them."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


class Prompt(StrEnum):
    """Which of the folder's prompts goes before each text."""

    query = "query"
    document = "document"
    none = "none"


class Format(StrEnum):
    """How vectors are written."""

    npy = "npy"
    jsonl = "jsonl"


class Engine(StrEnum):
    """What encodes: this process, or workers on Ray Data."""

    local = "local"
    ray = "ray"


class Precision(StrEnum):
    """How an exported vision-language model stores what was FP8 in its source."""

    source = "source"
    bf16 = "bf16"
    fp8 = "fp8"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code.

    Args:
        arguments: Words after `ostro`; those of the process when None.

    Raises:
        SystemExit: Always.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by huggingface_hub and transformers
    # read by OpenMP when torch is imported: waiting threads sleep instead of spinning, which on a shared
    # machine takes the processor from the very thread they wait for (seen: 6 times the CPU seconds)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # read when torch is imported: its warnings of ranks that do not meet are stack traces, on every rank
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logger = logging.getLogger("ostro")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler := logging.StreamHandler(sys.stderr))
    try:
        code = app([word for word in words if word != "--debug"], prog_name="ostro", standalone_mode=False)
        if code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
    except (OstroError, OSError, typer.TyperException) as error:
        if debug:
            traceback.print_exception(error)
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if not isinstance(error, ToldElsewhere):
            print(f"error: {message}", file=sys.stderr)
        code = 1 if isinstance(error, OSError) else error.exit_code
    except (RuntimeError, MemoryError) as error:
        if debug or not is_out_of_memory(error):
            raise
        print(
            f"error: memory ran out ({first_line(error)}); use smaller batches, or a machine with more memory",
            file=sys.stderr,
        )
        code = 1
    finally:
        logger.removeHandler(handler)
    sys.exit(code or 0)


@app.command(epilog="Example: ostro train embed-demo output=runs/first train.num_steps=800")
def train(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train by a recipe; run it again to resume from the last checkpoint."""
    from ostro.config import load_recipe
    from ostro.train.recipe import KINDS

    try:
        loaded = load_recipe(recipe, overrides or [], KINDS)
    except RecipeError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # every process of a machine reads the same
            time.sleep(5)  # torchrun ends all of them when one ends: the one that tells has to be first
            raise ToldElsewhere(str(error)) from error
        raise

    from rich.console import Console

    from ostro.train import runtime
    from ostro.train.prepare import prepare_inputs
    from ostro.train.ranks import started_ranks
    from ostro.train.recipe import EmbedRecipe

    try:
        with started_ranks() as ranks:
            console = Console(quiet=not ranks.is_main)
            if not ranks.is_main:
                logging.getLogger("ostro").setLevel(logging.CRITICAL)
            ranks.on_main(lambda: prepare_inputs(loaded, console))
            # each loop is imported alone: the other one's packages may not be installed, and its import takes a second
            if isinstance(loaded, EmbedRecipe):
                from ostro.train import embed

                embed.run(loaded, console=console)
            else:
                from ostro.train import vlm

                vlm.run(loaded, console=console)
    except KeyboardInterrupt as error:
        message = f"{loaded.output}: interrupted; run the same command again to go on from its last checkpoint"
        raise runtime.Stopped(message, signal.SIGINT) from error


@app.command(epilog="Example: ostro plan vlm-mistral-medium-3.5-128b --gpus 64 --memory 80")
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Ranks, one per GPU.", show_default=False)] = ...,  # type: ignore[assignment]
    memory: Annotated[float, typer.Option(help="GiB of each GPU.", show_default=False)] = ...,  # type: ignore[assignment]
    gpus_per_machine: Annotated[int, typer.Option(help="GPUs with fast links to one another.")] = 8,
    image_share: Annotated[float, typer.Option(help="Share of a micro-batch's tokens that images take.")] = 0.5,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Whose attention kernels run.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Every split as JSON.")] = False,
) -> None:
    """Tell which splits of the ranks fit on so many GPUs, from configurations alone; exit code 1 when none does."""
    from ostro.config import load_recipe
    from ostro.train.recipe import KINDS

    loaded = load_recipe(recipe, overrides or [], KINDS)

    from ostro.cli_plan import plan_as_json, show_plan
    from ostro.plan.splits import make_plan

    logging.getLogger("ostro").setLevel(logging.WARNING)  # layers are built many times over
    made = make_plan(
        loaded,
        num_gpus=gpus,
        memory_gib=memory,
        device=device,
        image_share=image_share,
        gpus_per_machine=gpus_per_machine,
    )
    if as_json:
        print(plan_as_json(made))
    else:
        show_plan(made, recipe)
    made.require_fit()


@app.command(epilog="Example: ostro evaluate runs/first/weights --data my-corpus --bm25")
def evaluate(
    weights: Weights,
    data: Annotated[str, typer.Option(help="BEIR folder: corpus.jsonl, queries.jsonl, qrels/.", show_default=False)],
    split: Annotated[str, typer.Option(help="Name of the qrels file.")] = "test",
    ks: Annotated[
        list[int] | None, typer.Option("--k", min=1, help="Rank at which metrics cut; may be repeated. [default: 10]")
    ] = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Score BM25 beside it (extra search).")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the metrics and a row per query.")] = None,
) -> None:
    """Search a whole corpus and score it against its relevance labels; ranks of torchrun share the texts."""
    from ostro.cli_render import show_reports
    from ostro.data.evaluation_set import open_evaluation
    from ostro.inference.encoder import Encoder
    from ostro.retrieval.bm25 import bm25 as score_bm25
    from ostro.retrieval.options import EvaluateOptions
    from ostro.train.judges import Judges
    from ostro.train.ranks import started_ranks
    from ostro.train.shared import shared_search

    options = EvaluateOptions(path=data, split=split, ks=tuple(ks or (10,)))
    with started_ranks() as ranks:
        with ranks.agreed():
            evaluation = open_evaluation(options.path, options.split)
            encoder = Encoder.from_pretrained(weights)
        reports = {"model": shared_search(evaluation, options, encoder, Judges(ranks, ranks))}
        if not ranks.is_main:
            return
    if bm25:
        reports["BM25"] = score_bm25(evaluation, options)
    show_reports(reports)
    if output is not None:
        for system, report in reports.items():
            report.save(output if system == "model" else output / system.lower())


@app.command(epilog="Example: ostro encode runs/first/weights --prompt query < queries.txt")
def encode(
    weights: Weights,
    prompt: Annotated[Prompt, typer.Option(help="Prompt of the folder to put before each text.")] = Prompt.document,
    output: Annotated[
        Path | None, typer.Option(help="File to write, stdout when not given; with --engine ray, a folder.")
    ] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="By the suffix of --output when not given, else jsonl.")
    ] = None,
    num_dims: Annotated[int | None, typer.Option(min=1, help="Keep the first dims (Matryoshka).")] = None,
    engine: Annotated[
        Engine, typer.Option(help="ray: a corpus larger than a machine, in shards that are resumed (extra ray).")
    ] = Engine.local,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="With --engine ray: file or folder of jsonl, txt or parquet; may be repeated."),
    ] = None,
    shard_mib: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: MiB of the corpus per shard. [default: 16]")
    ] = None,
) -> None:
    """Turn the lines of stdin, or a corpus of files, into vectors."""
    if engine is Engine.ray:
        if not inputs or output is None or form is not None:
            raise typer.BadParameter("ray: needs --input and --output, and no --format", param_hint="--engine")
        from ostro.inference.ray_engine import encode_corpus

        folder = encode_corpus(
            weights, inputs, output, prompt=prompt.value, num_dims=num_dims, shard_mib=shard_mib or 16
        )
        rows = folder.num_rows
        print(f"{output}: {sum(rows.values()):,} vectors in {len(rows):,} shards")
        return
    if inputs or shard_mib is not None:
        raise typer.BadParameter(
            "only with --engine ray; else texts are read from stdin", param_hint="--input, --shard-mib"
        )
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"{output.parent}: no such folder", param_hint="--output")
    form = form or (Format.npy if output is not None and output.suffix == ".npy" else Format.jsonl)
    texts = _read_lines(sys.stdin.buffer)

    from ostro.inference.encoder import Encoder

    encoder = Encoder.from_pretrained(weights)
    if num_dims is not None and num_dims > encoder.num_dims:
        raise typer.BadParameter(f"{num_dims} exceeds the model's {encoder.num_dims} dims", param_hint="--num-dims")
    encoder.num_dims = num_dims or encoder.num_dims
    encode_texts = {"query": encoder.encode_query, "document": encoder.encode_document, "none": encoder.encode}[prompt]
    embeddings = encode_texts(texts).numpy()
    with output.open("wb") if output is not None else nullcontext(sys.stdout.buffer) as file:
        if form is Format.npy:
            import numpy

            numpy.save(file, embeddings)
        else:
            for text, embedding in zip(texts, embeddings, strict=True):
                row = json.dumps({"text": text, "embedding": embedding.tolist()}, ensure_ascii=False)
                file.write(row.encode() + b"\n")


def _read_lines(file: BinaryIO) -> list[str]:
    from ostro.data.blocks import read_text

    texts = [read_text(line, f"stdin:{number}") for number, line in enumerate(file, 1)]
    if not texts:
        raise DataError("stdin: no lines; give one text per line")
    return texts


@app.command(epilog="Example: ostro export runs/first --output exported")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint, or run folder for its latest.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Weights folder to write.", show_default=False)],
    precision: Annotated[
        Precision | None,
        typer.Option(help="Of a vision-language model; what the recipe says when not given.", show_default=False),
    ] = None,
) -> None:
    """Write a checkpoint as a weights folder that other libraries open."""
    from ostro.train.export_run import export_checkpoint

    step = export_checkpoint(checkpoint, output, precision=precision.value if precision else None)
    print(f"{output}: the weights after step {step}")


@app.command(epilog='Example: ostro chat runs/vlm-demo/weights --image photo.png "What is in the bottom left?"')
def chat(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Weights folder.", show_default=False)],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)],
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="Picture to ask about; may be repeated.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 256,
) -> None:
    """Ask a vision-language model a question, with or without pictures."""
    if not question.strip():
        raise typer.BadParameter("empty; write a question", param_hint="QUESTION")

    from ostro.data.conversation import ImagePart, Message, TextPart
    from ostro.data.images import ImageSource
    from ostro.inference.chat import Chat

    pictures = [ImagePart(ImageSource(image, "--image")) for image in images or ()]
    asked = Message("user", (*pictures, TextPart(question)))
    print(Chat.from_pretrained(weights).answer([[asked]], max_new_tokens=max_new_tokens)[0])


@app.command(epilog="Example: ostro inspect runs/first/weights")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Weights folder.", show_default=False)],
) -> None:
    """Tell what a weights folder holds; exit code 1 when it has problems."""
    from ostro.checkpoint.inspect import inspect_folder
    from ostro.cli_render import show_folder

    report = inspect_folder(folder)
    show_folder(report)
    if report.problems:
        raise typer.Exit(1)


@app.command(epilog="Example: ostro init weights/tiny --size tiny --layout nested --precision fp8")
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to make; absent or empty.", show_default=False)
    ],
    size: Annotated[str, typer.Option(help=f"Size preset: {', '.join(SIZES)}.")] = "tiny",
    layout: Annotated[str, typer.Option(help=f"Key naming: {', '.join(LAYOUT_NAMES)}.")] = "nested",
    precision: Annotated[str, typer.Option(help=f"Of the text layers: {', '.join(PRECISIONS)}.")] = "fp8",
    vocab_size: Annotated[int, typer.Option(help="Entries of the tokenizer, cut from Tekken.")] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
) -> None:
    """Make a Ministral-3 weights folder with random weights."""
    from ostro.checkpoint.create import create_weights

    create_weights(folder, size=size, layout=layout, precision=precision, vocab_size=vocab_size, seed=seed)
    print(folder)

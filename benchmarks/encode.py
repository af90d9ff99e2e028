"""Encoding texts against sentence-transformers: time with tokenisation, equal vectors.

One folder of random weights (a 7 M-parameter tower, Tekken cut to 8,192 entries) is opened by both. Two sets of texts:
skewed lengths, where padding costs most, and equal lengths, where there is none to save. Both libraries run in one
process, taking turns, so that a busy machine slows both; the fastest turn counts. With one thread the figure is CPU
seconds, with two it is wall time. The peer is measured at its default batch size and over a grid of others.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from common import in_own_process, skewed_lengths, table, write_result
from contrastive_step import model

from ostro.checkpoint.export import EmbedderSettings, ModelCard, export_embedder
from ostro.inference.encoder import Encoder
from ostro.models.tokenizer import TextTokenizer, cut_tekken, load_tokenizer

DEFAULT_BATCH = 32
BATCHES = (1, 2, 4, 8, 16, DEFAULT_BATCH, 64)
MAX_TOKENS = 1024
EQUAL_TOKENS = 64


def make_folder(folder: Path) -> None:
    """Exports the random tower, in float32, as the folder that both libraries open."""
    cut_tekken(8192, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    settings = EmbedderSettings(prompts={}, max_tokens=MAX_TOKENS)
    export_embedder(
        model(torch.float32),
        tokenizer,
        folder / "weights",
        settings=settings,
        card=ModelCard(base_model="random"),
        dtype=torch.float32,
    )


def texts(tokenizer: TextTokenizer, lengths: list[int]) -> list[str]:
    """Random words of one token each, so that a text has exactly the length asked for, `<s>` included."""
    words = sorted(word for word in tokenizer.fast.get_vocab() if re.fullmatch("Ġ[a-z]{2,}", word))
    draw = numpy.random.default_rng(3)
    drawn = ["".join(draw.choice(words, length - 1)).replace("Ġ", " ") for length in lengths]
    assert [len(ids) for ids in tokenizer.encode(drawn, MAX_TOKENS)] == lengths
    return drawn


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Times both libraries on one set of texts, in one precision.

    Args:
        case: `weights` (folder), `lengths` (tokens of each text), `dtype`, `threads`, `rounds`.

    Returns:
        Per setting the fastest seconds (CPU for one thread, else wall), and the least cosine between the two
        libraries' vectors of a text.
    """
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(case["threads"])
    dtype = getattr(torch, case["dtype"])
    ours = Encoder.from_pretrained(case["weights"], dtype=dtype, device="cpu")
    peer = SentenceTransformer(case["weights"], device="cpu", model_kwargs={"dtype": dtype})
    documents = texts(ours.tokenizer, case["lengths"])
    settings: dict[str, Callable[[], torch.Tensor]] = {"ours": lambda: ours.encode(documents)}
    for batch in BATCHES:
        settings[f"batch {batch}"] = lambda batch=batch: peer.encode(  # type: ignore[misc]
            documents, batch_size=batch, convert_to_tensor=True
        )
    clock = time.process_time if case["threads"] == 1 else time.perf_counter
    seconds = dict.fromkeys(settings, float("inf"))
    vectors = {}
    for _ in range(case["rounds"]):
        for name, encode in settings.items():
            started = clock()
            vectors[name] = encode()
            seconds[name] = min(seconds[name], clock() - started)
    cosines = F.cosine_similarity(vectors["ours"].float(), vectors[f"batch {DEFAULT_BATCH}"].float())
    return {"seconds": seconds, "least_cosine": cosines.min().item()}


def rates(case: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of every setting, and ours against the peer's default and best."""
    speed = {name: sum(case["lengths"]) / taken for name, taken in result["seconds"].items()}
    best = max((name for name in speed if name != "ours"), key=speed.__getitem__)
    shown: dict[str, Any] = {name: f"{value:,.0f}" for name, value in speed.items()}
    return shown | {
        "lengths": case["name"],
        "dtype": case["dtype"],
        "threads": case["threads"],
        "unit": "tok/cpu-s" if case["threads"] == 1 else "tok/s",
        "x default": f"{speed['ours'] / speed[f'batch {DEFAULT_BATCH}']:.2f}",
        "x best": f"{speed['ours'] / speed[best]:.2f} ({best})",
        "least cosine": f"{result['least_cosine']:.7f}",
    }


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--count", type=int, default=500, help="texts in each set")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every setting")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="precisions of both libraries")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(arguments.case)))
        return
    skewed = skewed_lengths(arguments.count, seed=2)
    sets = {
        f"skewed (median {numpy.median(skewed):.0f}, mean {numpy.mean(skewed):.0f}, max {max(skewed)})": skewed,
        f"equal ({EQUAL_TOKENS})": [EQUAL_TOKENS] * arguments.count,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        for threads in (1, 2):
            for dtype in arguments.dtypes:
                for name, lengths in sets.items():
                    case = {"name": name, "lengths": lengths, "dtype": dtype, "threads": threads}
                    case |= {"weights": f"{folder}/weights", "rounds": arguments.rounds}
                    rows.append(rates(case, in_own_process(__file__, case)))
                    print(rows[-1], flush=True)
    shared = ["lengths", "dtype", "threads", "unit"]
    against = [*shared, "ours", f"batch {DEFAULT_BATCH}", "x default", "x best", "least cosine"]
    body = "\n\n".join(
        [
            f"{arguments.count} texts per set, tokenisation included, random 7 M-parameter tower; "
            f"`batch {DEFAULT_BATCH}` is sentence-transformers at its default. Targets on skewed lengths: 1.8 x its "
            "default, 1.4 x its best; on equal lengths 1.0 x; cosine 0.99999 in float32.",
            table(rows, against),
            "## sentence-transformers by batch size",
            table(rows, [*shared, *(f"batch {batch}" for batch in BATCHES)]),
        ]
    )
    packages = ["torch", "transformers", "sentence-transformers", "tokenizers"]
    write_result("encode", "Encoding against sentence-transformers", body, packages=packages)


if __name__ == "__main__":
    main()

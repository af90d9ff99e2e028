"""Search quality after equal CPU time: Ostro's loop against sentence-transformers' trainer on ICD-10-CM.

Both start from the same random weights and train with the same pairs, batch size, learning rate, temperature, loss
(symmetric, in-batch negatives) and token limit, on one thread. The peer first tries a grid of settings for some
steps and trains with the two fastest, and at its defaults. The clock stops while the model is evaluated, and
all are evaluated in the same way: nDCG@10 on 5,000 documents and 500 queries of unseen categories.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, in_own_process, table, write_result
from icd10 import prepare_icd10

from ostro.checkpoint.export import EmbedderSettings, ModelCard, export_embedder
from ostro.data.evaluation_set import open_evaluation
from ostro.inference.encoder import Encoder
from ostro.models.backbone import build_encoder_backbone
from ostro.models.embedder import Embedder
from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.models.tokenizer import cut_tekken, load_tokenizer
from ostro.retrieval.bm25 import bm25
from ostro.retrieval.evaluate import evaluate
from ostro.retrieval.options import EvaluateOptions
from ostro.train.embed import EmbedTrainer, build_embedder, open_loader
from ostro.train.recipe import EmbedRecipe

BATCH, LEARNING_RATE, TEMPERATURE, WARMUP_STEPS, MAX_TOKENS, SEED = 128, 1e-3, 0.05, 30, 96, 17
WEIGHT_DECAY = 0.01
TRIED_STEPS, SKIPPED_STEPS = 8, 2
PEER_GRID: dict[str, dict[str, Any]] = {
    "float32 (defaults)": {},
    "bf16 autocast": {"bf16": True},
    "bf16 weights": {"dtype": "bfloat16"},
    "cached 32, bf16 autocast": {"bf16": True, "mini_batch": 32},
    "cached 64, bf16 autocast": {"bf16": True, "mini_batch": 64},
    "cached 1,024 tokens, bf16 autocast": {"bf16": True, "mini_batch": 32, "mini_batch_tokens": 1024},
}


def make_weights(folder: Path) -> None:
    """A random 2.9 M-parameter embedder as a folder that both libraries open."""
    torch.manual_seed(SEED)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = Ministral3BidirectionalConfig(
        vocab_size=8192, num_key_value_heads=2, head_dim=32, max_position_embeddings=16384, **shape
    )
    cut_tekken(8192, folder / "tokenizer")
    export_embedder(
        Ministral3BidirectionalModel(config),
        load_tokenizer(folder / "tokenizer"),
        folder / "weights",
        settings=EmbedderSettings(prompts={}, max_tokens=MAX_TOKENS),
        card=ModelCard(base_model="random"),
        dtype=torch.float32,
    )


def recipe(case: dict[str, Any]) -> EmbedRecipe:
    """The run as a recipe of Ostro, with a constant learning rate: its length is given in CPU seconds, not steps."""
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
                "drop_last": True,
                **tokens,
            },
            "loss": {"temperature": TEMPERATURE, "symmetric": True},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            "schedule": {"kind": "constant", "warmup_steps": WARMUP_STEPS},
            "train": {"num_steps": 10**6},
        }
    )


class Clock:
    """CPU seconds of training alone, and what the evaluations at given seconds found."""

    def __init__(self, points_s: list[float], score: Callable[[], float]) -> None:
        self.curve: list[dict[str, float]] = []
        self._points, self._score = list(points_s), score
        self._started = time.process_time()

    def after_step(self, step: int) -> bool:
        """Evaluates when the next point is reached; whether there are points left."""
        cpu_s = time.process_time() - self._started
        if self._points and cpu_s >= self._points[0]:
            self._points = [point for point in self._points if point > cpu_s]
            self.curve.append({"cpu_s": cpu_s, "step": step, "ndcg": self._score()})
            print(self.curve[-1], flush=True)
            self._started = time.process_time() - cpu_s
        return bool(self._points)


def scorer(case: dict[str, Any]) -> Callable[[Embedder], float]:
    """nDCG@10 on the subset, encoded by Ostro in any case."""
    options = EvaluateOptions(path=case["subset"], split="test")
    evaluation = open_evaluation(options.path, options.split)
    tokenizer = load_tokenizer(case["weights"])

    def score(embedder: Embedder) -> float:
        encoder = Encoder(embedder, tokenizer, max_tokens=MAX_TOKENS)
        return evaluate(encoder, evaluation, options).metrics["nDCG@10"]

    return score


def ours(case: dict[str, Any]) -> list[dict[str, float]]:
    """Packed batches, bf16 compute with float32 master weights: the defaults."""
    run = recipe(case)
    embedder, tokenizer = build_embedder(run)
    score = scorer(case)
    with open_loader(run, tokenizer) as loader:
        trainer = EmbedTrainer(run, embedder, loader)
        clock = Clock(case["points_s"], lambda: score(embedder))
        clock.after_step(0)
        while clock.after_step(trainer.step):
            trainer.train_step()
    return clock.curve


def sentence_transformers(case: dict[str, Any]) -> list[dict[str, float]]:
    """The peer's trainer; with `steps` given it is only timed."""
    from transformers import TrainerCallback

    trainer, tower = peer_trainer(case)
    evaluated = Embedder(build_encoder_backbone(case["weights"], "embedding", dtype=torch.bfloat16))
    score = scorer(case)

    def score_copy() -> float:
        evaluated.backbone.load_state_dict(tower.state_dict())
        return score(evaluated)

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Reads the clock at the start and after every optimizer step."""

        clock: Clock
        ends_cpu_s: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.clock = Clock(case["points_s"], score_copy)
            self.clock.after_step(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends_cpu_s.append(time.process_time())
            enough = len(self.ends_cpu_s) == TRIED_STEPS + SKIPPED_STEPS
            if not self.clock.after_step(state.global_step) and (case["points_s"] or enough):
                control.should_training_stop = True

    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    if case["points_s"]:
        return watch.clock.curve
    ends = watch.ends_cpu_s[SKIPPED_STEPS - 1 :]
    return [{"cpu_s_per_step": statistics.median(end - start for start, end in itertools.pairwise(ends))}]


def peer_trainer(case: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    """sentence-transformers' trainer with the settings of `case`, and the tower that it trains."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    kwargs = {"dtype": getattr(torch, case.get("dtype", "float32"))}
    peer = SentenceTransformer(case["weights"], device="cpu", model_kwargs=kwargs)
    same = {
        "scale": 1 / TEMPERATURE,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    if "mini_batch" in case:
        loss: torch.nn.Module = CachedMultipleNegativesRankingLoss(
            peer,
            mini_batch_size=case["mini_batch"],
            mini_batch_num_tokens=case.get("mini_batch_tokens"),
            **same,
        )
    else:
        loss = MultipleNegativesRankingLoss(peer, **same)
    train = open_evaluation(case["full"], "train")
    texts = dict(zip(train.corpus.ids(), map(train.corpus.text, range(len(train.corpus))), strict=True))
    pairs = [
        {"query": query, "document": texts[document_id]}
        for query_id, query in train.queries.items()
        for document_id in train.qrels[query_id]
    ]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=case["output"],
        max_steps=10**6,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_STEPS,
        lr_scheduler_type="constant_with_warmup",
        batch_sampler="no_duplicates",
        dataloader_drop_last=True,
        bf16=case.get("bf16", False),
        seed=SEED,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(peer, arguments, Dataset.from_list(pairs), loss=loss)
    return trainer, peer[0].model


def plot(curves: dict[str, list[dict[str, float]]], bm25_ndcg: float) -> None:
    """Draws the curves to `results/quality_icd10.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        axes.plot([point["cpu_s"] for point in curve], [point["ndcg"] for point in curve], marker="o", label=name)
    axes.axhline(bm25_ndcg, color="grey", linestyle="--", linewidth=1, label="BM25")
    axes.set(xlabel="CPU seconds of training (1 thread)", ylabel="nDCG@10", ylim=(0, None))
    axes.set_title("ICD-10-CM, 500 queries over 5,000 documents, unseen categories")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(RESULTS / "quality_icd10.png", dpi=130)


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--budget", type=float, default=120, help="CPU seconds of training for each")
    parser.add_argument("--points", type=int, default=6, help="evaluations after the first, evenly spaced")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        run = {"ours": ours, "sentence_transformers": sentence_transformers}[arguments.case["run"]]
        print(json.dumps(run(arguments.case)))
        return
    full, subset = prepare_icd10()
    points_s = [arguments.budget * point / arguments.points for point in range(arguments.points + 1)]
    with tempfile.TemporaryDirectory() as folder:
        make_weights(Path(folder))
        shared = {"weights": f"{folder}/weights", "output": f"{folder}/runs", "full": str(full), "subset": str(subset)}
        peer = {**shared, "run": "sentence_transformers"}
        tried = {
            name: in_own_process(__file__, {**peer, **setting, "points_s": []})[0]["cpu_s_per_step"]
            for name, setting in PEER_GRID.items()
        }
        print(tried, flush=True)
        default, fastest = next(iter(PEER_GRID)), sorted(tried, key=tried.__getitem__)[:2]
        curves = {"Ostro": in_own_process(__file__, {**shared, "run": "ours", "points_s": points_s})}
        for name in dict.fromkeys((*fastest, default)):
            case = {**peer, **PEER_GRID[name], "points_s": points_s}
            curves[f"sentence-transformers, {name}"] = in_own_process(__file__, case)
    options = EvaluateOptions(path=str(subset), split="test")
    yardstick = bm25(open_evaluation(options.path, options.split), options).metrics["nDCG@10"]
    text = body(tried, curves, yardstick)
    write_result("quality_icd10", "Search quality after equal CPU time", text, packages=PACKAGES)
    plot(curves, yardstick)


PACKAGES = ["torch", "transformers", "sentence-transformers", "simple-icd-10-cm"]


def body(tried: dict[str, float], curves: dict[str, list[dict[str, float]]], yardstick: float) -> str:
    """The tables of the result file."""
    rows = [
        {"CPU s": f"{points[0]['cpu_s']:.0f}"}
        | {name: f"{point['ndcg']:.3f} ({point['step']:.0f} steps)" for name, point in zip(curves, points, strict=True)}
        for points in zip(*curves.values(), strict=True)
    ]
    last = {name: curve[-1] for name, curve in curves.items()}
    rates = [
        {
            "": name,
            "steps": f"{point['step']:.0f}",
            "CPU s per step": f"{point['cpu_s'] / point['step']:.3f}",
            "nDCG@10": f"{point['ndcg']:.3f}",
        }
        for name, point in last.items()
    ]
    grid = [{"sentence-transformers setting": name, "CPU s per step": f"{value:.2f}"} for name, value in tried.items()]
    settings = (
        f"2.9 M parameters from the same random weights, batch {BATCH}, AdamW, learning rate {LEARNING_RATE:g} constant"
        f" after {WARMUP_STEPS} steps of warm-up, temperature {TEMPERATURE}, symmetric loss, at most {MAX_TOKENS} "
        f"tokens. BM25 on the same set: {yardstick:.3f}. The clock counts training only, tokenisation included."
    )
    parts = [settings, "![nDCG@10 over CPU seconds](quality_icd10.png)", table(rows, list(rows[0]))]
    parts += ["## At the end", table(rates, list(rates[0])), "## What the peer tried", table(grid, list(grid[0]))]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()

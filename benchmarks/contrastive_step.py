"""One contrastive training step (forward, loss, backward) against sentence-transformers' cached loss: time,
memory, equal results.

Same weights, same token ids, skewed lengths, one thread. Every case runs in a process of its own, so that peak memory
is its own. The peer is measured at its defaults (CachedMultipleNegativesRankingLoss, mini-batches of 32 texts) and over
a grid of hand-tuned settings.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import in_own_process, measure, skewed_lengths, table, write_result
from transformers import Ministral3Config

from ostro.losses.cached import cached_backward
from ostro.losses.contrastive import ContrastiveTargets, contrastive_loss
from ostro.losses.options import ContrastiveOptions
from ostro.models.embedder import Embedder
from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.models.packed import PackedTexts, micro_batches

TEMPERATURE = 0.05
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.0,
    "original_max_position_embeddings": 4096,
}


def model(dtype: torch.dtype) -> Ministral3BidirectionalModel:
    """A random 7 M-parameter tower."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    config = Ministral3BidirectionalConfig(
        **shape, num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, rope_parameters=ROPE
    )
    assert isinstance(config, Ministral3Config)
    return Ministral3BidirectionalModel(config).to(dtype).train()


def texts(count: int) -> list[list[int]]:
    """`count` queries, then `count` documents, as random token ids."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(14, 8192, (length,), generator=generator).tolist() for length in skewed_lengths(2 * count, seed=2)
    ]


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """Packed, cached in two passes."""
    embedder = Embedder(model(getattr(torch, case["dtype"])), pooling="avg")
    token_ids, count = texts(case["n"]), case["n"]
    ids = torch.arange(count)
    targets = ContrastiveTargets(ids, ids, ids[:, None])
    options = ContrastiveOptions(temperature=TEMPERATURE)

    def loss_of(embeddings: torch.Tensor) -> Any:
        return contrastive_loss(
            embeddings[:count], embeddings[count:], targets, temperature=TEMPERATURE, options=options
        )

    def step() -> float:
        embedder.zero_grad()
        groups = micro_batches([len(text) for text in token_ids], case["micro_batch_tokens"])
        packed = [PackedTexts.from_token_ids([token_ids[row] for row in rows]) for rows in groups]
        return cached_backward(embedder, packed, groups, loss_of).loss.item()

    return finish(embedder, step, token_ids)


def sentence_transformers(case: dict[str, Any]) -> dict[str, Any]:
    """The peer's losses on the same tower, padded as its own collator pads."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    class Tower(torch.nn.Module):
        """The tower as the peer's first module."""

        def __init__(self, tower: Ministral3BidirectionalModel) -> None:
            super().__init__()
            self.auto_model = tower

        def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
            states = self.auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"], use_cache=False
            )
            return {**features, "token_embeddings": states.last_hidden_state}

    tower = model(getattr(torch, case["dtype"]))
    peer = SentenceTransformer(modules=[Tower(tower), Pooling(256, "mean"), Normalize()], device="cpu")
    token_ids, count = texts(case["n"]), case["n"]
    scale = 1 / TEMPERATURE
    if case["form"] == "cached":
        loss = CachedMultipleNegativesRankingLoss(peer, scale=scale, mini_batch_size=case["mini_batch"])
    else:
        loss = MultipleNegativesRankingLoss(peer, scale=scale)
    order = sorted(range(count), key=lambda row: len(token_ids[row])) if case.get("sorted") else list(range(count))
    features = [pad([token_ids[row] for row in order]), pad([token_ids[count + row] for row in order])]

    def step() -> float:
        tower.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False)):
            value = loss([dict(part) for part in features], torch.empty(0))
        value.backward()
        return float(value)

    return finish(tower, step, token_ids)


def pad(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [11] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def finish(module: torch.nn.Module, step: Any, token_ids: list[list[int]]) -> dict[str, Any]:
    """Measures a step, with the loss and gradient norm it reached."""
    loss, figures = measure(step, repeats=1, warm_up=False)
    norm = torch.nn.utils.get_total_norm(
        [weight.grad.float() for weight in module.parameters() if weight.grad is not None]
    )
    tokens = sum(map(len, token_ids))
    return {**figures, "loss": loss, "grad_norm": norm.item(), "tok_per_cpu_s": tokens / figures["cpu_s"]}


def cases(count: int) -> list[dict[str, Any]]:
    """Defaults and hand-tuned settings of both, in float32 and in bfloat16."""
    peer = {"run": "sentence_transformers", "n": count, "form": "cached", "dtype": "float32", "mini_batch": 32}
    tuned = [{**peer, "mini_batch": size, "sorted": True} for size in (2, 4, 8)]
    low = [{**peer, "mini_batch": size, "sorted": True, "dtype": "bfloat16"} for size in (4, 8)]
    autocast = {**peer, "mini_batch": 4, "sorted": True, "autocast": True}
    mine = [
        {"run": "ours", "n": count, "dtype": dtype, "micro_batch_tokens": tokens}
        for dtype in ("float32", "bfloat16")
        for tokens in (1024, 2048)
    ]
    return [peer, *tuned, *low, autocast, *mine]


def is_low(case: dict[str, Any]) -> bool:
    """Whether a case computes in bfloat16."""
    return bool(case["dtype"] == "bfloat16" or case.get("autocast"))


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=[128, 512, 2048, 4096])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(
            json.dumps(
                {"ours": ours, "sentence_transformers": sentence_transformers}[arguments.case["run"]](arguments.case)
            )
        )
        return
    body = [memory_section(arguments.memory_sizes)]
    for count in arguments.sizes:
        rows: list[dict[str, Any]] = []
        for case in cases(count):
            rows.append({**case, **in_own_process(__file__, case)})
            # written after every case: the peer's defaults take minutes, and a stopped run keeps what it has
            write_result("contrastive_step", TITLE, "\n\n".join([*body, step_section(count, rows)]), packages=PACKAGES)
        body.append(step_section(count, rows))


def memory_section(counts: list[int]) -> str:
    """Peak memory of our step over the number of pairs."""
    rows = []
    for count in counts:
        case = {"run": "ours", "n": count, "dtype": "bfloat16", "micro_batch_tokens": 2048}
        peak = in_own_process(__file__, case)["peak_mib"]
        rows.append({"N": count, "peak MiB": f"{peak:.0f}", "embeddings + scores MiB": f"{held(count):.0f}"})
    title = "## Peak memory against batch size (ours, bfloat16, 2,048 tokens per micro-batch)"
    return f"{title}\n\n{table(rows, list(rows[0]))}"


def step_section(count: int, rows: list[dict[str, Any]]) -> str:
    """The table of one batch size; the best setting of the peer is taken among those of the same precision."""
    peer = [row for row in rows if row["run"] != "ours"]
    tuned = {
        low: max((row["tok_per_cpu_s"] for row in peer if is_low(row) == low), default=float("nan"))
        for low in (False, True)
    }
    return f"## N = {count} pairs\n\n" + table([shown(row, rows[0], tuned) for row in rows], COLUMNS)


TITLE = "One contrastive step against sentence-transformers"
PACKAGES = ["torch", "transformers", "sentence-transformers"]
COLUMNS = ["setting", "tok/cpu-s", "x default", "x best tuned, same precision", "peak MiB", "loss", "grad norm"]


def held(count: int) -> float:
    """MiB of N x D embeddings with gradient (queries and documents, float32) and one N x N score matrix."""
    return (2 * 2 * count * 256 + count * count) * 4 / 2**20


def shown(row: dict[str, Any], default: dict[str, Any], tuned: dict[bool, float]) -> dict[str, str]:
    """A row of the table."""
    keys = ("form", "dtype", "mini_batch", "micro_batch_tokens", "sorted", "autocast")
    setting = (
        row["run"]
        + " "
        + " ".join(f"{key}={row[key]}" for key in keys if key in row and not isinstance(row[key], float))
    )
    speed = row["tok_per_cpu_s"]
    return {
        "setting": setting,
        "tok/cpu-s": f"{speed:,.0f}",
        "x default": f"{speed / default['tok_per_cpu_s']:.2f}",
        "x best tuned, same precision": f"{speed / tuned[is_low(row)]:.2f}",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "loss": f"{row['loss']:.6f}",
        "grad norm": f"{row['grad_norm']:.5f}",
    }


if __name__ == "__main__":
    main()

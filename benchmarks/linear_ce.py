"""The fused head and cross-entropy against the plain form and torch's own `linear_cross_entropy`: memory, CPU time and
error against float32.

A head of 131,072 x 1,024 and 2,048 rows of hidden states in bfloat16, a quarter of the rows without a label; forward
and backward, with a frozen head and with a trained one, one thread. Every case runs in a process of its own, so that
peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import in_own_process, measure, table, write_result

from ostro.losses.linear_ce import CHUNK_ROWS, fused_linear_cross_entropy

HIDDEN, VOCABULARY, ROWS = 1024, 131072, 2048
PIECE = 4096
"""Rows of the head made at once: the inputs must not set the peak."""


def inputs(*, trained: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and labels; the target's logit is raised, as in a model that has learnt something."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    for rows in weight.split(PIECE):
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.05)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator) + 2 * weight[labels].float()
    labels[torch.randperm(ROWS, generator=generator)[: ROWS // 4]] = -100
    return hidden.bfloat16().requires_grad_(), weight.requires_grad_(trained), labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a training loop does without help: logits in bfloat16, loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=-100)


def form(case: dict[str, Any]) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function a case measures."""
    if case["run"] == "ostro":
        return lambda *args: fused_linear_cross_entropy(*args, chunk_rows=case["chunk_rows"])
    if case["run"] == "torch":
        options = torch.nn.LinearCrossEntropyOptions(**case["options"])
        return lambda *args: F.linear_cross_entropy(*args, ignore_index=-100, options=options)
    return plain


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Time and peak, then the errors."""
    hidden, weight, labels = inputs(trained=case["trained"])
    function = form(case)

    def step() -> float:
        hidden.grad = weight.grad = None
        loss = function(hidden, weight, labels)
        loss.backward()
        return loss.item()

    loss, figures = measure(step, repeats=case["repeats"], warm_up=case["repeats"] > 1)
    return {**figures, **errors(hidden, weight, labels, loss)}


def errors(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss: float) -> dict[str, float]:
    """Relative distance of loss and gradients from the float32 result on the same bfloat16 inputs."""
    exact_hidden, exact_weight = (
        tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in (hidden, weight)
    )
    exact = F.cross_entropy(F.linear(exact_hidden, exact_weight), labels, ignore_index=-100)
    exact.backward()
    result = {"loss": loss, "loss_error": abs(loss - exact.item()) / exact.item()}
    for name, tensor, truth in (("hidden", hidden, exact_hidden), ("weight", weight, exact_weight)):
        if tensor.grad is not None and truth.grad is not None:
            result[f"{name}_error"] = ((tensor.grad.float() - truth.grad).norm() / truth.grad.norm()).item()
    return result


def cases(chunk_rows: list[int]) -> list[dict[str, Any]]:
    """Plain, ours over chunk sizes, and torch's own over its chunk sizes and accumulation policies."""
    heads = [{"trained": trained, "repeats": 2} for trained in (False, True)]
    listed: list[dict[str, Any]] = []
    for head in heads:
        listed.append({"run": "plain", **head})
        listed += [{"run": "ostro", **head, "chunk_rows": rows} for rows in chunk_rows]
    if hasattr(F, "linear_cross_entropy"):
        listed += [
            {"run": "torch", **head, "repeats": 1, "options": options} for head in heads for options in TORCH_OPTIONS
        ]
    return listed


TORCH_OPTIONS: list[dict[str, Any]] = [
    {"acc_policy": "accurate", "chunking_method": None, "batch_chunk_size": 512},
    {"acc_policy": "accurate", "chunking_method": None, "batch_chunk_size": 2048},
    {"acc_policy": "balanced", "chunking_method": None, "batch_chunk_size": 512},
    {},
]
"""Its policies at chunks large enough for the CPU, and its defaults."""

COLUMNS = ["head", "form", "CPU s", "x plain", "peak MiB", "x plain peak", "loss error", "hidden", "weight"]


def shown(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, str]:
    """A row of the table."""
    settings = row.get("options") or {key: row[key] for key in ("chunk_rows",) if key in row}
    text = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    is_default = row.get("chunk_rows") == CHUNK_ROWS or row.get("options") == {}
    return {
        "head": "trained" if row["trained"] else "frozen",
        "form": f"{row['run']} {text}".strip() + (" (default)" if is_default else ""),
        "CPU s": f"{row['cpu_s']:.2f}",
        "x plain": f"{row['cpu_s'] / reference['cpu_s']:.2f}",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "x plain peak": f"{row['peak_mib'] / reference['peak_mib']:.2f}",
        "loss error": f"{row['loss_error']:.1e}",
        "hidden": f"{row['hidden_error']:.1e}",
        "weight": f"{row['weight_error']:.1e}" if "weight_error" in row else "",
    }


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=json.loads)
    parser.add_argument("--chunk-rows", type=int, nargs="+", default=[256, 512, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(json.dumps(run(arguments.case)))
        return
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.chunk_rows):
        rows.append({**case, **in_own_process(__file__, case)})
        plain_rows = {row["trained"]: row for row in rows if row["run"] == "plain"}
        # written after every case: some of torch's settings take a minute, and a stopped run keeps what it has
        body = table([shown(row, plain_rows[row["trained"]]) for row in rows], COLUMNS)
        write_result("linear_ce", TITLE, f"{NOTE}\n\n{body}", packages=["torch"])


TITLE = "The fused head and cross-entropy, 2,048 rows, 25 % without a label, V 131,072, H 1,024, bfloat16"
NOTE = (
    "Forward and backward on one thread, the faster of two runs after a warm-up (torch's own: one run). Peak: growth "
    "of resident memory over the inputs, gradients included. Errors: distance (norm) from the float32 result on the "
    "same inputs, relative to its norm."
)


if __name__ == "__main__":
    main()

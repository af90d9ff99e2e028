"""Forward and backward of a text tower with compiled norms and MLPs against the plain one: CPU seconds, equal loss.

Eight layers of width 512 on packed texts of skewed lengths, other ones in every micro-batch; every case runs in a
process of its own, on one thread. The first micro-batch, which compiles, is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from common import in_own_process, skewed_lengths, table, write_result

from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from ostro.models.packed import PackedTexts, fill_up, forward_packed, use_packed_attention
from ostro.parallel.apply import checkpoint_activations, compile_layers

NUM_BATCHES = 12
NUM_TEXTS = 16


def run(case: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of the first micro-batch and of all others, and the sum of the losses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Ministral3BidirectionalConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = Ministral3BidirectionalModel(config).to(getattr(torch, case["dtype"])).train()
    use_packed_attention(model)
    if case["recompute"]:
        checkpoint_activations(model)
    started = _cpu_seconds()
    if case["compile"]:
        compile_layers(model)
    seconds, loss = [], 0.0
    for number in range(NUM_BATCHES):
        ids = [torch.randint(0, 8192, (length,)).tolist() for length in skewed_lengths(NUM_TEXTS, seed=number)]
        states = forward_packed(model, fill_up(PackedTexts.from_token_ids(ids)))
        total = states.float().square().mean()
        total.backward()
        model.zero_grad()
        loss += total.item()
        seconds.append(_cpu_seconds() - started)
        started = _cpu_seconds()
    return {"first": seconds[0], "rest": sum(seconds[1:]), "loss": loss}


def _cpu_seconds() -> float:
    """Of this process and the compilers that it started and waited for."""
    return sum(os.times()[:4])


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=json.loads, help="run one case and print its result")
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(run(case)))
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        for recompute in (False, True):
            plain, compiled = (
                in_own_process(__file__, {"dtype": dtype, "recompute": recompute, "compile": on})
                for on in (False, True)
            )
            rows.append(
                {
                    "precision": dtype,
                    "recomputed": recompute,
                    "plain cpu-s": f"{plain['rest']:.1f}",
                    "compiled cpu-s": f"{compiled['rest']:.1f}",
                    "ratio": f"{compiled['rest'] / plain['rest']:.2f}",
                    "first, compiled": f"{compiled['first']:.0f}",
                    "loss": f"{plain['loss']:.4f} / {compiled['loss']:.4f}",
                }
            )
    text = f"{NUM_BATCHES - 1} micro-batches after the first, which compiles; `first` counts CPU seconds of that.\n\n"
    body = text + table(rows, list(rows[0]))
    write_result(
        "compiled_step", "Compiled norms and MLPs against plain ones", body, packages=["torch", "transformers"]
    )


if __name__ == "__main__":
    main()

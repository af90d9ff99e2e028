"""What `ostro plan` predicts against what ranks hold: one process, and ranks along each axis of the mesh.

A model of 24 M parameters takes real training steps on CPU ranks, each case in processes of its own. Two measures:

* live: most bytes of all tensors that live at once during a step, each storage counted once. It is what the prediction
  is about, and what a GPU's allocator is asked for. The claim is 10 % of it.
* resident: growth of the process's resident memory within a step, gradients and activations above what stays. It also
  has what the C library keeps, kernels' scratch memory and gloo's buffers, which a plan does not know.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import table, write_result

ROOT = Path(__file__).parents[1]
MIB = 2**20
PIPELINE = {"dp_replicate": 1, "pp": 2}
INTERLEAVED = {**PIPELINE, "schedule": "interleaved", "stages_per_rank": 2}
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("vlm", {"dp_replicate": 1}, {}),
    ("vlm", {"dp_replicate": 2}, {}),
    ("vlm", {"dp_replicate": 1, "dp_shard": 2}, {}),
    ("vlm", {"dp_replicate": 1, "tp": 2}, {}),
    ("vlm", {"dp_replicate": 1, "dp_shard": 2}, {"activation_checkpointing": True}),
    ("vlm", {"dp_replicate": 2, "dp_shard": 2}, {}),
    ("vlm", {"dp_replicate": 1, "dp_shard": 2, "tp": 2}, {}),
    ("vlm", PIPELINE, {}),
    ("vlm", PIPELINE, {"activation_checkpointing": True}),
    ("vlm", {**PIPELINE, "schedule": "gpipe"}, {}),
    ("vlm", INTERLEAVED, {}),
    ("vlm", {**PIPELINE, "dp_shard": 2}, {}),
    ("vlm", {**INTERLEAVED, "tp": 2}, {}),
    ("embed", {"dp_replicate": 1, "dp_shard": 2}, {}),
)


def compare(folder: Path, kind: str, parallel: dict[str, Any], model: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table for one case, predicted and measured: one for each rank of a pipeline."""
    from tests.helpers import plan_runs
    from tests.helpers.ranks import RankPool

    num_data_ranks = parallel["dp_replicate"] * parallel.get("dp_shard", 1)
    num_stages = parallel.get("pp", 1)
    num_ranks = num_data_ranks * parallel.get("tp", 1) * num_stages
    recipe = plan_runs.recipe(
        folder,
        kind,
        num_samples=4 * num_data_ranks,
        data={"micro_batch_tokens": 1024, **({"max_tokens": 1024} if kind == "vlm" else {"query_max_tokens": 512})},
        model={"weights": str(folder / "weights"), **model},
        parallel=parallel,
    )
    with RankPool() as pool:
        found = pool.run(plan_runs.measured, recipe, world_size=num_ranks, timeout_s=600)
    usages, rows = plan_runs.predicted(recipe, num_ranks, found[0]), []
    sizes = [f"{key} {value}" for key, value in parallel.items() if value != 1]
    for first in range(0, num_ranks, num_ranks // num_stages):
        usage, same = usages[first], found[first : first + num_ranks // num_stages]
        standing = sum(size for (_, kind), size in usage.ledger.items() if kind in ("weights", "masters", "moments"))
        live, growth = (max(rank[name] for rank in same) for name in ("live", "resident_growth"))
        row = {
            "run": kind,
            "ranks": ", ".join([*sizes, f"rank {first}"] if num_stages > 1 else sizes) or "one process",
            "model": ", ".join(f"{key} {value}" for key, value in model.items()) or "bfloat16",
            "tokens": int(found[0]["tokens"]),
            "predicted MiB": f"{usage.peak / MIB:,.0f}",
            "live MiB": f"{live / MIB:,.0f}",
            "error": f"{usage.peak / live - 1:+.1%}",
            "predicted growth MiB": f"{(usage.peak - standing) / MIB:,.0f}",
            "resident growth MiB": f"{growth / MIB:,.0f}",
        }
        rows.append(row)
    return rows


def main() -> None:
    """Runs all cases and writes the table."""
    sys.path.append(str(ROOT))
    # read by the C library in the ranks: large blocks go back to the system at once, so that resident memory follows
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    from tests.helpers import plan_runs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan_runs.make_inputs(folder, size="small", vocab_size=8192, num_words=120, pixels=(448, 448))
        rows = []
        for case in CASES:
            rows += compare(folder, *case)
            print(rows[-1], flush=True)
    body = "\n\n".join(
        [
            "24 M parameters, steps of four full micro-batches, one thread per rank. Live is the most bytes of all "
            "tensors at once, each storage counted once; resident growth is that of the process within a step, above "
            "what it held before.",
            table(rows, list(rows[0])),
        ]
    )
    write_result(
        "plan_memory", "Memory that is planned, and memory that is held", body, packages=["torch", "transformers"]
    )


if __name__ == "__main__":
    main()

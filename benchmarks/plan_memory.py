"""What `ostro plan` predicts against what ranks hold: one process, replicated, split and tensor-parallel ranks.

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
CASES: tuple[tuple[str, dict[str, int], dict[str, Any]], ...] = (
    ("vlm", {"dp_replicate": 1}, {}),
    ("vlm", {"dp_replicate": 2}, {}),
    ("vlm", {"dp_replicate": 1, "dp_shard": 2}, {}),
    ("vlm", {"dp_replicate": 1, "tp": 2}, {}),
    ("vlm", {"dp_replicate": 1, "dp_shard": 2}, {"activation_checkpointing": True}),
    ("embed", {"dp_replicate": 1, "dp_shard": 2}, {}),
)


def compare(folder: Path, kind: str, parallel: dict[str, int], model: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: one case, predicted and measured."""
    from tests.helpers import plan_runs
    from tests.helpers.ranks import RankPool

    num_ranks = 2 if max(parallel.values()) > 1 else 1
    num_data_ranks = num_ranks // parallel.get("tp", 1)
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
    usage = plan_runs.predicted(recipe, num_ranks, int(found[0]["tokens"]), found[0]["image_share"]).needs.usage
    standing = sum(size for (_, kind), size in usage.ledger.items() if kind in ("weights", "masters", "moments"))
    live, growth = (max(rank[name] for rank in found) for name in ("live", "resident_growth"))
    return {
        "run": kind,
        "ranks": ", ".join(f"{axis} {size}" for axis, size in parallel.items() if size > 1) or "one process",
        "model": ", ".join(f"{key} {value}" for key, value in model.items()) or "bfloat16",
        "tokens": int(found[0]["tokens"]),
        "predicted MiB": f"{usage.peak / MIB:,.0f}",
        "live MiB": f"{live / MIB:,.0f}",
        "error": f"{usage.peak / live - 1:+.1%}",
        "predicted growth MiB": f"{(usage.peak - standing) / MIB:,.0f}",
        "resident growth MiB": f"{growth / MIB:,.0f}",
    }


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
            rows.append(compare(folder, *case))
            print(rows[-1], flush=True)
    body = "\n\n".join(
        [
            "24 M parameters, steps of several full micro-batches, one thread per rank. Live is the most bytes of all "
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

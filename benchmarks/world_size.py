"""The loss of both demos on 1, 2 and 4 ranks: the same curve, whatever the number of ranks and what they hold.

Each demo trains its first steps on one process and under torchrun on 2 and 4 CPU ranks of one thread, from the same
recipe: ranks that share the batch, and ranks that split the model. Compared is the loss of every step with that of one
process: the largest relative difference. In bfloat16 a step is rounded differently wherever the micro-batches differ,
which they do when ranks share a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import table, write_result

DEMOS = ("embed-demo", "vlm-demo")
LAYOUTS: dict[str, dict[str, int]] = {
    "2 ranks": {"dp_replicate": 2},
    "4 ranks": {"dp_replicate": 4},
    "dp_shard 2": {"dp_shard": 2},
    "tp 2": {"tp": 2},
    "pp 2": {"pp": 2},
    "pp 2, tp 2": {"pp": 2, "tp": 2},
}
DTYPES = ("float32", "bfloat16")


def losses(demo: str, dtype: str, sizes: dict[str, int], num_steps: int, folder: Path) -> list[float]:
    """Loss of each step of a run in `folder`, where the demo's inputs are made once."""
    world_size = math.prod(sizes.values())
    output = folder / "-".join([demo, dtype, *(f"{axis}{size}" for axis, size in sizes.items())])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    words += ["-m", "ostro", "train", demo, f"output={output}", f"model.dtype={dtype}", "evaluate=null", "test=null"]
    words += [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    words += [f"train.num_steps={num_steps}", "train.log_every=1", "train.evaluate_every=null", "train.save_every=null"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    """Runs all cases and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run")
    arguments = parser.parse_args()
    shown: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for demo in DEMOS:
            for dtype in DTYPES:
                alone = losses(demo, dtype, {}, arguments.steps, Path(folder))
                assert len(alone) == arguments.steps
                row = {"demo": demo, "dtype": dtype, "first loss": f"{alone[0]:.4f}", "last loss": f"{alone[-1]:.4f}"}
                for name, sizes in LAYOUTS.items():
                    pairs = zip(alone, losses(demo, dtype, sizes, arguments.steps, Path(folder)), strict=True)
                    row[name] = f"{max(abs(one - many) / one for one, many in pairs):.1e}"
                shown.append(row)
                print(row, flush=True)
    body = (
        f"{arguments.steps} steps; the largest relative difference of the loss of a step from that of one process. "
        "Target 1e-4.\n\n" + table(shown, list(shown[0]))
    )
    write_result("world_size", "Loss curves on 1, 2 and 4 ranks", body, packages=["torch", "transformers"])


if __name__ == "__main__":
    main()

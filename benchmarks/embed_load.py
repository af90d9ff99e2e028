"""An embedder on ranks that split it: each reads its own rows, against reading the whole and splitting it then.

The text tower of a random vision-language folder (FP8 text linears, made as in `fp8_load.py`) becomes the embedder of a
rank of two, with a cold page cache, in processes of their own with one thread each. Memory and bytes are measured as
there; the peak is that of anonymous memory. `whole, then split` is the plain way: `build_encoder_backbone`,
`float()` where FSDP splits, then the split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import table, write_result
from fp8_load import MIB, TEXT, Peak, drop_cache, in_processes, join, make_folder, read_bytes

from ostro.checkpoint.files import read_headers

SIZES = TEXT | {"num_hidden_layers": 6, "vocab_size": 32768}


def run(case: dict[str, Any]) -> dict[str, float]:
    """Builds the embedder of one rank and measures.

    Args:
        case: As in `fp8_load.py`, and `axis`; `loader` is `whole` or `streamed`.
    """
    torch.set_num_threads(1)
    folder, world_size, axis = Path(case["folder"]), case["world_size"], case["axis"]
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from ostro.checkpoint.load_encoder import fill_encoder
    from ostro.models.backbone import build_encoder_backbone, empty_encoder_backbone
    from ostro.models.embedder import Embedder
    from ostro.parallel.apply import prepare
    from ostro.parallel.mesh import AXES, Mesh
    from ostro.parallel.plans import TEXT_TOWER

    join(case)
    devices = DeviceMesh("cpu", torch.arange(world_size), mesh_dim_names=(axis,))
    mesh = Mesh({**dict.fromkeys(AXES, 1), axis: world_size}, devices)
    drop_cache(folder)
    if case["store"]:
        torch.distributed.barrier()
    options: Any = {"pooling": "avg", "extract_submodel": "language_model", "dtype": torch.bfloat16}
    before = read_bytes(), time.process_time()
    with Peak() as peak:
        if case["loader"] == "whole":
            tower = build_encoder_backbone(str(folder), "embedding", **options)
        else:
            tower = empty_encoder_backbone(str(folder), **options)
        embedder = Embedder(tower)
        if axis == "dp_shard":
            embedder.float()
        prepare(tower, TEXT_TOWER, mesh, compute_dtype=torch.bfloat16)
        if case["loader"] == "streamed":
            fill_encoder(tower, folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    result = {"read": read_bytes() - before[0], "cpu_s": time.process_time() - before[1] - peak.cpu_s}
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in tower.parameters()]
    stored = [tensor for tensor in read_headers(folder) if tensor.key.startswith("language_model.")]
    return {
        **result,
        "peak": peak.anonymous,
        "with_files": peak.with_files,
        "held": sum(weight.nbytes for weight in local),
        "largest": max(weight.numel() * weight.element_size() for weight in tower.parameters()),
        "tower": sum(tensor.num_bytes for tensor in stored),
    }


def row(name: str, axis: str, result: dict[str, float]) -> dict[str, Any]:
    """A line of the table."""
    return {
        "load": name,
        "split": f"{axis} 2",
        "shard MiB": f"{result['held'] / MIB:,.0f}",
        "peak MiB": f"{result['peak'] / MIB:,.0f}",
        "peak / shard": f"{result['peak'] / result['held']:.2f}",
        "with mapped files MiB": f"{result['with_files'] / MIB:,.0f}",
        "limit MiB": f"{(1.02 * result['held'] + result['largest']) / MIB:,.0f}",
        "CPU s": f"{result['cpu_s']:.2f}",
        "read MB": f"{result['read'] / 1e6:,.0f}",
        "tower MB": f"{result['tower'] / 1e6:,.0f}",
    }


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--scratch", help="folder with 1 GB free on a real disk, for the weights")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(arguments.case)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "weights"
        make_folder(folder, SIZES)
        for axis in ("dp_shard", "tp"):
            for loader, name in (("whole", "whole, then split"), ("streamed", "own rows")):
                for together in (True, False):
                    store = f"{scratch}/store-{axis}-{loader}" if together else ""
                    case = {"folder": str(folder), "loader": loader, "axis": axis, "world_size": 2, "store": store}
                    for rank, result in enumerate(in_processes(case, __file__)):
                        where = f"rank {rank}" if together else "rank 0, alone on its node"
                        rows.append(row(f"{name}, {where}", axis, result))
                        print(rows[-1], flush=True)
    body = "\n\n".join(
        [
            "432 M parameters in the text tower, computing in bfloat16; `dp_shard` holds them in float32. `limit` is "
            "the target for the peak: 1.02 x the rank's own weights + the largest tensor. Two ranks on one machine "
            "share its page cache, so their sum of bytes counts; alone on its node a rank reads by itself. With `tp`, "
            "of weights split by columns whole rows are read: storage delivers them anyway.",
            table(rows, list(rows[0])),
        ]
    )
    title = "An embedder read by two ranks that split it"
    write_result("embed_load", title, body, packages=["torch", "transformers", "safetensors"])


if __name__ == "__main__":
    main()

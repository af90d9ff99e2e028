"""Loading an FP8 folder into BF16 against transformers' `from_pretrained`: private memory, CPU seconds, bytes read.

A random vision-language model of 1.7 G parameters (1.9 GB on disk, FP8 text linears, tied head) is loaded with a cold
page cache, each case in processes of its own with one thread each. Memory is the growth of resident memory over the
state before the load, sampled every 2 ms by a thread whose own CPU time is taken off; bytes are `read_bytes` of
`/proc/self/io`. The cases with one rank "per node" run rank 0 alone, in a fake process group, so that no other rank
fills the page cache for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import table, write_result
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ostro.checkpoint.files import read_headers
from ostro.checkpoint.presets import model_config
from ostro.checkpoint.shards import Piece, write_shards
from ostro.models.layout import NESTED, TEXT_LINEAR

TEXT = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 26, "num_attention_heads": 16}
TEXT |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 65536}
QUANTIZATION = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
QUANTIZATION |= {"modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]}
VISION = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
MIB = 2**20


def make_folder(folder: Path, text: dict[str, int] = TEXT) -> None:
    """Writes config and weights: random FP8 codes but nan, with a scale each, and random BF16."""
    config = model_config("tiny", vocab_size=text["vocab_size"], tie_word_embeddings=True)
    config = {**config, "text_config": config["text_config"] | text, "vision_config": config["vision_config"] | VISION}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))
    with torch.device("meta"):
        parameters = Mistral3ForConditionalGeneration(Mistral3Config(**config)).state_dict()
    generator = torch.Generator().manual_seed(0)

    def make(name: str, shape: torch.Size) -> dict[str, torch.Tensor]:
        key = NESTED.to_stored(name)
        if not TEXT_LINEAR.fullmatch(name):
            return {key: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)}
        codes = torch.randint(0, 0x7F, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
        module = key.removesuffix("weight")
        return {
            key: codes,
            f"{module}weight_scale_inv": torch.tensor(1e-4),
            f"{module}activation_scale": torch.tensor(1.0),
        }

    pieces = [
        Piece(
            parameter.numel() * (1 if TEXT_LINEAR.fullmatch(name) else 2),
            lambda name=name, parameter=parameter: make(name, parameter.shape),
        )
        for name, parameter in parameters.items()
        if name != "lm_head.weight"
    ]
    write_shards(folder, pieces, max_shard_gib=0.5)
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # only clean pages can be dropped
        os.close(descriptor)


def drop_cache(folder: Path) -> None:
    """Takes the weights out of the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Peak:
    """Largest resident memory within the block over that at its start: anonymous, and with mapped files."""

    def __enter__(self) -> Peak:
        self._done = threading.Event()
        self._before = self._largest = _resident()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._update()
        self.anonymous, self.with_files = (now - then for now, then in zip(self._largest, self._before, strict=True))

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._update()
        self.cpu_s = time.thread_time()

    def _update(self) -> None:
        now = _resident()
        self._largest = (max(self._largest[0], now[0]), max(self._largest[1], now[1]))


def _resident() -> tuple[int, int]:
    """Anonymous and all resident memory, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024, int(fields["VmRSS"].split()[0]) * 1024


def read_bytes() -> int:
    """What storage has delivered to this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def run(case: dict[str, Any]) -> dict[str, float]:
    """Loads the folder once and measures.

    Args:
        case: `folder`, `loader` (`stock` or `ours`), `rank`, `world_size`, `store` (a file for the ranks to meet; empty
            for a fake process group).

    Returns:
        Bytes, and CPU and wall seconds.
    """
    torch.set_num_threads(1)
    folder, world_size = Path(case["folder"]), case["world_size"]
    mesh = join(case) if world_size > 1 else None
    from ostro.checkpoint.load import load_vlm

    drop_cache(folder)
    if mesh is not None and case["store"]:
        torch.distributed.barrier()
    before = read_bytes(), time.process_time(), time.perf_counter()
    with Peak() as peak:
        if case["loader"] == "stock":
            model: Any = Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        else:
            model = load_vlm(folder, mesh=mesh)
    result = {
        "read": read_bytes() - before[0],
        "cpu_s": time.process_time() - before[1] - peak.cpu_s,
        "wall_s": time.perf_counter() - before[2],
        "peak": peak.anonymous,
        "with_files": peak.with_files,
    }
    local = {
        name: parameter.to_local() if mesh is not None else parameter for name, parameter in model.named_parameters()
    }
    result["parameters"] = sum(tensor.numel() * 2 for tensor in local.values())
    stored = {tensor.key: tensor for tensor in read_headers(folder)}
    result["largest"] = max(2 * tensor.num_elements for tensor in stored.values())
    share = 0.0
    for name, tensor in local.items():
        file_entry = stored[NESTED.to_stored(name)]
        share += file_entry.num_bytes * tensor.numel() / file_entry.num_elements
    return {**result, "share": share}


def join(case: dict[str, Any]) -> Any:
    """Makes the default process group and the mesh of a case."""
    import torch.distributed as dist

    if case["store"]:
        store: Any = dist.FileStore(case["store"], case["world_size"])
        dist.init_process_group("gloo", store=store, rank=case["rank"], world_size=case["world_size"])
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case["world_size"])
    return dist.init_device_mesh("cpu", (case["world_size"],))


def in_processes(case: dict[str, Any], script: str = __file__) -> list[dict[str, float]]:
    """Runs a case of a script on all its ranks at once, or on rank 0 of a fake group."""
    ranks = range(case["world_size"]) if case["store"] else [0]
    started = [
        subprocess.Popen(
            [sys.executable, script, "--case", json.dumps({**case, "rank": rank})], stdout=subprocess.PIPE, text=True
        )
        for rank in ranks
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a rank failed: {case}")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def row(name: str, result: dict[str, float], stock: dict[str, float]) -> dict[str, Any]:
    """A line of the table."""
    return {
        "load": name,
        "parameters MiB": f"{result['parameters'] / MIB:,.0f}",
        "peak MiB": f"{result['peak'] / MIB:,.0f}",
        "peak / parameters": f"{result['peak'] / result['parameters']:.3f}",
        "with mapped files MiB": f"{result['with_files'] / MIB:,.0f}",
        "limit MiB": f"{(1.02 * result['parameters'] + result['largest']) / MIB:,.0f}",
        "CPU s": f"{result['cpu_s']:.2f}",
        "CPU / stock": f"{result['cpu_s'] / stock['cpu_s']:.2f}",
        "wall s": f"{result['wall_s']:.1f}",
        "read MB": f"{result['read'] / 1e6:,.0f}",
        "share MB": f"{result['share'] / 1e6:,.0f}",
        "read / share": f"{result['read'] / result['share']:.3f}",
    }


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--scratch", help="folder with 2 GB free on a real disk, for the weights")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each case; the one with least CPU time counts")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(arguments.case)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "weights"
        make_folder(folder)
        cases = {
            "transformers, 1 process": ("stock", 1, False),
            "ours, 1 process": ("ours", 1, False),
            "ours, 2 ranks": ("ours", 2, True),
            "ours, rank 0 of 2, alone on its node": ("ours", 2, False),
            "ours, rank 0 of 8, alone on its node": ("ours", 8, False),
        }
        rows: list[dict[str, Any]] = []
        stock: dict[str, float] = {}
        for name, (loader, world_size, together) in cases.items():
            runs = []
            for number in range(arguments.repeats):
                store = f"{scratch}/store-{world_size}-{number}" if together else ""
                case = {"folder": str(folder), "loader": loader, "world_size": world_size, "store": store}
                runs.append(in_processes(case))
            best = min(runs, key=lambda ranks: sum(rank["cpu_s"] for rank in ranks))
            stock = stock or best[0]
            for rank, result in enumerate(best):
                rows.append(row(f"{name}, rank {rank}" if together else name, result, stock))
                print(rows[-1], flush=True)
    body = "\n\n".join(
        [
            "1.7 G parameters, 1.9 GB on disk, cold page cache, one thread per process. `limit` is the target for the "
            "peak: 1.02 x the process's own BF16 parameters + the largest tensor. Other targets: CPU at most 0.25 x "
            "stock, bytes within 2 % of the share. Two ranks on one machine share its page cache, so what one reads "
            "the other need not, and their sum counts; alone on its node a rank reads its share by itself. "
            "transformers leaves tensors that need no conversion in the mapped file; `with mapped files` has them too.",
            table(rows, list(rows[0])),
        ]
    )
    title = "Loading an FP8 folder into BF16 against transformers"
    write_result("fp8_load", title, body, packages=["torch", "transformers", "safetensors"])


if __name__ == "__main__":
    main()

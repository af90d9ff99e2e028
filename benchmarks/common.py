"""What the benchmarks share: skewed text lengths, measuring in a process of its own, and the result file with hardware
and versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

RESULTS = Path(__file__).parent / "results"


def skewed_lengths(count: int, *, seed: int, longest: int = 1001) -> list[int]:
    """Lognormal text lengths in tokens: median 49, mean about 80, cut at `longest`."""
    drawn = numpy.exp(numpy.random.default_rng(seed).normal(3.9, 0.95, count))
    return [int(length) for length in numpy.clip(drawn, 5, longest)]


def measure(function: Callable[[], Any], *, repeats: int = 3, warm_up: bool = True) -> tuple[Any, dict[str, float]]:
    """Runs a function several times, after one warm-up unless a run takes so long that it would not show.

    Returns:
        Its last value, and `cpu_s` and `wall_s` (the fastest run) and `peak_mib`, the growth of peak resident memory.
    """
    before = _peak_mib()
    if warm_up:
        function()
    cpu, wall = [], []
    for _ in range(repeats):
        started = time.process_time(), time.perf_counter()
        value = function()
        cpu.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    return value, {"cpu_s": min(cpu), "wall_s": min(wall), "peak_mib": _peak_mib() - before}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(script: str, case: dict[str, Any]) -> dict[str, Any]:
    """Runs `script --case JSON` so that its peak memory is its own, and reads the JSON on its last line."""
    done = subprocess.run(
        [sys.executable, script, "--case", json.dumps(case)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the given columns."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def hardware() -> str:
    """One line: processor, cores, CUDA device where there is one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = f"{models[0]}, {len(models)} cores" if models else name
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([name, *devices])


def write_result(name: str, title: str, body: str, *, packages: Sequence[str]) -> None:
    """Writes `results/NAME.md`: what was run, where, with which versions, and the figures."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    command = f"python benchmarks/{name.removesuffix('_cuda')}.py {' '.join(sys.argv[1:])}".strip()
    facts = [
        f"# {title}",
        f"Command: `{command}`",
        f"Hardware: {hardware()} (shared; CPU seconds are the figure to trust)",
        f"Versions: python {platform.python_version()}, {versions}",
    ]
    text = "\n\n".join([*facts, body]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)

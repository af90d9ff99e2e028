"""A corpus beyond one machine to vectors, on Ray Data: `encode_corpus(weights, files, output)`.

Texts to vectors is left to `encoder`, the folder to `shards`. The idea: what travels through Ray is which block of
which file to do; a worker reads the block and writes its shard itself, on a disk that all machines share. So the object
store stays empty, nothing is held in memory beyond one shard per worker, and a lost machine costs the shards it was at.

The first call reads every row before it encodes any, so that a wrong one shows at once and not after hours.

Without a cluster (`RAY_ADDRESS` not set) Ray is started on this machine and ends with the call.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ostro.data.blocks import Block, cut_into_blocks, find_files, read_block
from ostro.errors import DataError, LayoutError, OstroError, RecipeError, missing_extra
from ostro.inference.encoder import Encoder
from ostro.inference.shards import ShardFolder, fingerprint, write_shard
from ostro.models.backbone import read_config
from ostro.models.folder import check_weights_folder, is_local

logger = logging.getLogger(__name__)

# Of the local Ray, whose object store only holds tasks and their outcomes; what it would take is a third of the memory.
_OBJECT_STORE_BYTES = 128 << 20
# Ray tries again without end when a worker dies, out of memory for instance.
_MAX_TRIES = 4
_TRIES = ".tries"

Task = dict[str, Any]
"""The name of a `shard` and the fields of its `Block`, or the outcome: rows travel through Ray as plain dicts."""


def encode_corpus(
    weights: str,
    inputs: Sequence[Path],
    output: Path,
    *,
    prompt: str = "document",
    num_dims: int | None = None,
    shard_mib: int = 16,
) -> ShardFolder:
    """Encodes a corpus into a folder of Parquet shards, or what is missing of it.

    Args:
        weights: Weights folder, seen by all machines.
        inputs: Files and folders, as `ostro.data.blocks.find_files` takes them, seen by all machines.
        output: Folder to write, seen by all machines.
        prompt: Prompt of the folder to put before each text: `query`, `document` or `none`.
        num_dims: Dims to keep; all when None.
        shard_mib: Size of the part of the corpus that makes a shard, in MiB.

    Returns:
        The folder, with all shards.

    Raises:
        RecipeError: For more dims than there are, and an output of other settings.
        DataError: For a corpus without texts, and a row that is wrong.
        LayoutError: For weights that are no folder here, or not an embedder's.
        OstroError: When ray is not installed, a worker dies again and again, or a shard cannot be written.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise missing_extra("ray", "ray") from error
    files = find_files(inputs)
    blocks = cut_into_blocks(files, shard_mib << 20)
    settings = {
        "weights": _fingerprint(weights),
        "prompt": prompt,
        "num_dims": _num_dims(weights, num_dims),
        "dtype": "float32",
        "shard_mib": shard_mib,
        "input_bytes": {file.name: file.stat().st_size for file in files},
    }
    folder = ShardFolder(output.resolve(), settings)
    if not blocks:
        raise DataError(f"{', '.join(map(str, inputs))}: empty; expected at least one text")
    tasks = [{"shard": f"shard-{number:06d}.parquet", **asdict(block)} for number, block in enumerate(blocks)]
    if folder.num_rows:
        todo = folder.unfinished()
        num_shards = len(folder.num_rows)
        logger.info("%s: %d of %d shards are there and are skipped", output, num_shards - len(todo), num_shards)
        if not todo:
            return folder
    with _started_ray(output):
        if not folder.num_rows:
            folder.start(_count_rows(tasks))
            todo = list(folder.num_rows)
        folder.remove(f".*{_TRIES}")
        wanted = set(todo)
        _encode([task for task in tasks if task["shard"] in wanted], weights, folder)
    folder.remove(".*.tmp")  # of killed writers; not earlier, as another job may be writing here
    return folder


def _fingerprint(weights: str) -> str:
    if not is_local(weights):
        raise LayoutError(f"{weights}: --engine ray takes a folder, which all machines see; fetch it with hf download")
    check_weights_folder(Path(weights))
    return fingerprint(Path(weights))


def _num_dims(weights: str, wanted: int | None) -> int:
    size: int = read_config(weights).get_text_config().hidden_size
    if wanted is not None and wanted > size:
        raise RecipeError(f"--num-dims: {wanted} exceeds the model's {size} dims")
    return wanted or size


@contextmanager
def _started_ray(output: Path) -> Iterator[None]:
    """Ray on the cluster of `RAY_ADDRESS`, or on this machine alone; its errors become ours."""
    import ray
    import ray.data

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the error says it in a line
    # it would tell of restarts that it cannot make sure of, though our workers' arguments outlive them
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        if "RAY_ADDRESS" in os.environ:
            ray.init(**quiet)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for a report to Ray's makers
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)), lines[-1])
        raise OstroError(
            f"{output}: a Ray worker failed ({reason}); what is finished stays, and the same command goes on"
        ) from error
    finally:
        ray.shutdown()


def _mapped(tasks: list[Task], function: Callable[..., Any], **options: Any) -> Iterable[Task]:
    """Outcomes as they come; each task is a Ray task of its own."""
    import ray.data

    return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(function, **options).iter_rows()


def _count_rows(tasks: list[Task]) -> dict[str, int]:
    """Rows of every shard that has any; reads the whole corpus, on all machines."""
    logger.info("reading %d parts of the corpus, to be sure of every row before the first is encoded", len(tasks))
    outcomes = sorted(_mapped(tasks, _count_block), key=lambda outcome: outcome["shard"])
    problems = [outcome["problem"] for outcome in outcomes if outcome["problem"]]
    if problems:
        more = f" (and {len(problems) - 1} more parts of the corpus have wrong rows)" if problems[1:] else ""
        raise DataError(problems[0] + more)
    num_rows = {outcome["shard"]: outcome["num_rows"] for outcome in outcomes if outcome["num_rows"]}
    if not num_rows:
        raise DataError(f"{tasks[0]['file']}: has no rows; expected at least one text")
    return num_rows


def _count_block(task: Task) -> Task:
    try:
        return _outcome(task, num_rows=sum(1 for _ in read_block(_block(task))))
    except DataError as error:
        return _outcome(task, problem=str(error))


def _encode(tasks: list[Task], weights: str, folder: ShardFolder) -> None:
    import ray
    import ray.data

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    # on the CPU one worker takes all cores of a machine: one copy of the model, and torch's threads share the work
    resources = {"num_gpus": 1} if num_gpus else {"num_cpus": min(int(node["CPU"]) for node in nodes)}
    size = min(num_gpus or len(nodes), len(tasks))
    device = "a GPU each" if num_gpus else f"{resources['num_cpus']} CPU cores each"
    logger.info("%d shards to encode; workers: %d, %s", len(tasks), size, device)
    outcomes = _mapped(
        tasks,
        _Worker,
        fn_constructor_args=(str(Path(weights).resolve()), folder.settings, str(folder.path)),
        # one at a time, so that the last shards are spread over all workers
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        **resources,
    )
    for number, outcome in enumerate(outcomes, 1):
        if outcome["problem"]:
            raise OstroError(f"{outcome['problem']} (what is finished stays, and the same command goes on)")
        rate = outcome["num_rows"] / outcome["seconds"]
        told = (outcome["shard"], outcome["num_rows"], rate, number, len(tasks))
        logger.info("%s: %d rows, %.1f rows/s; %d of %d", *told)


class _Worker:
    """Encodes blocks, with a model that is opened once."""

    def __init__(self, weights: str, settings: dict[str, Any], output: str) -> None:
        self._weights = weights
        self._settings = settings
        self._output = Path(output)

    def __call__(self, task: Task) -> Task:
        tries = self._output / f".{task['shard']}{_TRIES}"
        try:
            with tries.open("ab") as file:
                file.write(b".")
            if tries.stat().st_size > _MAX_TRIES:
                lost = f"{_MAX_TRIES} workers died of this shard, out of memory perhaps; Ray's logs tell"
                return _outcome(task, problem=f"{self._output / task['shard']}: {lost}")
            encoder = self._encoder  # outside the time, as it is for the first shard alone
            started = time.monotonic()
            documents = list(read_block(_block(task)))
            prompt = "" if self._settings["prompt"] == "none" else encoder.prompts.get(self._settings["prompt"], "")
            embeddings = encoder.encode([document.text for document in documents], prompt=prompt)
            write_shard(self._output / task["shard"], [document.id for document in documents], embeddings.numpy())
            tries.unlink(missing_ok=True)
        except OstroError as error:
            return _outcome(task, problem=str(error))
        except OSError as error:
            return _outcome(task, problem=f"{self._output / task['shard']}: cannot be written ({error.strerror})")
        return _outcome(task, num_rows=len(documents), seconds=time.monotonic() - started)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder.from_pretrained(self._weights, num_dims=self._settings["num_dims"])


def _block(task: Task) -> Block:
    return Block(task["file"], task["begin"], task["end"])


def _outcome(task: Task, *, num_rows: int = 0, seconds: float = 0.0, problem: str = "") -> Task:
    return {"shard": task["shard"], "num_rows": num_rows, "seconds": seconds, "problem": problem}

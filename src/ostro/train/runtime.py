"""What a run stands on: device, seeds, the run folder with its recipe and host facts, and a clean stop on a signal.

It leaves the loops and their states to `embed` and `vlm`.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
import yaml

from ostro.config import dump_recipe
from ostro.errors import DataError, OstroError, RecipeError, ToldElsewhere, first_line, is_out_of_memory
from ostro.parallel.mesh import axis_sizes, data_rank
from ostro.train.ranks import Ranks
from ostro.train.recipe import EmbedRecipe, VlmRecipe

logger = logging.getLogger(__name__)

# Keys that decide how a run is done and not what comes out: these, and all of `parallel`, may change when it goes on.
_FREE_KEYS = {
    "data.micro_batch_tokens",
    "model.activation_checkpointing",
    "model.compile",
    "evaluate.batch_samples",
    "test.batch_samples",
    *(f"train.{key}" for key in ("log_every", "evaluate_every", "save_every", "keep_last", "keep_best", "async_save")),
}
# What a disk that knows no locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What a full disk answers, in an error that may name no file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Packages whose version changes results; written beside every run.
_RECORDED_PACKAGES = ("ostro", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


class Stopped(OstroError):
    """The run was asked to stop and did so with a checkpoint; the exit code is the shell's 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        """Keeps the signal for the exit code."""
        super().__init__(message)
        self.exit_code = 128 + signal_number


def stopped_by(cause: Exception | signal.Signals, checkpoint: Path, step: int, num_steps: int) -> OstroError:
    """The error that ends a run between two steps and says how to go on.

    Args:
        cause: What went wrong, or the signal that asked for the stop.
        checkpoint: Where the run stands, saved.
        step: Optimizer steps done.
        num_steps: Optimizer steps of the whole run.
    """
    if isinstance(cause, ToldElsewhere):
        return cause
    how = "mend the row in place, so that the number of rows stays, and run" if isinstance(cause, DataError) else "run"
    stand = f"Stopped after step {step} of {num_steps} and saved {checkpoint}; {how} the same command again to go on"
    if isinstance(cause, signal.Signals):
        return Stopped(f"received {cause.name}. {stand}", cause)
    return OstroError(f"{cause}. {stand}")


def out_of_memory(key: str, cause: BaseException) -> OstroError:
    """The error of what did not fit.

    Args:
        key: Of the recipe: of the micro-batches, or of an evaluation.
        cause: What was raised.
    """
    what, how = "too large for the memory", "lower it"
    if key == "evaluate":
        what, how = "does not fit the memory", "lower evaluate.batch_samples, or split the model"
    return OstroError(f"{key}: {what} ({first_line(cause)}); {how}")


@contextmanager
def model_in_memory() -> Iterator[None]:
    """A block that makes the model and what trains it.

    Raises:
        OstroError: When memory runs out in it, with what to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OstroError(
            f"model.weights: the model does not fit the memory ({first_line(error)}); split it over more ranks "
            "(parallel.dp_shard, parallel.tp), or set model.dtype=bfloat16"
        ) from error


@dataclass
class StopRequest:
    """Set by the signal handler; the loop looks at it after each step.

    Attributes:
        signal_number: The signal received, or None.
    """

    signal_number: int | None = field(default=None)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first SIGTERM, SIGUSR1 or SIGINT into a request that the loop answers after its step; a second one acts
    at once.

    Yields:
        The request, empty until a signal comes.
    """
    request = StopRequest()
    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.getsignal(number) for number in handled}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        restore()
        # not print: a handler may run in the middle of another write to stderr, which Python refuses to nest
        if os.environ.get("RANK", "0") == "0":  # torchrun hands a signal to all of its processes
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    for number in handled:
        signal.signal(number, receive)
    try:
        yield request
    finally:
        restore()


def select_device() -> torch.device:
    """CUDA when there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def set_seeds(seed: int) -> None:
    """Seeds Python, NumPy and torch (all devices)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """The state that decides every later random draw of a step: torch's generators, as byte tensors by device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def open_run(recipe: EmbedRecipe | VlmRecipe, ranks: Ranks) -> Iterator[Path]:
    """What comes before any work: the mesh is checked, generators are seeded (one seed for the ranks that see the same
    samples), the folder opened.

    Args:
        recipe: The run.
        ranks: Those that run it.

    Yields:
        The run folder, which no other job can open until the block ends.

    Raises:
        RecipeError: When the mesh does not fit the ranks, or the folder holds checkpoints of another recipe.
        OstroError: When the folder cannot be written, or another job has it open; when a disk is full in the block.

    Distributed: as `Ranks.agreed`; rank 0 alone writes.
    """
    folder = Path(recipe.output)
    with ExitStack() as stack:
        with ranks.agreed():
            sizes = axis_sizes(recipe.parallel, ranks.world_size)
            set_seeds(recipe.seed + data_rank(sizes, ranks.rank))
            if ranks.is_main:
                stack.enter_context(locked_folder(folder))
                open_run_folder(folder, dump_recipe(recipe))
        try:
            yield folder
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OstroError(
                f"output: {folder}: a file cannot be written ({error.strerror}); make room and run the same command "
                "again to go on"
            ) from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps other jobs out of a run folder, which is made where it is missing.

    The lock is the system's, on the open file `lock`, so it ends with the process however that ends. It holds between
    machines where their shared disk passes locks on, as NFS 4 and Lustre (mounted with `flock`) do.

    Raises:
        OstroError: When another process holds it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "lock").open("a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        except BlockingIOError as error:
            file.seek(0)
            raise OstroError(
                f"output: {folder} is in use by {file.read() or 'another job'}; wait for that job to end, stop it, or "
                "choose another output"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise _not_writable(folder, error) from error
            logger.warning("%s: its disk has no locks (%s); do not start two jobs on it", folder, error.strerror)
        yield


def open_run_folder(folder: Path, resolved_recipe: str) -> None:
    """Checks that the checkpoints in a run folder are of the same recipe, and records versions and host facts.

    Args:
        folder: The recipe's `output`, an existing folder.
        resolved_recipe: YAML of the whole recipe.

    Raises:
        RecipeError: When the folder holds checkpoints of another recipe; the message shows what differs.
        OstroError: When the folder cannot be written.
    """
    recipe_file = folder / "recipe.yaml"
    try:
        # a run that failed before its first checkpoint has left nothing to go on from, so its recipe may be mended
        if recipe_file.exists() and any(folder.glob("checkpoints/step-*")):
            _check_same_recipe(recipe_file, resolved_recipe)
        recipe_file.write_text(resolved_recipe, encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(host_facts(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> OstroError:
    return OstroError(f"{folder}: cannot be written ({error.strerror}); choose another `output`")


def host_facts() -> dict[str, object]:
    """Versions, processor and devices, as written to `environment.json`."""
    versions = {}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "cuda_devices": devices,
    }


def _check_same_recipe(recipe_file: Path, resolved_recipe: str) -> None:
    earlier, now = (
        _by_dotted_key(yaml.safe_load(text)) for text in (recipe_file.read_text(encoding="utf-8"), resolved_recipe)
    )
    changed = [
        f"{key}: {earlier.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in {**earlier, **now}
        if earlier.get(key) != now.get(key) and key not in _FREE_KEYS and not key.startswith("parallel.")
    ]
    if changed:
        more = f"; and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise RecipeError(
            f"output: {recipe_file.parent} holds a run of another recipe ({'; '.join(changed[:10])}{more}); "
            "choose another output or remove the folder"
        )


def _by_dotted_key(block: Any, prefix: str = "") -> dict[str, object]:
    """The values of a recipe, by key such as `data.train.0.path`."""
    if not isinstance(block, (dict, list)):
        return {prefix[:-1]: block}
    entries = block.items() if isinstance(block, dict) else enumerate(block)
    return {key: value for name, entry in entries for key, value in _by_dotted_key(entry, f"{prefix}{name}.").items()}

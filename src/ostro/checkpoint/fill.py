"""Weights of a folder into tensors that are there, of which a rank may own a part: `check_fit`, then `read_into`.

How tensors are read is left to `reader`, and what model they belong to, to the callers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from ostro.checkpoint.reader import Fp8StorageReader
from ostro.errors import LayoutError, OstroError, is_out_of_memory, shorten


def check_fit(
    source: str, reader: Fp8StorageReader, wanted: Mapping[str, tuple[int, ...]], found: Iterable[str]
) -> None:
    """Compares names and shapes of files and model.

    Args:
        source: What the message begins with.
        reader: Of the folder.
        wanted: Shape of every weight of the model, by runtime name.
        found: Runtime names in the folder that must be of the model.

    Raises:
        LayoutError: When a weight is missing, left over or of another shape.
    """
    missing = [name for name in wanted if name not in reader.shapes]
    unexpected = [reader.keys.weights[name] for name in found if name not in wanted]
    shapes = [
        f"{reader.keys.weights[name]} {list(shape)} for {list(wanted[name])}"
        for name, shape in reader.shapes.items()
        if name in wanted and shape != wanted[name]
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(problems.values()):
        text = "; ".join(f"{len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys)
        raise LayoutError(f"{source}: weights do not fit the configuration: {text}; do they belong together?")


def read_into(reader: Fp8StorageReader, state: dict[str, Any]) -> None:
    """Reads what this rank owns of `state` in place.

    Args:
        reader: Of the folder.
        state: Tensors by runtime name, in the reader's type; any of the folder's.

    Raises:
        CheckpointError: When a file cannot be read, or holds infinite or nan values.
    """
    if not state:
        return
    try:
        with _by_itself():
            load(state, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    except CheckpointException as error:
        cause = next(cause for cause, _ in error.failures.values())
        if isinstance(cause, (OstroError, KeyboardInterrupt, SystemExit)) or is_out_of_memory(cause):
            raise cause from None
        raise


@contextmanager
def _by_itself() -> Iterator[None]:
    """torch warns that each rank reads without the others, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield

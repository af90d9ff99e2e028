"""Weights that may not be here yet: `fetch_weights(path)`."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ostro.errors import CheckpointError
from ostro.models.folder import is_local

# Weights that a repository holds a second time, under Mistral's own names, are not fetched.
_FILES = ("*.json", "model*.safetensors")


def fetch_weights(path: str | Path) -> Path:
    """The folder of a model: the one given, or the files of a hub repository in the cache of the hub's library.

    Args:
        path: Weights folder, or hub id such as `organisation/name`.

    Raises:
        CheckpointError: When it is not there, here or on the hub.
        LayoutError: When it is a file.
    """
    if is_local(str(path)):
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{path}: neither a folder here nor a model that can be had from the hub ({str(error).splitlines()[0]})"
        ) from error

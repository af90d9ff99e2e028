"""The public way to a vision-language model: `AutoModelForImageTextToText.from_pretrained(path)`.

Loading itself is in `load`; this fetches what is not here yet.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch.distributed.device_mesh import DeviceMesh

from ostro.checkpoint.load import load_vlm
from ostro.errors import CheckpointError
from ostro.models.folder import is_local
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration

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
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{path}: neither a folder here nor a model that can be had from the hub ({str(error).splitlines()[0]})"
        ) from error


class AutoModelForImageTextToText:
    """Opens any vision-language checkpoint of the family; not to be instantiated."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        mesh: DeviceMesh | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> Mistral3FP8VLMForConditionalGeneration:
        """Loads a model, FP8 or not, in evaluation mode; see `ostro.checkpoint.load.load_vlm`.

        Args:
            path: Weights folder, or hub id such as `organisation/name`.
            mesh: Ranks to split the parameters over, 1-D; None for one process.
            dtype: Of the parameters: bfloat16, float32 or float16.
            device: Where the parameters go; the mesh's device, else the CPU, when None.

        Raises:
            LayoutError: When the folder is not of such a model, or contradicts itself.
            CheckpointError: When it is not there, or a file is missing, truncated, damaged or not finite.

        Distributed: no collectives; with a mesh each rank reads the rows it owns.
        """
        return load_vlm(fetch_weights(path), mesh=mesh, dtype=dtype, device=device)

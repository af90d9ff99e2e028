"""The public way to a vision-language model: `AutoModelForImageTextToText.from_pretrained(path)`.

Loading itself is in `load`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from ostro.checkpoint.fetch import fetch_weights
from ostro.checkpoint.load import load_vlm
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration


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

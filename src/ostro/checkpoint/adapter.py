"""The adapter between a model's weights and the tensors of its folder, in the room that reads and writes folders.

It lives in `ostro.models.fp8_adapter`, since the model carries it.
"""

from __future__ import annotations

from ostro.models.fp8_adapter import Mistral3FP8StateDictAdapter as Mistral3FP8StateDictAdapter

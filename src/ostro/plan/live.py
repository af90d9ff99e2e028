"""The bytes of tensors that are alive while a block runs, and the most there ever were.

The idea: every tensor that an operation makes passes through torch's dispatcher, whatever made it (a layer, autograd,
FSDP, the optimizer). The storages seen there are held by weak references; their sizes are added up after each
operation, so views count once and a storage that FSDP shrinks to nothing counts as nothing. It works the same on real
tensors and on fake ones, which have shapes and no data: so what a layer holds can be measured for a model that fits on
no machine. What a kernel allocates and frees within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts storage made inside the block, and what is handed to `add`.

    Attributes:
        peak: The most bytes that were alive at once since the start or the last `restart`.
    """

    def __init__(self) -> None:
        """Counts from zero."""
        super().__init__()
        self.peak = 0
        self._storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def now(self) -> int:
        """Bytes alive."""
        return sum(storage.nbytes() for storage in list(self._storages.values()))

    def restart(self) -> int:
        """Forgets the peak, which from here on is that of what follows, and gives the bytes alive."""
        self.peak = self.now()
        return self.peak

    def add(self, values: Iterable[Any]) -> None:
        """Counts the storage of tensors; values that are none are passed over."""
        for value in values:
            if isinstance(value, torch.Tensor):
                storage = (value.to_local() if isinstance(value, DTensor) else value).untyped_storage()
                # a storage keeps its Python object, and so its id, for as long as it lives
                self._storages[id(storage)] = storage

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operation and counts what it made."""
        made = function(*args, **(kwargs or {}))
        self.add(tree_iter(made))
        self.peak = max(self.peak, self.now())
        return made

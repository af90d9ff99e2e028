"""Float32 master weights for a model that computes in bf16.

The model's own weights are bf16, which halves memory traffic and doubles CPU speed; but a bf16 weight moves only when
an update exceeds 1/256 of it, and a bf16 gradient summed over micro-batches loses its small terms. So the optimizer
owns float32 copies: each gradient is added to its copy in float32 as soon as backward makes it, the step is taken on
the copies, and the result is rounded once into the model.
"""

from __future__ import annotations

import torch


class MasterWeights:
    """Float32 copies of a module's trainable parameters, and the gradients summed into them.

    A parameter that is float32 already is its own copy, so a float32 model trains exactly as with a plain optimizer.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Copies the weights and hooks the gradients; `module` must be on its final device.

        Args:
            module: Its parameters with `requires_grad` are trained.
        """
        self._compute = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._masters = {
            name: weight if weight.dtype == torch.float32 else torch.nn.Parameter(weight.detach().float())
            for name, weight in self._compute.items()
        }
        for name, weight in self._compute.items():
            if weight is not self._masters[name]:
                weight.register_post_accumulate_grad_hook(_MoveGradient(self._masters[name]))

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The float32 weights by the names of the module, with `.grad` in float32."""
        return dict(self._masters)

    def publish(self) -> None:
        """Rounds the float32 weights into the module; to be called after each optimizer step and after loading."""
        with torch.no_grad():
            for name, weight in self._compute.items():
                if weight is not self._masters[name]:
                    weight.copy_(self._masters[name])


class _MoveGradient:
    """Adds a parameter's fresh gradient to its master's in float32 and frees it."""

    def __init__(self, master: torch.nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None  # a post-accumulate hook runs after the gradient is there
        if self.master.grad is None:
            self.master.grad = weight.grad.float()
        else:
            self.master.grad.add_(weight.grad)
        weight.grad = None

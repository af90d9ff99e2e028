"""A vision-language model cut into stages of consecutive layers, one per rank, and a step through all of them.

What a stage computes on a batch is left to the caller, the order of the micro-batches to torch's schedules. The idea:
a stage is the whole model object with the parts of the others taken out, so that names of weights are the same on
every stage, in every checkpoint, and without a pipeline. Every stage reads the same samples from its own loader, and
so knows the lengths and labels of every micro-batch: nothing but hidden states travels, forward, and their gradients,
backward. Images need no routing: they are in the batch of their sample, which only the first stage looks at.

torch's schedules send tensors of one shape through stages made for it. Making stages and schedule takes less than a
millisecond and two small messages, so both are made anew for every step, which may then have another length than the
one before.

Source: Huang et al. 2019, "GPipe"; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM", section 2.2, for 1F1B.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import Mistral3Config

from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.parallel.plans import Plan

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

_SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


@dataclass(frozen=True)
class Stage:
    """One of the parts that a model is cut into.

    Attributes:
        index: From 0, which takes the tokens in and has the vision side and the embeddings.
        num_stages: Of the pipeline.
        layers: Text layers that it owns.
        is_tied: Whether the head of the model is its embedding, so that the last stage holds the embedding too.
    """

    index: int
    num_stages: int
    layers: range
    is_tied: bool

    @property
    def is_first(self) -> bool:
        """Whether it takes in tokens and images."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm and the head."""
        return self.index == self.num_stages - 1

    @property
    def has_embedding(self) -> bool:
        """Whether it holds the embedding, to look tokens up or as its head."""
        return self.is_first or (self.is_last and self.is_tied)


def plan_stages(config: Mistral3Config, num_stages: int) -> tuple[Stage, ...]:
    """Where the layers are cut so that the stages have about the same work.

    The work of a part is taken to be the weights of its linear layers; an embedding is looked up and has none. The
    vision side counts for the first stage, the head for the last.

    Args:
        config: Of the whole model.
        num_stages: 1 to the number of text layers.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    width, num_layers = text.hidden_size, text.num_hidden_layers
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    per_layer = width * (heads * text.head_dim + 3 * text.intermediate_size)
    side = vision.hidden_size
    tower = vision.num_hidden_layers * side * (4 * side + 3 * vision.intermediate_size)
    projector = (config.spatial_merge_size * side) ** 2 + side * width + width**2
    before, after = (tower + projector) / per_layer, text.vocab_size * width / per_layer
    share = (before + num_layers + after) / num_stages
    cuts = [int(share * index - before + 0.5) for index in range(1, num_stages)]
    # at least one layer for each stage before a cut, and for each after it
    cuts = [min(max(cut, index), num_layers - num_stages + index) for index, cut in enumerate(cuts, 1)]
    ranges = itertools.starmap(range, itertools.pairwise((0, *cuts, num_layers)))
    is_tied = bool(config.tie_word_embeddings)
    return tuple(Stage(index, num_stages, owned, is_tied) for index, owned in enumerate(ranges))


def own_stage(config: Mistral3Config, group: dist.ProcessGroup | None) -> Stage | None:
    """The stage of this rank.

    Args:
        config: Of the whole model.
        group: The ranks of the pipeline, by stage; None where there is none.
    """
    return None if group is None else plan_stages(config, group.size())[group.rank()]


def keep_stage(model: Mistral3FP8VLMForConditionalGeneration, stage: Stage) -> None:
    """Takes out of a model what other stages own. It then takes `inputs_embeds` and gives hidden states.

    The last stage of a model whose head is the embedding keeps both, as one weight under the embedding's name: its
    gradient is the sum over the two ends, see `sum_over_ends`.

    Args:
        model: Whole, on any device, also the meta device; changed in place.
        stage: The part to keep.
    """
    inner: Any = model.model
    text: Any = inner.language_model
    for index in range(len(text.layers)):
        if index not in stage.layers:
            text.layers[index] = _PassOn()
    if not stage.is_first:
        inner.vision_tower = inner.multi_modal_projector = None
    if not stage.has_embedding:
        text.embed_tokens = None
    if not stage.is_last:
        text.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    owned = f"layers {stage.layers.start} to {stage.layers.stop - 1}"
    logger.info("pipeline stage %d of %d: %s", stage.index + 1, stage.num_stages, owned)


def plan_of_stage(plan: Plan, stage: Stage) -> Plan:
    """The roles of a plan that a stage has modules for.

    Args:
        plan: Of the whole model.
        stage: The part that is kept.
    """
    absent = {"vocabulary": not stage.has_embedding, "head": not stage.is_last}
    return {pattern: role for pattern, role in plan.items() if not absent.get(role, False)}


def run_stage(
    model: torch.nn.Module,
    stage: Stage,
    compute: Callable[[Batch, torch.Tensor | None], torch.Tensor],
    batches: Sequence[Batch],
    *,
    hidden_states: torch.Tensor,
    group: dist.ProcessGroup,
    schedule: str,
) -> float:
    """Forward and backward of this stage over the micro-batches of a step, in step with the other stages.

    Equal to `for batch in batches: compute(batch, None).backward()` on the whole model.

    Args:
        model: What is left of it by `keep_stage`.
        stage: Which part that is.
        compute: Maps a micro-batch and the hidden states before this stage (None on the first) to those after it; on
            the last, to its share of the loss, 0-d. It has to call `model` once.
        batches: The same micro-batches on all stages; at least `stage.num_stages`.
        hidden_states: Shape and dtype of what travels; on the meta device. The same for every micro-batch.
        group: The ranks of the pipeline, by stage.
        schedule: `1f1b` or `gpipe`.

    Returns:
        The sum of the losses on the last stage, else 0.

    Distributed: hidden states and their gradients between neighbours, once each for every micro-batch; before that two
        small messages.
    """
    device = next(model.parameters()).device
    travels = hidden_states.requires_grad_()
    number, loss = (torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta"))
    # shapes given here spare the schedule a trial run of model and loss
    part = PipelineStage(
        _StageModule(model, stage, compute, batches),
        stage.index,
        stage.num_stages,
        device,
        input_args=number if stage.is_first else travels,
        output_args=loss.requires_grad_() if stage.is_last else travels,
        group=group,
    )
    runner = _SCHEDULES[schedule](part, len(batches), loss_fn=lambda loss, _: loss, scale_grads=False)
    numbers, losses = torch.arange(len(batches)), []  # type: ignore[var-annotated]
    try:
        inputs = (numbers,) if stage.is_first else ()
        runner.step(*inputs, number=numbers, target=numbers, losses=losses, return_outputs=False)
    except RuntimeError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from error
        raise
    return float(sum(share.detach() for share in losses))


def pass_through(
    compute: Callable[[torch.Tensor | None], torch.Tensor],
    states: torch.Tensor,
    *,
    stage: Stage,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """A forward pass of this stage on one batch, after the stages before it.

    Args:
        compute: Maps the hidden states before this stage, None on the first, to those after it, or to whatever the last
            stage makes of them.
        states: Of the shape, dtype and device of hidden states, to receive them into.
        stage: Which part of the model this is.
        group: The ranks of the pipeline, by stage.

    Returns:
        What `compute` returns.

    Distributed: hidden states from the stage before and to the one after; all stages call it.
    """
    if stage.is_first:
        output = compute(None)
    else:
        dist.recv(states, group=group, group_src=stage.index - 1)
        output = compute(states)
    if not stage.is_last:
        dist.send(output.contiguous(), group=group, group_dst=stage.index + 1)
    return output


class _StageModule(torch.nn.Module):
    """What a schedule calls: micro-batches are known by their number."""

    def __init__(
        self,
        model: torch.nn.Module,
        stage: Stage,
        compute: Callable[[Batch, torch.Tensor | None], torch.Tensor],
        batches: Sequence[Batch],
    ) -> None:
        super().__init__()
        self.model, self._stage, self._compute, self._batches = model, stage, compute, batches

    def forward(self, received: torch.Tensor, *, number: torch.Tensor) -> torch.Tensor:
        output = self._compute(self._batches[int(number)], None if self._stage.is_first else received)
        # text alone in front of layers that do not train: the next stage sends a gradient, which nothing needs
        return output if output.requires_grad else output.detach().requires_grad_()


class _PassOn(torch.nn.Module):
    """In the place of a layer that another stage owns."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states

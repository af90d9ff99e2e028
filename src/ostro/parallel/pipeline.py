"""A model cut into stages of consecutive layers, one or more per rank, and a step through all of them.

What a stage computes on a batch is left to the caller, the order of the micro-batches to torch's schedules. The idea:
a rank has the whole model object with the parts of the others taken out, so that names of weights are the same on
every rank, in every checkpoint, and without a pipeline; of several stages in it, `running` lets one run at a time.
Every rank reads the same samples from its own loader, and so knows the lengths and labels of every micro-batch: nothing
but hidden states travels, forward, and their gradients, backward. Images need no routing: they are in the batch of
their sample, which only the first stage looks at.

With several stages per rank (interleaved), rank r of p has the stages r, p + r, 2p + r and so on: the first is on the
first rank, the last on the last, and hidden states go round in a ring.

torch's schedules send tensors of one shape through stages made for it. Making stages and schedule takes less than a
millisecond and two small messages, so both are made anew for every step, which may then have another length than the
one before.

Source: Huang et al. 2019, "GPipe"; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM", section 2.2, for 1F1B and its interleaved form.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import DebugLevel, get_debug_level
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from transformers import Mistral3Config, PreTrainedConfig, PreTrainedModel

from ostro.errors import is_out_of_memory
from ostro.parallel.collectives import receive, send
from ostro.parallel.plans import Plan

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

_SCHEDULES: dict[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}


# Before 2.12, torch always compares the strides of what it receives, and so needs memory for all of it.
_COMPARES_STRIDES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


@dataclass(frozen=True)
class Stage:
    """One of the parts that a model is cut into.

    Attributes:
        index: From 0, which takes the tokens in and has the vision side and the embeddings.
        num_stages: Of the pipeline.
        layers: Text layers that it owns.
        is_tied: Whether the model has a head, which is its embedding, so that the last stage holds the embedding too.
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
        """Whether it has the last norm, and the head where there is one."""
        return self.index == self.num_stages - 1

    @property
    def has_embedding(self) -> bool:
        """Whether it holds the embedding, to look tokens up or as its head."""
        return self.is_first or (self.is_last and self.is_tied)


def plan_stages(config: PreTrainedConfig, num_stages: int) -> tuple[Stage, ...]:
    """Where the layers are cut so that the stages have about the same work.

    The work of a part is taken to be the weights of its linear layers; an embedding is looked up and has none. The
    vision side counts for the first stage, the head for the last.

    Args:
        config: Of the whole model: a vision-language model, or a text tower, which has neither side nor head.
        num_stages: 1 to the number of text layers.
    """
    text: Any = config.get_text_config()
    num_layers, (before, after) = text.num_hidden_layers, _ends_in_layers(config)
    share = (before + num_layers + after) / num_stages
    cuts = [int(share * index - before + 0.5) for index in range(1, num_stages)]
    # at least one layer for each stage before a cut, and for each after it
    cuts = [min(max(cut, index), num_layers - num_stages + index) for index, cut in enumerate(cuts, 1)]
    ranges = itertools.starmap(range, itertools.pairwise((0, *cuts, num_layers)))
    is_tied = isinstance(config, Mistral3Config) and bool(config.tie_word_embeddings)
    return tuple(Stage(index, num_stages, owned, is_tied) for index, owned in enumerate(ranges))


def _ends_in_layers(config: PreTrainedConfig) -> tuple[float, float]:
    """The work before and after the text layers, that of a layer being 1."""
    if not isinstance(config, Mistral3Config):
        return 0.0, 0.0
    text: Any = config.text_config
    vision: Any = config.vision_config
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    width, side = text.hidden_size, vision.hidden_size
    per_layer = width * (heads * text.head_dim + 3 * text.intermediate_size)
    tower = vision.num_hidden_layers * side * (4 * side + 3 * vision.intermediate_size)
    projector = (config.spatial_merge_size * side) ** 2 + side * width + width**2
    return (tower + projector) / per_layer, text.vocab_size * width / per_layer


def own_stages(
    config: PreTrainedConfig, group: dist.ProcessGroup | None, stages_per_rank: int = 1
) -> tuple[Stage, ...]:
    """The stages of this rank, first to last.

    Args:
        config: Of the whole model.
        group: The ranks of the pipeline, in the order of their first stages; None where there is none.
        stages_per_rank: Of each of them.

    Returns:
        None of them where there is no pipeline.
    """
    if group is None:
        return ()
    return plan_stages(config, group.size() * stages_per_rank)[group.rank() :: group.size()]


def fitting_number(num_micro_batches: int, *, num_ranks: int, schedule: str) -> int:
    """The least number of micro-batches, no less than there are, that a pipeline takes in a step.

    Args:
        num_micro_batches: As many as there are.
        num_ranks: Of the pipeline.
        schedule: As for `run_stages`. `interleaved` takes them in rounds of one size, at least `num_ranks`.
    """
    number = max(num_micro_batches, num_ranks)
    while schedule == "interleaved" and number % (number // num_ranks):
        number += 1
    return number


def keep_stages(model: PreTrainedModel, stages: Sequence[Stage]) -> None:
    """Takes out of a model what other ranks own. Its stages can then run, see `running`.

    The last stage of a model whose head is the embedding keeps both, as one weight under the embedding's name: its
    gradient is the sum over the two ends, see `sum_over_ends`.

    Args:
        model: Whole, on any device, also the meta device; changed in place.
        stages: The parts to keep.
    """
    text = _text_tower(model)
    owned = {number for stage in stages for number in stage.layers}
    layers = (layer if number in owned else torch.nn.Identity() for number, layer in enumerate(text.layers))
    text.layers = _OwnLayers(layers, stages[0].layers)
    if text is not model and not stages[0].is_first:
        model.model.vision_tower = model.model.multi_modal_projector = None
    if not any(stage.has_embedding for stage in stages):
        text.embed_tokens = None
    if not stages[-1].is_last:
        _replace(model, dict.fromkeys(_ends(model), torch.nn.Identity()))
    for stage in stages:
        shown = f"layers {stage.layers.start} to {stage.layers.stop - 1}"
        logger.info("pipeline stage %d of %d: %s", stage.index + 1, stage.num_stages, shown)


@contextmanager
def running(model: PreTrainedModel, stage: Stage) -> Iterator[None]:
    """Lets the model be one of the stages that it holds while the block lasts.

    The first stage takes tokens and images, another `inputs_embeds`, the hidden states of the one before; the last
    gives what the model gives, another hidden states in its place.

    Args:
        model: What is left of it by `keep_stages`.
        stage: One of those kept.
    """
    ends = {name: model.get_submodule(name) for name in _ends(model)}
    _text_tower(model).layers.running = stage.layers
    if not stage.is_last:
        _replace(model, dict.fromkeys(ends, torch.nn.Identity()))
    try:
        yield
    finally:
        _replace(model, ends)


def _text_tower(model: PreTrainedModel) -> Any:
    """The module with the text layers: a part of a vision-language model, else the model."""
    return model.model.language_model if isinstance(model.config, Mistral3Config) else model


def _ends(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of what comes after the layers."""
    return ("model.language_model.norm", "lm_head") if isinstance(model.config, Mistral3Config) else ("norm",)


def _replace(model: PreTrainedModel, modules: Mapping[str, torch.nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def plan_of_stages(plan: Plan, stages: Sequence[Stage]) -> Plan:
    """The roles of a plan that the stages of a rank have modules for.

    Args:
        plan: Of the whole model.
        stages: The parts that are kept.
    """
    has_embedding = any(stage.has_embedding for stage in stages)
    absent = {"vocabulary": not has_embedding, "head": not stages[-1].is_last}
    return {pattern: role for pattern, role in plan.items() if not absent.get(role, False)}


Compute = Callable[[Stage, Batch, torch.Tensor | None], torch.Tensor]
"""What a stage makes of a micro-batch, see `run_stages`."""


def run_stages(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    compute: Compute[Batch],
    batches: Sequence[Batch],
    *,
    hidden_states: torch.Tensor,
    group: dist.ProcessGroup,
    schedule: str,
) -> float:
    """Forward and backward of this rank's stages over the micro-batches of a step, in step with the other ranks.

    Equal to `for batch in batches: compute(stage, batch, None).backward()` on the whole model as its only stage.

    Args:
        model: What is left of it by `keep_stages`.
        stages: Which parts that is; more than one with `interleaved`.
        compute: Maps a stage, a micro-batch and the hidden states before this stage (None on the first) to those after
            it; on the last, to its share of the loss, 0-d. It has to call `model` once, which then is that stage.
        batches: The same micro-batches on all ranks; `fitting_number` of them.
        hidden_states: Shape and dtype of what travels; on the meta device. The same for every micro-batch.
        group: The ranks of the pipeline, in the order of their first stages.
        schedule: `1f1b`, `gpipe` or `interleaved`.

    Returns:
        The sum of the losses on the last rank, else 0.

    Distributed: hidden states and their gradients between the ranks of neighbouring stages, once each for every
        micro-batch; before that two small messages.
    """
    device = next(model.parameters()).device
    travels, make_part = hidden_states.requires_grad_(), PipelineStage
    if not _COMPARES_STRIDES and get_debug_level() != DebugLevel.DETAIL:
        # one entry under that shape, in the place of which `_LeanStage` puts memory when it is needed
        travels, make_part = hidden_states.new_empty(1).expand(hidden_states.shape).requires_grad_(), _LeanStage
    number, loss = (torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta"))
    # shapes given here spare the schedule a trial run of model and loss
    parts = [
        make_part(
            _StageModule(model, stage, compute, batches),
            stage.index,
            stage.num_stages,
            device,
            input_args=number if stage.is_first else travels,
            output_args=loss.requires_grad_() if stage.is_last else travels,
            group=group,
        )
        for stage in stages
    ]
    make = partial(_SCHEDULES[schedule], n_microbatches=len(batches), loss_fn=lambda loss, _: loss, scale_grads=False)
    runner = make(parts if schedule == "interleaved" else parts[0])
    numbers, losses = torch.arange(len(batches)), []  # type: ignore[var-annotated]
    try:
        inputs = (numbers,) if stages[0].is_first else ()
        runner.step(*inputs, number=numbers, target=numbers, losses=losses, return_outputs=False)
    except RuntimeError as error:
        if error.__cause__ is not None and is_out_of_memory(error.__cause__):
            raise error.__cause__ from error
        raise
    return float(sum(share.detach() for share in losses))


@torch.no_grad()
def pass_through(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    compute: Callable[[Stage, torch.Tensor | None], torch.Tensor],
    states: torch.Tensor,
    *,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """A forward pass of one batch through this rank's stages, each after the one before it, without gradients.

    Args:
        model: What is left of it by `keep_stages`.
        stages: Which parts that is.
        compute: Maps a stage and the hidden states before it (None on the first) to those after it, or on the last to
            whatever that makes of them. It has to call `model`, which then is that stage.
        states: Of the shape, dtype and device of hidden states, to receive them into.
        group: The ranks of the pipeline, in the order of their first stages.

    Returns:
        What `compute` gives for the last of these stages.

    Distributed: hidden states between the ranks of neighbouring stages; all ranks call it.
    """
    for stage in stages:
        if not stage.is_first:
            receive(states, group, (stage.index - 1) % group.size())
        with running(model, stage):
            output = compute(stage, None if stage.is_first else states).contiguous()
        if not stage.is_last:
            send(output, group, (stage.index + 1) % group.size())
    return output


def share_last(output: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What the last rank of a pipeline has, on all its ranks.

    Args:
        output: Contiguous; on the last rank the value, on the others a tensor of its shape and dtype, which is written.
        group: The ranks of the pipeline, in the order of their first stages.

    Returns:
        `output`.

    Distributed: one broadcast.
    """
    dist.broadcast(output, group=group, group_src=group.size() - 1)
    return output


class _StageModule(torch.nn.Module):
    """What a schedule calls: micro-batches are known by their number."""

    def __init__(
        self,
        model: PreTrainedModel,
        stage: Stage,
        compute: Compute[Batch],
        batches: Sequence[Batch],
    ) -> None:
        super().__init__()
        self.model, self._stage, self._compute, self._batches = model, stage, compute, batches

    def forward(self, received: torch.Tensor, *, number: torch.Tensor) -> torch.Tensor:
        with running(self.model, self._stage):
            before = None if self._stage.is_first else received
            output = self._compute(self._stage, self._batches[int(number)], before)
        # text alone in front of layers that do not train: the next stage sends a gradient, which nothing needs
        return output if output.requires_grad else output.detach().requires_grad_()


class _LeanStage(PipelineStage):
    """Has memory for what it receives of a micro-batch from when that is due until its backward pass has used it.

    torch has it for all micro-batches of a step from the beginning: with many of them, more than for all else.
    """

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        used = (() if self.is_first else self.args_recv_info[bwd_chunk_id], self.grad_recv_info[bwd_chunk_id])
        for place in itertools.chain(*used):
            place.buffer = None

    def _make_room(self, places: Iterable[Any]) -> None:
        for place in places:
            place.buffer = torch.empty(place.buffer.shape, dtype=place.buffer.dtype, device=self.device)


class _OwnLayers(torch.nn.ModuleList):
    """All text layers by number, others' replaced; a slice, which is what the text tower runs, has those of one stage.

    FSDP must find the layers of every stage in the model at its first call, so none are taken out for a while.
    """

    def __init__(self, layers: Iterable[torch.nn.Module], running: range) -> None:
        super().__init__(layers)
        self.running = running

    def __getitem__(self, index: Any) -> Any:
        return list(self)[self.running.start : self.running.stop] if isinstance(index, slice) else list(self)[index]

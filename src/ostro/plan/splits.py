"""Which ways of laying a run out on so many GPUs fit into their memory, best first: `make_plan(recipe, ...)`.

Bytes are left to `memory` and `traffic`, the table to the command line. The idea: there are few ways to write a number
as a product of four, so all are tried, those that a rule forbids with the rule as the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedConfig

from ostro.errors import OstroError, RecipeError
from ostro.parallel.mesh import AXES, check_fits, check_schedule, check_vision_fits
from ostro.parallel.options import ParallelOptions
from ostro.parallel.pipeline import fitting_number, plan_stages
from ostro.plan.memory import Share, Sizes, Split, Stage, Usage, usage
from ostro.plan.orders import turns
from ostro.plan.releases import read_config
from ostro.plan.shapes import DeviceKind, Settings
from ostro.plan.traffic import Step, step_traffic
from ostro.train.parts import PARTS
from ostro.train.recipe import EmbedRecipe, VlmRecipe

GIB = 2**30

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill; the rest is for the CUDA context, NCCL and gaps between tensors."""


@dataclass(frozen=True)
class Choice:
    """A split of the ranks that no rule forbids.

    Attributes:
        split: Its sizes.
        needs: Memory of the fullest rank, as the recipe says.
        other: Memory with activation checkpointing where the recipe has none, or without where it has.
        step: Traffic and time.
        num_micro_batches: Of a rank in a step.
        reason: Why it does not fit; empty where it does.
    """

    split: Split
    needs: Usage
    other: Usage
    step: Step
    num_micro_batches: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """What a step works on.

    Attributes:
        key: Of the recipe, that bounds the number of data-parallel ranks.
        num_samples: Conversations or queries of a step.
        sample_tokens: Tokens of each, taken to be as many as the recipe allows.
        num_passes: Forward passes of a micro-batch.
    """

    key: str
    num_samples: int
    sample_tokens: int
    num_passes: int


@dataclass(frozen=True)
class Plan:
    """All splits of a run.

    Attributes:
        settings: Of the run.
        source: Where its configuration is from.
        batch: Of a step.
        num_parameters: Of the whole model.
        limit: Bytes that a rank may hold.
        fitting: Best first: the shortest step, of equal ones the smaller peak.
        too_large: Nearest first, by their peak.
        forbidden: Splits that a rule forbids, whatever the memory, and the rule.
    """

    settings: Settings
    source: str
    batch: Batch
    num_parameters: int
    limit: float
    fitting: tuple[Choice, ...]
    too_large: tuple[Choice, ...]
    forbidden: tuple[tuple[Split, str], ...]

    def require_fit(self) -> None:
        """Raises an error that names what to change when no split fits.

        Raises:
            OstroError: Naming the key of the recipe, or the memory asked for.
        """
        if self.fitting:
            return
        if not self.too_large:
            split, rule = self.forbidden[0]
            raise OstroError(f"{rule}; no other split is left of the {split.num_ranks} ranks")
        nearest = self.too_large[0]
        peak = f"{nearest.needs.peak / GIB:,.1f} GiB"
        advice = "lower data.micro_batch_tokens, freeze parts (model.freeze) or use more GPUs"
        if nearest.other.peak <= self.limit and not self.settings.recompute:
            advice = "set model.activation_checkpointing=true"
        gpus = "1 GPU" if nearest.split.num_ranks == 1 else f"{nearest.split.num_ranks} GPUs"
        raise OstroError(
            f"--memory: nothing fits on {gpus}; the nearest, {nearest.split}, takes {peak} where "
            f"{self.limit / GIB:,.1f} are usable: {advice}"
        )


def make_plan(
    recipe: EmbedRecipe | VlmRecipe,
    *,
    num_gpus: int,
    memory_gib: float,
    device: DeviceKind = "cuda",
    image_share: float = 0.5,
    gpus_per_machine: int = 8,
) -> Plan:
    """Tries every split of `num_gpus` ranks that the recipe's block `parallel` leaves open.

    Args:
        recipe: The run. Sizes that its `parallel` sets, other than to -1, stay.
        num_gpus: Ranks, >= 1.
        memory_gib: Memory of each, > 0.
        device: Whose kernels run.
        image_share: Share of a micro-batch's tokens that are image tokens.
        gpus_per_machine: GPUs with fast links to one another.

    Returns:
        The plan; `fitting` is empty when nothing fits.

    Raises:
        RecipeError: When a number is out of range, the sizes of `parallel` do not divide the ranks, or the model is
            unknown.
        LayoutError: When the model's configuration cannot be used.
    """
    if num_gpus < 1:
        raise RecipeError(f"--gpus: must be at least 1, got {num_gpus}")
    if not 0 < memory_gib < math.inf:
        raise RecipeError(f"--memory: must be more than 0 GiB and finite, got {memory_gib:g}")
    if not 0 <= image_share <= 1:
        raise RecipeError(f"--image-share: must be from 0 to 1, got {image_share:g}")
    if gpus_per_machine < 1:
        raise RecipeError(f"--gpus-per-machine: must be at least 1, got {gpus_per_machine}")
    config, source = read_config(recipe)
    settings, batch = _settings(recipe, config, device, image_share), _batch(recipe)
    sizes, swapped = Sizes(settings), Sizes(replace(settings, recompute=not settings.recompute))
    limit = memory_gib * USABLE * GIB
    choices, forbidden = [], []
    for split in _splits(recipe, num_gpus):
        if rule := _forbidden(settings, batch, split, recipe.parallel):
            forbidden.append((split, rule))
            continue
        num_micro_batches = _num_micro_batches(settings, batch, split)
        needs, other = (_needs(each, split, num_micro_batches) for each in (sizes, swapped))
        step = step_traffic(
            sizes,
            split,
            num_micro_batches=num_micro_batches,
            num_tokens=batch.num_samples * batch.sample_tokens,
            gpus_per_machine=gpus_per_machine,
            num_passes=batch.num_passes if num_micro_batches > 1 else 1,
        )
        choices.append(Choice(split, needs, other, step, num_micro_batches, _too_large(needs, other, settings, limit)))
    fitting = sorted((choice for choice in choices if not choice.reason), key=_badness)
    too_large = sorted((choice for choice in choices if choice.reason), key=lambda choice: choice.needs.peak)
    num_parameters = sum(weights.all for weights in sizes.counts(1).values())
    return Plan(settings, source, batch, num_parameters, limit, tuple(fitting), tuple(too_large), tuple(forbidden))


def _badness(choice: Choice) -> tuple[float, int]:
    return choice.step.seconds, choice.needs.peak


def _settings(
    recipe: EmbedRecipe | VlmRecipe, config: PreTrainedConfig, device: DeviceKind, image_share: float
) -> Settings:
    return Settings(
        config=config,
        dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.model.dtype],
        frozen=frozenset(recipe.model.freeze if isinstance(recipe, VlmRecipe) else ()),
        recompute=recipe.model.activation_checkpointing,
        num_tokens=recipe.data.micro_batch_tokens,
        image_share=image_share if isinstance(recipe, VlmRecipe) else 0.0,
        device=device,
        num_texts=_num_texts(recipe) if isinstance(recipe, EmbedRecipe) else (0, 0),
        tp_vision=recipe.parallel.tp_vision,
        shard_frozen=recipe.parallel.shard_frozen,
        schedule=recipe.parallel.schedule,
        stages_per_rank=recipe.parallel.stages_per_rank,
    )


def _num_texts(recipe: EmbedRecipe) -> tuple[int, int]:
    queries = recipe.data.global_batch_queries
    return queries, queries * (1 + recipe.data.num_negatives)


def _batch(recipe: EmbedRecipe | VlmRecipe) -> Batch:
    if isinstance(recipe, VlmRecipe):
        return Batch("data.global_batch_samples", recipe.data.global_batch_samples, recipe.data.max_tokens, 1)
    data = recipe.data
    tokens = data.query_max_tokens + (1 + data.num_negatives) * data.document_max_tokens
    return Batch("data.global_batch_queries", data.global_batch_queries, tokens, 2)


def _splits(recipe: EmbedRecipe | VlmRecipe, num_gpus: int) -> Iterator[Split]:
    """Every product of four that makes up the ranks, with the sizes that the recipe sets."""
    chosen = {axis: vars(recipe.parallel)[axis] for axis in AXES if axis in recipe.parallel.model_fields_set}
    given = {axis: size for axis, size in chosen.items() if size != -1}
    product = math.prod(given.values())
    if product < 1 or num_gpus % product:
        shown = ", ".join(f"{axis} {size}" for axis, size in given.items())
        key = next(axis for axis in AXES if axis in given)
        raise RecipeError(f"parallel.{key}: the sizes given ({shown}) must divide the {num_gpus} ranks of --gpus")
    divisors = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    found = False
    for sizes in itertools.product(*([given[axis]] if axis in given else divisors for axis in AXES)):
        split = Split(**dict(zip(AXES, sizes, strict=True)))
        if split.num_ranks == num_gpus:
            found = True
            yield split
    if not found:
        shown = ", ".join(f"{axis} {size}" for axis, size in given.items())
        raise RecipeError(f"parallel: {shown} make up {product} ranks, --gpus asks for {num_gpus}; leave an axis open")


def _num_micro_batches(settings: Settings, batch: Batch, split: Split) -> int:
    samples = math.ceil(batch.num_samples / split.num_data_ranks)
    together = max(settings.num_tokens // batch.sample_tokens, 1)
    # a pipeline cuts smaller ones where these are too few, which are counted as if they were full
    return fitting_number(math.ceil(samples / together), num_ranks=split.pp, schedule=settings.schedule)


def _forbidden(settings: Settings, batch: Batch, split: Split, options: ParallelOptions) -> str:
    """The rule that a split breaks, whatever the memory; empty where it breaks none."""
    try:
        check_schedule(options, split.pp)
        check_fits(vars(split), settings.text_config, options.stages_per_rank)
        if settings.tp_vision:
            check_vision_fits(vars(split), settings.config)  # type: ignore[arg-type]
    except RecipeError as error:
        return str(error).partition(";")[0]
    if split.num_data_ranks > batch.num_samples:
        return f"{batch.key}: {batch.num_samples} for {split.num_data_ranks} data-parallel ranks"
    if split.dp_shard > 1 and set(PARTS) - settings.frozen == {"head"}:
        return "model.freeze: the head alone cannot be trained with dp_shard"
    return ""


def cut_layers(sizes: Sizes, split: Split, num_micro_batches: int) -> list[Share]:
    """What each rank of a pipeline has, as training cuts the layers; one rank for a run without.

    Args:
        sizes: Of the run.
        split: Of the ranks.
        num_micro_batches: Of a step.
    """
    settings, pp = sizes.settings, split.pp
    stages = [Stage(settings.text_config.num_hidden_layers)]
    if pp > 1:
        cut = plan_stages(settings.config, pp * settings.stages_per_rank)
        stages = [Stage(len(stage.layers), stage.is_first, stage.is_last) for stage in cut]
    order = partial(
        turns,
        settings.schedule if pp > 1 else "1f1b",
        num_ranks=pp,
        stages_per_rank=len(stages) // pp,
        num_micro_batches=num_micro_batches,
    )
    return [Share(tuple(stages[rank::pp]), order(rank=rank)) for rank in range(pp)]


def usages(sizes: Sizes, split: Split, num_micro_batches: int) -> list[Usage]:
    """Memory of each rank of a pipeline; of one rank for a run without.

    Args:
        sizes: Of the run.
        split: Of the ranks.
        num_micro_batches: Of a step.
    """
    return [usage(sizes, split, share) for share in cut_layers(sizes, split, num_micro_batches)]


def _needs(sizes: Sizes, split: Split, num_micro_batches: int) -> Usage:
    return max(usages(sizes, split, num_micro_batches), key=lambda each: each.peak)


def _too_large(needs: Usage, other: Usage, settings: Settings, limit: float) -> str:
    if needs.peak <= limit:
        return ""
    over = f"{needs.peak / GIB:,.1f} GiB for {limit / GIB:,.1f}"
    if other.peak <= limit and not settings.recompute:
        return f"{over}; fits with model.activation_checkpointing=true"
    return over

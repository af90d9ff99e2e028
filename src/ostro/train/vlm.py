"""Fine-tune a vision-language model on conversations: from a recipe to checkpoints, metrics, weights and a report.

Batches are left to `data`, the loss to `vlm_loss`, files to `checkpoint`, and what the kinds of run share to `loop` and
`trainer`. Read `run` first. The idea of a step: conversations are
laid end to end, so nothing is spent on padding; the loss of every supervised token counts the same, in whichever
micro-batch, so it is divided by the supervised tokens of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from ostro.checkpoint.fetch import fetch_weights
from ostro.checkpoint.load import load_vlm
from ostro.data.conversation import open_conversations
from ostro.data.conversation_collate import ConversationBatch
from ostro.data.conversation_loader import ConversationLoader, ConversationStep
from ostro.data.conversation_tokens import ConversationEncoder
from ostro.errors import RecipeError
from ostro.inference.chat import Chat, open_conversation_encoder
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import packed_rows, use_packed_attention
from ostro.parallel.apply import prepare
from ostro.parallel.mesh import AXES, Mesh, build_mesh, check_fits, check_vision_fits
from ostro.parallel.pipeline import fitting_number, keep_stages, own_stages, plan_of_stages, run_stages
from ostro.parallel.plans import VISION_LANGUAGE, VISION_SIDE
from ostro.train import runtime, vlm_result
from ostro.train.flops import peak_flops, step_flops
from ostro.train.loop import run_steps
from ostro.train.parts import PARTS, freeze, part_of, rate_factors
from ostro.train.ranks import Ranks
from ostro.train.recipe import VlmRecipe
from ostro.train.split_chat import SplitChat
from ostro.train.step import check_finite
from ostro.train.trainer import Trainer, find_checkpoint
from ostro.train.vlm_loss import in_step, packed_loss, stage_output


def run(recipe: VlmRecipe, *, console: Console) -> vlm_result.VlmResult:
    """Trains, lets the model answer held-out questions, exports and reports; goes on from the latest checkpoint in
    `recipe.output` when there is one.

    Args:
        recipe: What to train, on what, and how.
        console: Shows progress and results.

    Returns:
        What the run achieved, and its folder.

    Raises:
        RecipeError: When a part to freeze is not in the model, or the folder holds another run.
        Stopped: When a signal asked for a stop, with a checkpoint.
        OstroError: When a row or file is wrong or the loss is not finite, with a checkpoint.

    Distributed: on all ranks; export and the metrics of the result are those of rank 0.
    """
    ranks = Ranks.current()
    with ranks.agreed():
        vlm_result.check_extras()
    with runtime.open_run(recipe, ranks) as folder:
        return _run(recipe, folder, ranks, console)


def _run(recipe: VlmRecipe, folder: Path, ranks: Ranks, console: Console) -> vlm_result.VlmResult:
    mesh = build_mesh(recipe.parallel, ranks.world_size, runtime.select_device().type)
    checkpoint = find_checkpoint(folder, ranks)
    with ranks.agreed(), runtime.model_in_memory():
        model, encoder = build_model(recipe, mesh, is_resumed=checkpoint is not None)
        trainer = VlmTrainer(recipe, model, open_loader(recipe, encoder, mesh), mesh)
    judges, held_out = trainer.judges, recipe.evaluate
    chat = SplitChat(model, encoder, judges) if mesh.splits_model else Chat(model, encoder)
    with trainer.batches, runtime.stop_on_signal() as stop:
        trainer.resume(checkpoint, console)
        during = partial(vlm_result.evaluate_during, held_out, chat, judges) if held_out else None
        before = partial(vlm_result.evaluate_untrained, recipe, chat, judges)
        run_steps(trainer, recipe.train, recipe.track, folder, console, stop=stop, before=before, evaluate=during)
    report = trainer.judge(lambda: vlm_result.answer_test(recipe.test, chat, judges) if recipe.test else None)
    whole = trainer.gather(model, partial(build_whole, recipe)).eval()
    done = ranks.on_main(partial(vlm_result.finish, recipe, whole, report, trainer.step, console))
    return done or vlm_result.VlmResult(folder, folder / "weights")


def build_model(
    recipe: VlmRecipe,
    mesh: Mesh | None = None,
    *,
    is_resumed: bool = False,
    device: torch.device | None = None,
) -> tuple[Mistral3FP8VLMForConditionalGeneration, ConversationEncoder]:
    """The model to train, on its device with its frozen parts, and what turns conversations into its tokens.

    Args:
        recipe: The run.
        mesh: How the ranks are laid out: a rank reads and holds its part alone, in float32 what `dp_shard` splits. None
            for a model that is not trained, only evaluated or exported: it is whole and not compiled.
        is_resumed: Whether a checkpoint will fill in the trained weights, so that they are not read.
        device: Where it is; that of the run when None.

    Raises:
        RecipeError: When a part to freeze is not in the model.
        LayoutError: When the weights are not of the family, or the tokenizer does not belong to them.
        CheckpointError: When the files cannot be read.
    """
    options, compiled = recipe.model, recipe.model.compile and mesh is not None
    mesh = mesh or Mesh(dict.fromkeys(AXES, 1))
    fsdp = mesh.fsdp
    if fsdp is not None and set(PARTS) - set(options.freeze) == {"head"}:
        # the backward pass through the split model, which sums the gradients, would never begin
        raise RecipeError(
            f"model.freeze: the head alone cannot be trained with parallel.dp_shard={fsdp['dp_shard'].size()}; leave "
            "another part to train, or set parallel.dp_shard=1"
        )
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    folder = fetch_weights(options.weights)
    device = device or runtime.select_device()
    skip = (lambda name: part_of(name) not in options.freeze) if is_resumed else None
    shard = partial(_keep_own, recipe=recipe, mesh=mesh, compiled=compiled)
    model = load_vlm(folder, dtype=dtype, device=device, shard=shard, skip=skip)
    encoder = open_conversation_encoder(
        folder, model.config, max_tokens=recipe.data.max_tokens, too_long=recipe.data.too_long
    )
    use_packed_attention(model)
    return model.train(), encoder


def build_whole(recipe: VlmRecipe) -> Mistral3FP8VLMForConditionalGeneration:
    """The model as it is exported where ranks hold it in parts, without its trained weights: in the memory of the host,
    as a model that needs splitting may not fit a device.

    Args:
        recipe: The run.

    Raises:
        OstroError: As `build_model`.
    """
    return build_model(recipe, is_resumed=True, device=torch.device("cpu"))[0]


def _keep_own(model: Mistral3FP8VLMForConditionalGeneration, recipe: VlmRecipe, mesh: Mesh, *, compiled: bool) -> None:
    """Freezes parts of the whole model, on the meta device, and leaves of it what this rank holds."""
    options, plan = recipe.model, VISION_LANGUAGE
    freeze(model, options.freeze)
    check_fits(mesh.sizes, model.config.get_text_config(), recipe.parallel.stages_per_rank)
    stages = own_stages(model.config, mesh.group("pp"), recipe.parallel.stages_per_rank)
    if stages:
        keep_stages(model, stages)
        plan = plan_of_stages(plan, stages)
    if recipe.parallel.tp_vision:
        check_vision_fits(mesh.sizes, model.config)
        if not stages or stages[0].is_first:
            plan = {**plan, **VISION_SIDE}
    if mesh.fsdp:
        model.float()  # what FSDP splits is its own master weight
    prepare(
        model,
        plan,
        mesh,
        activation_checkpointing=options.activation_checkpointing,
        compiled=compiled,
        compute_dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype],
        shard_frozen=recipe.parallel.shard_frozen,
    )


def open_loader(recipe: VlmRecipe, encoder: ConversationEncoder, mesh: Mesh | None = None) -> ConversationLoader:
    """The conversations of the recipe, step by step in their seeded order."""
    sources, (rank, world_size) = (
        open_conversations(recipe.data.train),
        Ranks.of(mesh.data_group if mesh else None).place,
    )
    return ConversationLoader(
        sources,
        encoder,
        recipe.data,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        fit=partial(_fitting, recipe) if recipe.parallel.pp > 1 else None,
    )


class VlmTrainer(Trainer):
    """One optimizer step at a time, from packed conversations.

    Attributes:
        batches: Conversations, step by step.
        peak_flops: Floating-point operations per second that the devices of all ranks reach at best.
    """

    def __init__(
        self,
        recipe: VlmRecipe,
        model: Mistral3FP8VLMForConditionalGeneration,
        loader: ConversationLoader,
        mesh: Mesh | None = None,
    ) -> None:
        """Sets up master weights and optimizer.

        Args:
            recipe: The run.
            model: On its device, with its frozen parts.
            loader: Training batches.
            mesh: How the ranks are laid out; None for one process.
        """
        self.recipe = recipe
        self._model = model
        self.batches = loader
        self._trained = set(PARTS) - set(recipe.model.freeze)
        self.own_stages = own_stages(model.config, mesh.group("pp") if mesh else None, recipe.parallel.stages_per_rank)
        super().__init__(
            model,
            loader,
            recipe,
            mesh,
            num_steps=recipe.train.num_steps or _steps_of_epochs(recipe, loader),
            rate_factors=rate_factors(model, recipe.optimizer.part_learning_rates, recipe.optimizer.learning_rate),
            at_both_ends=["model.language_model.embed_tokens.weight"]
            if any(stage.is_tied for stage in self.own_stages)
            else (),
        )
        self.peak_flops = peak_flops(model.device, self._dtype) * self.ranks.world_size

    def train_step(self) -> dict[str, float]:
        """Runs the micro-batches of one step and the optimizer.

        Returns:
            `loss`, `grad_norm`, `learning_rate`, `num_tokens`, `num_supervised`, `num_images`, `epoch` and `flops`.

        Raises:
            OstroError: When a row is wrong or a number not finite; `state` is still that before the step.
        """
        with self.ranks.agreed():
            step = next(self.batches)
        flops = sum(step_flops(self._model.config, batch, self._trained) for batch in step.micro_batches)
        *counts, flops = self.data.sum([step.num_supervised, step.num_tokens, step.num_images, flops])
        num_supervised, num_tokens, num_images = map(int, counts)
        batches = self._matched(step) if self.own_stages or self.mesh.fsdp else step.micro_batches
        if self.own_stages:
            loss = self._run_stages(batches, num_supervised)
        else:
            loss = sum(self._backward(batch, num_supervised) for batch in batches)
        [loss] = self.stages.sum(self.data.sum([loss]))
        check_finite("loss", loss)
        row = {"num_supervised": num_supervised, "num_images": num_images, "epoch": step.epoch, "flops": flops}
        return {"loss": loss, **self.update(num_tokens), **row}

    def _matched(self, step: ConversationStep) -> list[ConversationBatch]:
        """The micro-batches of a step for a split model, which gathers its weights as it runs, so that all ranks have
        to run the same parts equally often; and a pipeline takes some numbers of them only."""
        return list(
            in_step(
                step.micro_batches,
                num_batches=len(step.micro_batches),
                num_images=step.num_images,
                image_tokens=self.batches.image_tokens,
                ranks=self.judges.in_step,
                fit=partial(_fitting, self.recipe),
            )
        )

    def _backward(self, batch: ConversationBatch, num_supervised: int) -> float:
        """Adds the gradient of one micro-batch's share of the loss to the master weights, and gives that share."""
        loss = packed_loss(self._model, batch.to(self._model.device), num_supervised)
        if loss.requires_grad:  # not so for text alone where only the vision side trains
            loss.backward()
        return float(loss.detach())

    def _run_stages(self, batches: Sequence[ConversationBatch], num_supervised: int) -> float:
        """Adds the gradients of this rank's stages, in step with the others; the loss, on the last rank."""
        model, dtype = self._model, self._dtype
        rows = packed_rows(max(batch.num_tokens for batch in batches), model.device, dtype)
        assert self.stages.group is not None  # there is a stage
        return run_stages(
            model,
            self.own_stages,
            partial(stage_output, model, num_tokens=rows, num_supervised=num_supervised),
            batches,
            hidden_states=torch.empty(1, rows, model.config.get_text_config().hidden_size, dtype=dtype, device="meta"),
            group=self.stages.group,
            schedule=self.recipe.parallel.schedule,
        )


def _fitting(recipe: VlmRecipe, num_micro_batches: int) -> int:
    options = recipe.parallel
    return fitting_number(num_micro_batches, num_ranks=options.pp, schedule=options.schedule)


def _steps_of_epochs(recipe: VlmRecipe, loader: ConversationLoader) -> int:
    assert recipe.train.num_epochs is not None  # TrainOptions asks for exactly one of the two
    samples = recipe.train.num_epochs * loader.num_samples_per_epoch
    return max(1, math.ceil(samples / recipe.data.global_batch_samples))

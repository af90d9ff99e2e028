"""Fine-tune a vision-language model on conversations: from a recipe to checkpoints, metrics, weights and a report.

Batches are left to `data`, the loss to `vlm_loss`, files to `checkpoint`, and what the kinds of run share to `loop` and
`trainer`. Read `run` first. The idea of a step: conversations are
laid end to end, so nothing is spent on padding; the loss of every supervised token counts the same, in whichever
micro-batch, so it is divided by the supervised tokens of the whole step.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from ostro.checkpoint.auto import fetch_weights
from ostro.checkpoint.load import load_vlm
from ostro.data.conversation import open_conversations
from ostro.data.conversation_collate import ConversationBatch, blank_batch, with_blank
from ostro.data.conversation_loader import ConversationLoader, ConversationStep
from ostro.data.conversation_tokens import ConversationEncoder
from ostro.errors import RecipeError
from ostro.inference.chat import Chat, open_conversation_encoder
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import use_packed_attention
from ostro.parallel.apply import checkpoint_activations, shard_parameters
from ostro.parallel.mesh import build_mesh
from ostro.train import runtime, vlm_result
from ostro.train.flops import peak_flops, step_flops
from ostro.train.loop import run_steps
from ostro.train.parts import PARTS, freeze, part_of, rate_factors
from ostro.train.ranks import Ranks
from ostro.train.recipe import VlmRecipe
from ostro.train.step import check_finite
from ostro.train.trainer import Trainer, find_checkpoint
from ostro.train.vlm_loss import packed_loss


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

    Distributed: on all ranks; answers, export and the metrics of the result are those of rank 0.
    """
    ranks = Ranks.current()
    with ranks.agreed():
        vlm_result.check_extras()
    with runtime.open_run(recipe, ranks) as folder:
        return _run(recipe, folder, ranks, console)


def _run(recipe: VlmRecipe, folder: Path, ranks: Ranks, console: Console) -> vlm_result.VlmResult:
    mesh = build_mesh(recipe.parallel, ranks.world_size, runtime.select_device().type)
    checkpoint = find_checkpoint(folder, ranks)
    is_resumed = checkpoint is not None
    with ranks.agreed():
        model, encoder = build_model(recipe, mesh, is_resumed=is_resumed)
        trainer = VlmTrainer(recipe, model, open_loader(recipe, encoder))
        whole = build_model(recipe, is_resumed=is_resumed)[0] if trainer.is_split and ranks.is_main else model
        trainer.whole, chat = whole, Chat(whole, encoder)
    with trainer.batches, runtime.stop_on_signal() as stop:
        trainer.resume(checkpoint, console)
        during = partial(vlm_result.evaluate_during, recipe.evaluate, chat) if recipe.evaluate else None
        before = partial(vlm_result.evaluate_untrained, recipe, chat)
        run_steps(trainer, recipe.train, recipe.track, folder, console, stop=stop, before=before, evaluate=during)
    trainer.gather()
    done = ranks.on_main(lambda: vlm_result.finish(recipe, chat, trainer.step, console))
    return done or vlm_result.VlmResult(folder, folder / "weights")


def build_model(
    recipe: VlmRecipe, mesh: DeviceMesh | None = None, *, is_resumed: bool = False
) -> tuple[Mistral3FP8VLMForConditionalGeneration, ConversationEncoder]:
    """The model to train, on its device with its frozen parts, and what turns conversations into its tokens.

    Args:
        recipe: The run.
        mesh: Ranks that split its weights, which are then float32; each reads its rows alone.
        is_resumed: Whether a checkpoint will fill in the trained weights, so that they are not read.

    Raises:
        RecipeError: When a part to freeze is not in the model.
        LayoutError: When the weights are not of the family, or the tokenizer does not belong to them.
        CheckpointError: When the files cannot be read.
    """
    options = recipe.model
    if mesh is not None and set(PARTS) - set(options.freeze) == {"head"}:
        # the backward pass through the split model, which sums the gradients, would never begin
        raise RecipeError(
            f"model.freeze: the head alone cannot be trained with parallel.dp_shard={mesh['dp_shard'].size()}; leave "
            "another part to train, or set parallel.dp_shard=1"
        )
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    folder = fetch_weights(options.weights)
    device = runtime.select_device()
    skip = (lambda name: part_of(name) not in options.freeze) if is_resumed else None
    if mesh is None:
        model = load_vlm(folder, dtype=dtype, device=device, skip=skip)
    else:
        shard = partial(shard_parameters, mesh=mesh, compute_dtype=dtype)
        model = load_vlm(folder, dtype=torch.float32, device=device, shard=shard, skip=skip)
    encoder = open_conversation_encoder(
        folder, model.config, max_tokens=recipe.data.max_tokens, too_long=recipe.data.too_long
    )
    freeze(model, options.freeze)
    use_packed_attention(model)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    return model.train(), encoder


def open_loader(recipe: VlmRecipe, encoder: ConversationEncoder) -> ConversationLoader:
    """The conversations of the recipe, step by step in their seeded order."""
    sources, (rank, world_size) = open_conversations(recipe.data.train), Ranks.current().place
    return ConversationLoader(sources, encoder, recipe.data, seed=recipe.seed, rank=rank, world_size=world_size)


class VlmTrainer(Trainer):
    """One optimizer step at a time, from packed conversations.

    Attributes:
        batches: Conversations, step by step.
        peak_flops: Floating-point operations per second that the devices of all ranks reach at best.
    """

    def __init__(
        self, recipe: VlmRecipe, model: Mistral3FP8VLMForConditionalGeneration, loader: ConversationLoader
    ) -> None:
        """Sets up master weights and optimizer.

        Args:
            recipe: The run.
            model: On its device, with its frozen parts.
            loader: Training batches.
        """
        self.recipe = recipe
        self._model = model
        self.batches = loader
        self._trained = set(PARTS) - set(recipe.model.freeze)
        super().__init__(
            model,
            loader,
            recipe.optimizer,
            recipe.schedule,
            num_steps=recipe.train.num_steps or _steps_of_epochs(recipe, loader),
            train=recipe.train,
            rate_factors=rate_factors(model, recipe.optimizer.part_learning_rates, recipe.optimizer.learning_rate),
        )
        dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
        self.peak_flops = peak_flops(model.device, dtype) * self.ranks.world_size

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
        *counts, flops = self.ranks.sum([step.num_supervised, step.num_tokens, step.num_images, flops])
        num_supervised, num_tokens, num_images = map(int, counts)
        batches = self._matched(step) if self.is_split else step.micro_batches
        [loss] = self.ranks.sum([sum(self._backward(batch, num_supervised) for batch in batches)])
        check_finite("loss", loss)
        row = {"num_supervised": num_supervised, "num_images": num_images, "epoch": step.epoch, "flops": flops}
        return {"loss": loss, **self.update(num_tokens), **row}

    def _matched(self, step: ConversationStep) -> list[ConversationBatch]:
        """The micro-batches of a step, each with an image where any rank has one, and as many as the rank with most.

        A split model gathers its weights as it runs, so all ranks have to run the same parts equally often.
        """
        has_images = bool(self.ranks.maximum(step.num_images))
        missing = self.ranks.maximum(len(step.micro_batches)) - len(step.micro_batches)
        empty = blank_batch(self.batches.image_tokens if has_images else None)
        batches = [with_blank(batch, empty) if not batch.num_images else batch for batch in step.micro_batches]
        return (batches if has_images else list(step.micro_batches)) + [empty] * missing

    def _backward(self, batch: ConversationBatch, num_supervised: int) -> float:
        """Adds the gradient of one micro-batch's share of the loss to the master weights, and gives that share."""
        loss = packed_loss(self._model, batch.to(self._model.device), num_supervised)
        if loss.requires_grad:  # not so for text alone where only the vision side trains
            loss.backward()
        return float(loss.detach())


def _steps_of_epochs(recipe: VlmRecipe, loader: ConversationLoader) -> int:
    assert recipe.train.num_epochs is not None  # TrainOptions asks for exactly one of the two
    samples = recipe.train.num_epochs * loader.num_samples_per_epoch
    return max(1, math.ceil(samples / recipe.data.global_batch_samples))

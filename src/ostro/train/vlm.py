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

from ostro.checkpoint.auto import fetch_weights
from ostro.checkpoint.load import load_vlm
from ostro.config import dump_recipe
from ostro.data.conversation import open_conversations
from ostro.data.conversation_collate import ConversationBatch
from ostro.data.conversation_loader import ConversationLoader
from ostro.data.conversation_tokens import ConversationEncoder
from ostro.inference.chat import Chat, open_conversation_encoder
from ostro.models.mistral3_vlm import Mistral3FP8VLMForConditionalGeneration
from ostro.models.packed import use_packed_attention
from ostro.parallel.apply import checkpoint_activations
from ostro.train import runtime, vlm_result
from ostro.train.flops import peak_flops, step_flops
from ostro.train.loop import run_steps
from ostro.train.parts import PARTS, freeze, rate_factors
from ostro.train.recipe import VlmRecipe
from ostro.train.step import check_finite
from ostro.train.trainer import Trainer
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
    """
    folder = Path(recipe.output)
    vlm_result.check_extras()
    runtime.set_seeds(recipe.seed)
    runtime.open_run_folder(folder, dump_recipe(recipe))
    model, encoder = build_model(recipe)
    with open_loader(recipe, encoder) as loader, runtime.stop_on_signal() as stop:
        trainer, chat = VlmTrainer(recipe, model, loader), Chat(model, encoder)
        trainer.resume(folder, console)
        during = partial(vlm_result.evaluate_during, recipe.evaluate, chat) if recipe.evaluate else None
        before = partial(vlm_result.evaluate_untrained, recipe, chat)
        run_steps(trainer, recipe.train, recipe.track, folder, console, stop=stop, before=before, evaluate=during)
    return vlm_result.finish(recipe, chat, trainer.step, console)


def build_model(recipe: VlmRecipe) -> tuple[Mistral3FP8VLMForConditionalGeneration, ConversationEncoder]:
    """The model to train, on its device with its frozen parts, and what turns conversations into its tokens.

    Raises:
        RecipeError: When a part to freeze is not in the model.
        LayoutError: When the weights are not of the family, or the tokenizer does not belong to them.
        CheckpointError: When the files cannot be read.
    """
    options = recipe.model
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    folder = fetch_weights(options.weights)
    model = load_vlm(folder, dtype=dtype, device=runtime.select_device())
    encoder = open_conversation_encoder(
        folder, model.config, max_tokens=recipe.data.max_tokens, too_long=recipe.data.too_long
    )
    freeze(model, options.freeze)
    use_packed_attention(model)
    if options.activation_checkpointing:
        checkpoint_activations(model)
    return model.train(), encoder


def open_loader(recipe: VlmRecipe, encoder: ConversationEncoder) -> ConversationLoader:
    """The training batches of the recipe, in their seeded order."""
    return ConversationLoader(open_conversations(recipe.data.train), encoder, recipe.data, seed=recipe.seed)


class VlmTrainer(Trainer):
    """One optimizer step at a time, from packed conversations.

    Attributes:
        peak_flops: Floating-point operations per second that the device reaches at best.
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
        self._batches = loader
        self._trained = set(PARTS) - set(recipe.model.freeze)
        self.peak_flops = peak_flops(model.device, model.dtype)
        super().__init__(
            model,
            loader,
            recipe.optimizer,
            recipe.schedule,
            num_steps=recipe.train.num_steps or _steps_of_epochs(recipe, loader),
            keep_last=recipe.train.keep_last,
            rate_factors=rate_factors(model, recipe.optimizer.part_learning_rates, recipe.optimizer.learning_rate),
        )

    def train_step(self) -> dict[str, float]:
        """Runs the micro-batches of one step and the optimizer.

        Returns:
            `loss`, `grad_norm`, `learning_rate`, `num_tokens`, `num_supervised`, `num_images`, `epoch` and `flops`.

        Raises:
            OstroError: When a row is wrong or a number not finite; `state` is still that before the step.
        """
        step = next(self._batches)
        loss = sum(self._backward(batch, step.num_supervised) for batch in step.micro_batches)
        check_finite("loss", loss)
        flops = sum(step_flops(self._model.config, batch, self._trained) for batch in step.micro_batches)
        counts = {"num_supervised": step.num_supervised, "num_images": step.num_images, "epoch": step.epoch}
        return {"loss": loss, **self.update(step.num_tokens), **counts, "flops": flops}

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

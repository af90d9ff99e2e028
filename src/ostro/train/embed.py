"""Train an embedder for search: from a recipe to checkpoints, metrics, an exported folder and a report.

It leaves batches to `data`, the loss to `losses`, scores to `retrieval`, files to `checkpoint`, and what it shares with
the other loop to `step`, `runtime` and `metrics`. Read `run` first: it is the whole run.
"""

from __future__ import annotations

import dataclasses
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ostro.checkpoint.train_state import latest_train_state, load_train_state, save_train_state
from ostro.config import dump_recipe
from ostro.data.loader import RetrievalLoader
from ostro.data.retrieval import open_sources
from ostro.data.retrieval_collate import RetrievalBatch
from ostro.errors import OstroError, RecipeError
from ostro.inference.encoder import Encoder
from ostro.losses.cached import cached_backward
from ostro.losses.contrastive import ContrastiveOutput, ContrastiveTargets, LearnedTemperature, contrastive_loss
from ostro.models.backbone import build_encoder_backbone
from ostro.models.embedder import Embedder
from ostro.models.packed import PackedTexts, micro_batches
from ostro.models.tokenizer import TextTokenizer, check_vocabulary, load_tokenizer
from ostro.parallel.apply import checkpoint_activations
from ostro.train import embed_result, metrics, runtime
from ostro.train.precision import MasterWeights
from ostro.train.prepare import prepare_inputs
from ostro.train.recipe import EmbedRecipe
from ostro.train.step import Optimizer, check_finite, learning_rate


@dataclass
class EmbedState:
    """All that changes during a run; every field is saved, and nothing else is.

    Attributes:
        step: Optimizer steps done.
        num_tokens: Tokens seen, queries and documents.
        weights: Float32 master weights and the learned temperature, by name.
        optimizer: Moments and step counts by weight name.
        loader: Position in the data, counted in global samples.
        random: Random state by device.
    """

    step: int
    num_tokens: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    loader: dict[str, Any]
    random: dict[str, torch.Tensor]


def run(recipe: EmbedRecipe, *, console: Console) -> embed_result.EmbedResult:
    """Trains, evaluates, exports and reports; continues from the latest checkpoint in `recipe.output` when there is
    one.

    Args:
        recipe: A validated recipe.
        console: Where progress and results are shown.

    Returns:
        What the run achieved and where its folder is.

    Raises:
        RecipeError: When the inputs contradict the recipe.
        Stopped: When a signal asked for a stop; a checkpoint was written and the message says how to go on.
        OstroError: When a row is wrong, the loss becomes infinite or nan, or a file cannot be read or written; what was
            done until then is in a checkpoint.
    """
    folder = Path(recipe.output)
    embed_result.check_extras(recipe)
    runtime.set_seeds(recipe.seed)
    runtime.open_run_folder(folder, dump_recipe(recipe))
    prepare_inputs(recipe, console)
    embedder, tokenizer = build_embedder(recipe)
    with open_loader(recipe, tokenizer) as loader, runtime.stop_on_signal() as stop:
        trainer = EmbedTrainer(recipe, embedder, loader)
        encoder = embed_result.run_encoder(recipe, embedder, tokenizer)
        trainer.resume(folder, console)
        train(trainer, encoder, folder, stop, console)
    return embed_result.finish(recipe, encoder, trainer.step, console)


def train(trainer: EmbedTrainer, encoder: Encoder, folder: Path, stop: runtime.StopRequest, console: Console) -> None:
    """The loop: fetch, step, log, evaluate, save."""
    recipe, num_steps = trainer.recipe, trainer.num_steps
    with (
        metrics.open_log(folder, recipe.track, resumed_step=trainer.step) as log,
        metrics.live_line(console, num_steps=num_steps, first_step=trainer.step) as line,
    ):
        if trainer.step == 0:
            embed_result.evaluate_untrained(recipe, encoder, log, line)
        speed = metrics.Throughput()
        while trainer.step < num_steps:
            try:
                row = trainer.train_step()
                speed.add(int(row["num_tokens"]))
                line.advance()
                step, last = trainer.step, trainer.step == num_steps
                if step % recipe.train.log_every == 0 or last:
                    row = {**row, "tokens_per_s": speed.read()}
                    log.row(step, row)
                    line.show(step, row)
                if recipe.evaluate and (last or _due(step, recipe.train.evaluate_every)):
                    embed_result.evaluate_during(recipe.evaluate, encoder, step, log, line)
            except (OstroError, OSError, torch.OutOfMemoryError) as error:
                raise runtime.stopped_by(error, trainer.save(folder), trainer.step, num_steps) from error
            if last or _due(step, recipe.train.save_every) or stop.signal_number:
                path = trainer.save(folder)
            if stop.signal_number:
                raise runtime.stopped_by(signal.Signals(stop.signal_number), path, step, num_steps)


def _due(step: int, period: int | None) -> bool:
    return period is not None and step % period == 0


def build_embedder(recipe: EmbedRecipe) -> tuple[Embedder, TextTokenizer]:
    """The model to train, on its device, and its tokenizer.

    Raises:
        RecipeError: When the model has no part `model.extract_submodel`, or fewer dims than `loss.matryoshka_dims`.
        LayoutError: When the weights are not of the family, or the tokenizer has ids beyond the vocabulary.
        CheckpointError: When the files cannot be read.
    """
    options, dims = recipe.model, recipe.loss.matryoshka_dims
    try:
        backbone = build_encoder_backbone(
            options.weights,
            "embedding",
            pooling=options.pooling,
            extract_submodel=options.extract_submodel,
            dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype],
        )
    except ValueError as error:
        if options.extract_submodel is None:
            raise
        raise RecipeError(f"model.{error}") from error
    tokenizer = load_tokenizer(options.weights)
    check_vocabulary(tokenizer, backbone.config.vocab_size)
    if options.activation_checkpointing:
        checkpoint_activations(backbone)
    embedder = Embedder(backbone, pooling=options.pooling)
    if dims and dims[0] > embedder.num_dims:
        raise RecipeError(f"loss.matryoshka_dims: must be <= the model's {embedder.num_dims} dims, got {list(dims)}")
    return embedder.to(runtime.select_device()).train(), tokenizer


def open_loader(recipe: EmbedRecipe, tokenizer: TextTokenizer) -> RetrievalLoader:
    """The training batches of the recipe, in their seeded order."""
    return RetrievalLoader(open_sources(recipe.data), tokenizer, recipe.data, seed=recipe.seed)


class EmbedTrainer:
    """One optimizer step at a time, and the state that a checkpoint of it holds."""

    def __init__(self, recipe: EmbedRecipe, embedder: Embedder, loader: RetrievalLoader) -> None:
        """Sets up master weights, temperature and optimizer.

        Args:
            recipe: The run.
            embedder: The model on its device.
            loader: Training batches.
        """
        self.recipe = recipe
        self.step = 0
        self.num_tokens = 0
        self._embedder = embedder
        self._loader = loader
        self._masters = MasterWeights(embedder)
        weights = self._masters.named_parameters()
        self._temperature: LearnedTemperature | None = None
        if recipe.loss.learned_temperature:
            self._temperature = LearnedTemperature(recipe.loss.temperature).to(embedder.device)
            weights["log_temperature"] = self._temperature.log_temperature
        self._weights = weights
        self._optimizer = Optimizer(weights, recipe.optimizer)
        self._mark_position()
        self.num_steps = recipe.train.num_steps or _steps_of_epochs(recipe, loader)

    def train_step(self) -> dict[str, float]:
        """Runs `accumulation_steps` contrastive batches and one optimizer step.

        Returns:
            What a log row shows: `loss`, `accuracy`, `grad_norm`, `learning_rate`, `temperature`, `num_tokens`,
            `epoch`.

        Raises:
            OstroError: When a row is wrong, or loss or gradient norm is not finite; `state` is still that before it.
        """
        train = self.recipe.train
        loss = accuracy = 0.0
        num_tokens = 0
        for _ in range(train.accumulation_steps):
            batch = next(self._loader)
            output = self._backward(batch)
            loss += output.loss.item()
            accuracy += output.accuracy.item() / train.accumulation_steps
            num_tokens += sum(map(len, batch.token_ids))
        check_finite("loss", loss)
        peak = self.recipe.optimizer.learning_rate
        rate = learning_rate(self.step, num_steps=self.num_steps, peak=peak, options=self.recipe.schedule)
        grad_norm = self._optimizer.step(rate)
        self._masters.publish()
        self.step += 1
        self.num_tokens += num_tokens
        self._mark_position()
        temperature = self._temperature().item() if self._temperature else self.recipe.loss.temperature
        return {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "temperature": temperature,
            "num_tokens": num_tokens,
            "epoch": batch.epoch,
        }

    def _backward(self, batch: RetrievalBatch) -> ContrastiveOutput:
        """Adds the gradient of one contrastive batch, `1 / accumulation_steps` of it, to the master weights."""
        recipe, device = self.recipe, self._embedder.device
        groups = micro_batches([len(ids) for ids in batch.token_ids], recipe.data.micro_batch_tokens)
        packed = [PackedTexts.from_token_ids([batch.token_ids[row] for row in rows]) for rows in groups]
        targets = ContrastiveTargets(
            batch.positives.to(device), batch.document_ids.to(device), batch.known_positive_ids.to(device)
        )

        def loss_of(embeddings: torch.Tensor) -> ContrastiveOutput:
            temperature = self._temperature() if self._temperature else recipe.loss.temperature
            queries, documents = embeddings[: batch.num_queries], embeddings[batch.num_queries :]
            output = contrastive_loss(queries, documents, targets, temperature=temperature, options=recipe.loss)
            return dataclasses.replace(output, loss=output.loss / recipe.train.accumulation_steps)

        return cached_backward(self._embedder, packed, groups, loss_of)

    def _mark_position(self) -> None:
        """Notes where data and random draws stand between two steps: a step that fails has moved both."""
        self._position, self._random = self._loader.state_dict(), runtime.random_state()

    def state(self) -> EmbedState:
        """The run as it stands after `step` whole steps; weights and moments are the live ones."""
        return EmbedState(
            step=self.step,
            num_tokens=self.num_tokens,
            weights={name: weight.detach() for name, weight in self._weights.items()},
            optimizer=self._optimizer.state_dict(),
            loader=self._position,
            random=self._random,
        )

    def save(self, folder: Path) -> Path:
        """Writes a checkpoint; the earlier ones stay loadable if it fails."""
        checkpoints = folder / "checkpoints"
        return save_train_state(checkpoints, self.step, vars(self.state()), keep_last=self.recipe.train.keep_last)

    def resume(self, folder: Path, console: Console) -> None:
        """Continues from the latest checkpoint, if there is one."""
        path = latest_train_state(folder / "checkpoints")
        if path is None:
            return
        # random: a run may move between CPU and CUDA, whose states differ in number
        state = load_train_state(path, {**vars(self.state()), "random": {}})
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self._masters.publish()
        self._loader.load_state_dict(state["loader"])
        runtime.restore_random_state(state["random"])
        self._mark_position()
        console.out(f"{path}: continuing after step {self.step} of {self.num_steps}", highlight=False)


def _steps_of_epochs(recipe: EmbedRecipe, loader: RetrievalLoader) -> int:
    assert recipe.train.num_epochs is not None  # TrainOptions asks for exactly one of the two
    batches = recipe.train.num_epochs * loader.num_batches_per_epoch
    return max(1, math.ceil(batches / recipe.train.accumulation_steps))

"""Train an embedder for search: from a recipe to checkpoints, metrics, an exported folder and a report.

It leaves batches to `data`, the loss to `losses`, scores to `retrieval`, files to `checkpoint`, and what it shares with
the other kind of run to `loop`, `trainer`, `step` and `runtime`. Read `run` first: it is the whole run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ostro.checkpoint.fetch import fetch_weights
from ostro.checkpoint.load_encoder import fill_encoder
from ostro.data.loader import RetrievalLoader
from ostro.data.retrieval import open_sources
from ostro.data.retrieval_collate import RetrievalBatch
from ostro.errors import RecipeError
from ostro.losses.cached import cached_backward
from ostro.losses.contrastive import ContrastiveOutput, ContrastiveTargets, LearnedTemperature, contrastive_loss
from ostro.models.backbone import build_encoder_backbone, empty_encoder_backbone
from ostro.models.embedder import Embedder
from ostro.models.folder import check_weights_folder
from ostro.models.packed import PackedTexts, even_micro_batches, micro_batches
from ostro.models.tokenizer import TextTokenizer, check_vocabulary, load_tokenizer
from ostro.parallel.apply import prepare
from ostro.parallel.mesh import AXES, Mesh, build_mesh, check_fits
from ostro.parallel.pipeline import fitting_number, own_stages, plan_of_stages
from ostro.parallel.plans import TEXT_TOWER
from ostro.parallel.staged_embedder import StagedEmbedder
from ostro.train import embed_result, runtime
from ostro.train.loop import run_steps
from ostro.train.ranks import Ranks
from ostro.train.recipe import EmbedRecipe
from ostro.train.step import check_finite
from ostro.train.trainer import Trainer, find_checkpoint


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

    Distributed: every rank calls it; rank 0 alone exports and has metrics in its result.
    """
    ranks = Ranks.current()
    with ranks.agreed():
        embed_result.check_extras(recipe)
    with runtime.open_run(recipe, ranks) as folder:
        return _run(recipe, folder, ranks, console)


def _run(recipe: EmbedRecipe, folder: Path, ranks: Ranks, console: Console) -> embed_result.EmbedResult:
    mesh = build_mesh(recipe.parallel, ranks.world_size, runtime.select_device().type)
    checkpoint = find_checkpoint(folder, ranks)
    with ranks.agreed(), runtime.model_in_memory():
        embedder, tokenizer = build_embedder(recipe, mesh, is_resumed=checkpoint is not None)
        trainer = EmbedTrainer(recipe, embedder, open_loader(recipe, tokenizer, mesh), mesh)
    encoder, judges, held_out = embed_result.run_encoder(recipe, embedder, tokenizer), trainer.judges, recipe.evaluate
    with trainer.batches, runtime.stop_on_signal() as stop:
        trainer.resume(checkpoint, console)
        run_steps(
            trainer,
            recipe.train,
            recipe.track,
            folder,
            console,
            stop=stop,
            before=partial(embed_result.evaluate_untrained, recipe, encoder, judges),
            evaluate=partial(embed_result.evaluate_during, held_out, encoder, judges) if held_out else None,
        )
    report = trainer.judge(lambda: embed_result.search(recipe.test, encoder, judges) if recipe.test else None)
    whole = trainer.gather(embedder, partial(build_whole, recipe)).eval()
    result = ranks.on_main(partial(embed_result.finish, recipe, whole, tokenizer, report, trainer.step, console))
    return result or embed_result.EmbedResult(folder, folder / "weights")


def build_embedder(
    recipe: EmbedRecipe,
    mesh: Mesh | None = None,
    *,
    is_resumed: bool = False,
    device: torch.device | None = None,
) -> tuple[Embedder, TextTokenizer]:
    """The model to train, on its device, and its tokenizer.

    Args:
        recipe: The run.
        mesh: How the ranks are laid out: where they split the model, a rank reads and holds its part alone, in float32
            with `dp_shard`. None for a model that is not trained, only evaluated or exported: it is whole and not
            compiled.
        is_resumed: Whether a checkpoint will fill in the weights, so that they are not read.
        device: Where it is; that of the run when None.

    Raises:
        RecipeError: When the model has no part `model.extract_submodel`, fewer dims than `loss.matryoshka_dims`, or
            cannot be cut as the mesh asks.
        LayoutError: When the weights are not of the family, or the tokenizer has ids beyond the vocabulary.
        CheckpointError: When the files cannot be read.
    """
    options, dims = recipe.model, recipe.loss.matryoshka_dims
    compiled = options.compile and mesh is not None
    mesh = mesh or Mesh(dict.fromkeys(AXES, 1))
    device = device or runtime.select_device()
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    is_streamed = is_resumed or mesh.splits_model
    folder = fetch_weights(options.weights) if is_streamed and not is_resumed else None
    if folder is not None:
        check_weights_folder(folder)
    build: Callable[..., PreTrainedModel] = partial(build_encoder_backbone, task="embedding")
    if is_streamed:
        build = empty_encoder_backbone  # gets its weights once it is split
    try:
        backbone = build(
            options.weights, pooling=options.pooling, extract_submodel=options.extract_submodel, dtype=dtype
        )
    except ValueError as error:
        if options.extract_submodel is None:
            raise
        raise RecipeError(f"model.{error}") from error
    tokenizer = load_tokenizer(options.weights)
    check_vocabulary(tokenizer, backbone.config.vocab_size)
    check_fits(mesh.sizes, backbone.config, recipe.parallel.stages_per_rank)
    # names and shapes of all of it, which are those of the folder
    shapes = {name: tuple(weight.shape) for name, weight in backbone.state_dict().items()}
    pipeline, plan = mesh.group("pp"), TEXT_TOWER
    if pipeline is None:
        embedder = Embedder(backbone, pooling=options.pooling)
    else:
        stages = own_stages(backbone.config, pipeline, recipe.parallel.stages_per_rank)
        embedder = StagedEmbedder(backbone, stages, pipeline, pooling=options.pooling, dtype=dtype)
        plan = plan_of_stages(plan, stages)
    if dims and dims[0] > embedder.num_dims:
        raise RecipeError(f"loss.matryoshka_dims: must be <= the model's {embedder.num_dims} dims, got {list(dims)}")
    if mesh.fsdp:
        embedder.float()  # what FSDP splits is its own master weight
    recomputes = options.activation_checkpointing
    prepare(backbone, plan, mesh, activation_checkpointing=recomputes, compiled=compiled, compute_dtype=dtype)
    if is_streamed:
        fill_encoder(backbone, folder, shapes, dtype=dtype, device=device)
    return embedder.to(device).train(), tokenizer


def build_whole(recipe: EmbedRecipe) -> Embedder:
    """What rank 0 gathers a split model in: in the memory of the host, without weights until then, as all are trained.

    Args:
        recipe: The run.

    Raises:
        OstroError: As `build_embedder`.
    """
    return build_embedder(recipe, is_resumed=True, device=torch.device("cpu"))[0]


def open_loader(recipe: EmbedRecipe, tokenizer: TextTokenizer, mesh: Mesh | None = None) -> RetrievalLoader:
    """The training batches of the recipe, in their seeded order."""
    rank, world_size = Ranks.of(mesh.data_group if mesh else None).place
    sources = open_sources(recipe.data)
    return RetrievalLoader(sources, tokenizer, recipe.data, seed=recipe.seed, rank=rank, world_size=world_size)


class EmbedTrainer(Trainer):
    """One optimizer step at a time, from contrastive batches.

    Attributes:
        batches: Training batches.
    """

    def __init__(
        self, recipe: EmbedRecipe, embedder: Embedder, loader: RetrievalLoader, mesh: Mesh | None = None
    ) -> None:
        """Sets up temperature, master weights and optimizer.

        Args:
            recipe: The run.
            embedder: The model on its device.
            loader: Training batches.
            mesh: How the ranks are laid out; None for one process.
        """
        self.recipe = recipe
        self._embedder = embedder
        self.batches = loader
        if isinstance(embedder, StagedEmbedder):
            self.own_stages = embedder.stages
        self._temperature: LearnedTemperature | None = None
        if recipe.loss.learned_temperature:
            self._temperature = LearnedTemperature(recipe.loss.temperature).to(embedder.device)
        super().__init__(
            embedder,
            loader,
            recipe,
            mesh,
            num_steps=recipe.train.num_steps or _steps_of_epochs(recipe, loader),
            loss_weights={"log_temperature": self._temperature.log_temperature} if self._temperature else None,
        )

    def train_step(self) -> dict[str, float]:
        """Runs `accumulation_steps` contrastive batches and one optimizer step.

        Returns:
            What a log row shows: `loss`, `accuracy`, `grad_norm`, `learning_rate`, `temperature`, `num_tokens`,
            `epoch`.

        Raises:
            OstroError: When a row is wrong, or loss or gradient norm is not finite; `state` is still that before it.
        """
        train = self.recipe.train
        with self.ranks.agreed():
            batches = [next(self.batches) for _ in range(train.accumulation_steps)]
        outputs = [self._backward(batch) for batch in batches]
        loss, accuracy, num_tokens = self.data.sum(
            [
                sum(output.loss.item() for output in outputs),
                sum(output.accuracy.item() for output in outputs) / train.accumulation_steps,
                sum(len(ids) for batch in batches for ids in batch.token_ids),
            ]
        )
        check_finite("loss", loss)
        row = self.update(int(num_tokens))
        temperature = self._temperature().item() if self._temperature else self.recipe.loss.temperature
        return {"loss": loss, "accuracy": accuracy, **row, "temperature": temperature, "epoch": batches[-1].epoch}

    def _backward(self, batch: RetrievalBatch) -> ContrastiveOutput:
        """Adds the gradient of this rank's share of a contrastive batch, `1 / accumulation_steps` of it, to the master
        weights."""
        recipe, device = self.recipe, self._embedder.device
        # a rank without a query in a short batch still takes part in the gathers, with one text that counts for nothing
        token_ids = batch.token_ids or ([0],)
        groups = self._micro_batches([len(ids) for ids in token_ids])
        num_groups = self.data.maximum(len(groups)) if self.mesh.sizes["dp_shard"] > 1 else len(groups)
        # such a text makes up for a micro-batch that only other ranks have, or that a pipeline needs, too
        for _ in range(self._fitting(num_groups) - len(groups)):
            groups.append([len(token_ids)])
            token_ids = (*token_ids, [0])
        packed = [PackedTexts.from_token_ids([token_ids[row] for row in rows]) for rows in groups]
        targets = ContrastiveTargets(
            batch.positives.to(device), batch.document_ids.to(device), batch.known_positive_ids.to(device)
        )

        def loss_of(embeddings: torch.Tensor) -> ContrastiveOutput:
            temperature = self._temperature() if self._temperature else recipe.loss.temperature
            queries, documents = embeddings[: batch.num_queries], embeddings[batch.num_queries : len(batch.token_ids)]
            output = contrastive_loss(
                queries,
                documents,
                targets,
                temperature=temperature,
                options=recipe.loss,
                group=self.data.group,
            )
            return dataclasses.replace(output, loss=output.loss / recipe.train.accumulation_steps)

        embedder = self._embedder
        if not isinstance(embedder, StagedEmbedder):
            return cached_backward(embedder, packed, groups, loss_of)
        replay = partial(embedder.backward, packed, schedule=recipe.parallel.schedule)
        return cached_backward(
            embedder.encode, packed, groups, lambda vectors: loss_of(embedder.share(vectors)), replay=replay
        )

    def _micro_batches(self, lengths: list[int]) -> list[list[int]]:
        """Which texts go through the model together: of about the same number of tokens in a pipeline."""
        budget = self.recipe.data.micro_batch_tokens
        if self.recipe.parallel.pp == 1:
            return micro_batches(lengths, budget)
        needed = len(even_micro_batches(lengths, budget, 1))
        return even_micro_batches(lengths, budget, self._fitting(needed))

    def _fitting(self, num_micro_batches: int) -> int:
        options = self.recipe.parallel
        return fitting_number(num_micro_batches, num_ranks=options.pp, schedule=options.schedule)


def _steps_of_epochs(recipe: EmbedRecipe, loader: RetrievalLoader) -> int:
    assert recipe.train.num_epochs is not None  # TrainOptions asks for exactly one of the two
    batches = recipe.train.num_epochs * loader.num_batches_per_epoch
    return max(1, math.ceil(batches / recipe.train.accumulation_steps))

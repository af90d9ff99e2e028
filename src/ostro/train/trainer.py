"""What both trainers hold and save: master weights, optimizer, position and random state, from one step to the next.

What a step computes belongs to each loop, which subclasses `Trainer`; files are written by `checkpoint.train_state`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from ostro.checkpoint.background_save import BackgroundSave
from ostro.checkpoint.train_state import (
    latest_train_state,
    load_train_state,
    prepare_folder,
    save_train_state,
    tensor_names,
    train_state_path,
)
from ostro.errors import CheckpointError
from ostro.parallel.apply import free_gathered
from ostro.parallel.collectives import gather_whole, receive, send, sum_over_ends
from ostro.parallel.gradients import average_gradients, local_part, reduce_gradients
from ostro.parallel.mesh import AXES, Mesh
from ostro.parallel.pipeline import Stage
from ostro.train import runtime
from ostro.train.judges import Judges
from ostro.train.precision import MasterWeights
from ostro.train.ranks import Ranks
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from ostro.train.step import Optimizer, learning_rate

Model = TypeVar("Model", bound=torch.nn.Module)
Result = TypeVar("Result")


class Positioned(Protocol):
    """A loader whose place in the data can be saved and restored."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position."""


@dataclass
class TrainerState:
    """All that changes during a run; every field is saved, and nothing else is.

    Attributes:
        step: Optimizer steps done.
        num_tokens: Tokens seen.
        weights: Float32 master weights and parameters of the loss, by name.
        optimizer: Moments and step counts by weight name.
        loader: Position in the data, counted in global samples.
        random: Random state by device.
        best: Step and score of the best evaluation; None before the first.
    """

    step: int
    num_tokens: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    loader: dict[str, Any]
    random: dict[str, torch.Tensor]
    best: tuple[int, float] | None


class Trainer(abc.ABC):
    """The state of a run and its optimizer step; subclasses compute the gradients.

    Attributes:
        ranks: All that train together.
        data: Those that see the other samples of each batch.
        mesh: How the ranks are laid out.
        stages: Those that hold the other layers of the model.
        step: Optimizer steps done.
        num_tokens: Tokens seen by all ranks.
        num_steps: Optimizer steps of the whole run.
        saver: Writes its checkpoints.
        own_stages: The stages of a pipeline that this rank holds.
        peak_flops: Floating-point operations per second that the device reaches at best; None where a subclass does
            not count the operations of a step.
    """

    peak_flops: float | None = None
    own_stages: tuple[Stage, ...] = ()

    def __init__(
        self,
        module: torch.nn.Module,
        loader: Positioned,
        recipe: EmbedRecipe | VlmRecipe,
        mesh: Mesh | None,
        *,
        num_steps: int,
        loss_weights: Mapping[str, torch.nn.Parameter] | None = None,
        rate_factors: Mapping[str, float] | None = None,
        at_both_ends: Collection[str] = (),
    ) -> None:
        """Sets up master weights and optimizer.

        Args:
            module: The model on its device; its parameters with `requires_grad` are trained.
            loader: Training batches.
            recipe: The run.
            mesh: How its ranks are laid out; None for one process.
            num_steps: Optimizer steps of the whole run.
            loss_weights: Float32 parameters of the loss to train too, by name.
            rate_factors: What the learning rate of a weight is multiplied by, where it is not 1, by name.
            at_both_ends: Names of weights that the first and the last stage of a pipeline hold; none on the others.
        """
        self.mesh = mesh or Mesh(dict.fromkeys(AXES, 1))
        self.ranks, self.data = Ranks.current() if mesh else Ranks(), Ranks.of(self.mesh.data_group)
        self.stages = Ranks.of(self.mesh.group("pp"))
        self._module = module
        self.step = 0
        self.num_tokens = 0
        self.num_steps = num_steps
        self.saver = BackgroundSave()
        self._loader, self._options = loader, recipe.train
        self._dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.model.dtype]
        self._save_group: dist.ProcessGroup | None = None
        self._best: tuple[int, float] | None = None
        self._schedule, self._peak = recipe.schedule, recipe.optimizer.learning_rate
        self._masters = MasterWeights(module)
        self._weights = {**self._masters.named_parameters(), **(loss_weights or {})}
        self._at_both_ends = [name for name in at_both_ends if name in self._weights]
        self._loss_weights = list((loss_weights or {}).values())
        counted_elsewhere = () if self.stages.is_main else [*self._at_both_ends, *(loss_weights or {})]
        self._optimizer = Optimizer(
            self._weights, recipe.optimizer, rate_factors, mesh, counted_elsewhere=counted_elsewhere
        )
        self._mark_position()

    @abc.abstractmethod
    def train_step(self) -> dict[str, float]:
        """Computes the gradients of one step and calls `update`.

        Returns:
            What a log row shows, with at least `loss` and what `update` returns; `flops` where they are counted.

        Raises:
            OstroError: When a row is wrong, or loss or gradient norm is not finite; `state` is still that before it.
        """

    def update(self, num_tokens: int) -> dict[str, float]:
        """Takes the optimizer step from the gradients that are there, summed over the ranks.

        Args:
            num_tokens: Tokens that the gradients of all ranks come from.

        Returns:
            `grad_norm`, `learning_rate` and `num_tokens`, for the log row.

        Raises:
            OstroError: When the gradient norm is not finite; `state` is still that before the step.

        Distributed: one reduction of the gradients, whatever the micro-batches of each rank were; in a pipeline also of
            what several stages hold. All ranks then take the same step, to the same bits.
        """
        reduce_gradients(self._weights.values(), self.mesh)
        if self.stages.group is not None:
            gradients = [self._weights[name].grad for name in self._at_both_ends]
            sum_over_ends([local_part(gradient) for gradient in gradients if gradient is not None], self.stages.group)
            # all stages have computed the loss; the mean keeps the copies the same to the bit
            average_gradients(self._loss_weights, self.stages.group)
        rate = learning_rate(self.step, num_steps=self.num_steps, peak=self._peak, options=self._schedule)
        self.saver.wait_copied()
        grad_norm = self._optimizer.step(rate)
        self._masters.publish()
        self.step += 1
        self.num_tokens += num_tokens
        self._mark_position()
        return {"grad_norm": grad_norm, "learning_rate": rate, "num_tokens": num_tokens}

    def _mark_position(self) -> None:
        """Notes where data and random draws stand between two steps: a step that fails has moved both."""
        self._position, self._random = self._loader.state_dict(), runtime.random_state()

    @torch.no_grad()
    def gather(self, model: Model, build: Callable[[], Model]) -> Model:
        """The trained model as one.

        Args:
            model: The trained model, of which this rank may hold a part.
            build: Makes a whole one, with its frozen weights as they were read.

        Returns:
            On rank 0 the whole model: `model` itself, or what `build` gave where ranks hold it in parts. `model` on the
            others.

        Raises:
            OstroError: As raised by `build`; on the other ranks `ToldElsewhere`.

        Distributed: one all-gather per split weight and axis that splits it; from the other stages of a pipeline one
            message per weight to rank 0.
        """
        if not self.mesh.splits_model:
            return model
        whole = self.ranks.on_main(build)
        targets = {} if whole is None else dict(whole.named_parameters())
        device = next(model.parameters()).device
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        _, *others = self.stages.gather({name: (weight.shape, weight.dtype) for name, weight in weights.items()})
        group = self.stages.group
        leads_to_main = group is not None and dist.get_process_group_ranks(group)[0] == 0
        for name, weight in weights.items():
            full = gather_whole(weight) if isinstance(weight, DTensor) else weight.detach()
            if targets:
                targets[name].copy_(full)
            elif group is not None and leads_to_main:
                send(full.contiguous(), group, 0)
        for stage, held in enumerate(others if targets else (), 1):
            assert group is not None  # there are other stages
            for name, (shape, dtype) in held.items():
                full = torch.empty(shape, dtype=dtype, device=device)
                receive(full, group, stage)
                targets[name].copy_(full)
        return whole or model

    @property
    def judges(self) -> Judges:
        """The ranks of the run as they evaluate together."""
        return Judges(
            self.ranks,
            self.data,
            in_step=self.data if self.mesh.sizes["dp_shard"] > 1 else Ranks(),
            pipeline=self.stages.group,
            own_stages=self.own_stages,
            dtype=self._dtype,
        )

    def judge(self, evaluate: Callable[[], Result]) -> Result:
        """What `evaluate` gives, with the model as it stands.

        Args:
            evaluate: Called on all ranks, with the collectives of `judges`.

        Raises:
            OstroError: As raised by `evaluate`.

        Distributed: as `evaluate`.
        """
        try:
            return evaluate()
        finally:
            free_gathered(self._module)

    def state(self) -> TrainerState:
        """The run as it stands after `step` whole steps; weights and moments are the live ones."""
        return TrainerState(
            step=self.step,
            num_tokens=self.num_tokens,
            weights={name: weight.detach() for name, weight in self._weights.items()},
            optimizer=self._optimizer.state_dict(),
            loader=self._position,
            random=self._random,
            best=self._best,
        )

    def is_best(self, score: float) -> bool:
        """Whether an evaluation after the last step is better than all before; it is then the one to beat.

        Args:
            score: Higher is better.

        Distributed: rank 0's score counts.
        """
        score = self.ranks.gather(score)[0]
        is_best = self._best is None or score > self._best[1]
        if is_best:
            self._best = (self.step, score)
        return is_best

    def save(self, folder: Path) -> Path:
        """Writes a checkpoint into the run folder; the earlier ones stay loadable if it fails.

        With `train.async_save` it is only begun: `finish_saving` waits for it, and so does the next one.

        Distributed: rank 0 writes what all have in common, and the random states by share of the batch; of split
            weights and their moments, each rank writes its own part.
        """
        checkpoints, state = folder / "checkpoints", vars(self.state())
        first, *others = self.data.gather(self._random)
        state["random"] = {**first, **{f"rank {rank}": own for rank, own in enumerate(others, 1)}}
        self.finish_saving()
        self.ranks.on_main(partial(prepare_folder, checkpoints))
        is_split = self.mesh.splits_model
        if is_split and self._save_group is None:
            self._save_group = self.ranks.separate_group()
        keep = (self._best[0],) if self._options.keep_best and self._best else ()
        keep_last, group = self._options.keep_last, self._save_group
        start = self.saver.start if self._options.async_save else save_train_state
        with self.ranks.agreed():
            if self.ranks.is_main or is_split:
                start(checkpoints, self.step, state, keep_last=keep_last, keep=keep, group=group)
        return train_state_path(checkpoints, self.step)

    def finish_saving(self) -> None:
        """Waits until a checkpoint that was begun is published.

        Raises:
            CheckpointError: When it cannot be written; on the other ranks `ToldElsewhere`.

        Distributed: as `Ranks.agreed`.
        """
        with self.ranks.agreed():
            self.saver.finish()

    def resume(self, path: Path | None, console: Console) -> None:
        """Continues from a checkpoint, if there is one, on whatever number of ranks.

        Distributed: every rank reads the files.
        """
        if path is None:
            return
        # random: a run may move between CPU and CUDA, and to another number of ranks
        form = {**vars(self.state()), "random": {}}
        elsewhere = {name for held in self.stages.gather(tensor_names(form)) for name in held}
        with self.ranks.agreed():
            state = load_train_state(path, form, elsewhere=elsewhere)
            self.step, self.num_tokens, self._best = state["step"], state["num_tokens"], state["best"]
            self._masters.publish()
            self._loader.load_state_dict(state["loader"])
        random = state["random"] if self.data.is_main else state["random"].get(f"rank {self.data.rank}")
        if random is not None:  # else the state that this rank was seeded with, as there was none so far
            runtime.restore_random_state(random)
        self._mark_position()
        console.out(f"{path}: continuing after step {self.step} of {self.num_steps}", highlight=False)


def find_checkpoint(folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint of a run folder to go on from; None for a new run.

    Raises:
        CheckpointError: When the ranks see different ones.

    Distributed: every rank looks.
    """
    with ranks.agreed():
        path = latest_train_state(folder / "checkpoints")
    seen = ranks.gather(path)
    with ranks.agreed():
        if len(set(seen)) > 1:
            raise CheckpointError(
                f"output: {folder} holds other checkpoints for some ranks ({', '.join(map(str, seen))}); put it on "
                "a disk that all of them share"
            )
    return path


def load_weights(path: Path, module: torch.nn.Module, loss_weights: Mapping[str, torch.Tensor] | None = None) -> int:
    """Puts the weights of a checkpoint into a model, and leaves the rest of the state alone.

    Args:
        path: A checkpoint.
        module: The model it was saved from, as it is before training.
        loss_weights: Placeholders for the parameters of the loss that were saved beside the model's.

    Returns:
        Optimizer steps of the checkpoint.

    Raises:
        CheckpointError: When the checkpoint cannot be read or is of another model.
    """
    masters = MasterWeights(module)
    weights: dict[str, torch.Tensor] = {**masters.named_parameters(), **(loss_weights or {})}
    form = {"step": 0, "num_tokens": 0, "weights": weights, "optimizer": {}, "loader": {}, "random": {}, "best": None}
    state = load_train_state(path, form)
    masters.publish()
    return int(state["step"])

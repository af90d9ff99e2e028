"""Runs whose memory is predicted and measured: inputs that fill every micro-batch alike, and a step that is counted."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image

from ostro.checkpoint.create import create_weights
from ostro.models.cpu_linear import round_rows
from ostro.plan.live import LiveBytes
from ostro.plan.memory import Sizes, Usage
from ostro.plan.splits import make_plan, usages
from ostro.train.recipe import EmbedRecipe, VlmRecipe
from tests.helpers.trainers import make_trainer
from tests.unit.data.files import write_jsonl

Recipe = EmbedRecipe | VlmRecipe


def make_inputs(folder: Path, *, size: str, vocab_size: int, num_words: int, pixels: tuple[int, int]) -> None:
    """Writes weights with a head of its own, and 16 equal rows of either kind: a picture and words, or words alone."""
    create_weights(folder / "weights", size=size, layout="identity", precision="fp8", vocab_size=vocab_size, seed=0)
    words, data = " ".join(["red green"] * num_words), folder / "data"
    data.mkdir()
    conversations = []
    for number in range(16):
        Image.new("RGB", pixels, (10 * number, 90, 200)).save(data / f"{number}.png")
        asked = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": f"{number} {words}"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": words}]
        conversations.append({"messages": messages})
    write_jsonl(data / "conversations.jsonl", conversations)
    pairs = [{"query": f"{number} {words}", "positive": f"{words} {number}"} for number in range(16)]
    write_jsonl(data / "pairs.jsonl", pairs)


def recipe(folder: Path, kind: str, *, num_samples: int, **blocks: dict[str, Any]) -> Recipe:
    """A recipe over `make_inputs`; `blocks` add to or replace keys of its blocks."""
    data: dict[str, Any] = {"micro_batch_tokens": 4096}
    if kind == "vlm":
        data |= {"train": str(folder / "data" / "conversations.jsonl"), "global_batch_samples": num_samples}
    else:
        data |= {"train": str(folder / "data" / "pairs.jsonl"), "global_batch_queries": num_samples}
    settings: dict[str, Any] = {
        "kind": kind,
        "output": str(folder / "run"),
        "model": {"weights": str(folder / "weights")},
        "data": data,
        "train": {"num_steps": 10},
    }
    for name, keys in blocks.items():
        settings[name] = {**settings.get(name, {}), **keys}
    settings["data"]["train"] = [{"path": settings["data"]["train"]}]
    return (VlmRecipe if kind == "vlm" else EmbedRecipe).model_validate(settings)


def predicted(recipe: Recipe, num_ranks: int, found: Mapping[str, float]) -> list[Usage]:
    """What a plan says of each rank of the split in `recipe`, on the CPU, for the micro-batches that were measured."""
    data = recipe.data.model_copy(update={"micro_batch_tokens": int(found["tokens"])})
    exact = recipe.model_copy(update={"data": data})
    share = found["image_share"]
    plan = make_plan(exact, num_gpus=num_ranks, memory_gib=1000, device="cpu", image_share=share)
    [choice] = plan.fitting
    by_stage = usages(Sizes(plan.settings), choice.split, int(found["micro_batches"]))
    return [by_stage[rank * choice.split.pp // num_ranks] for rank in range(num_ranks)]


def measured(group: dist.ProcessGroup | None, recipe: Recipe) -> dict[str, float]:
    """A step of the run of `recipe`, counted.

    Returns:
        `live`: most bytes of tensors alive at once; `micro_batches` of a step; `tokens` and `image_share` of the
        largest; and in bytes of resident memory `resident`: its peak above what the process held before the model, and
        `resident_growth`: above what it held before the step.
    """
    before = _status("VmRSS")
    trainer = make_trainer(recipe)
    batch = next(trainer.batches)  # type: ignore[attr-defined]
    tokens, image_tokens = 0, 0
    if isinstance(recipe, VlmRecipe):
        largest = max(batch.micro_batches, key=lambda each: each.num_tokens)
        # the stages of a pipeline fill micro-batches up to one length
        tokens = largest.num_tokens if recipe.parallel.pp == 1 else round_rows(largest.num_tokens)
        num_micro_batches = len(batch.micro_batches)
        assert largest.image_sizes is not None
        image_tokens = int((largest.image_sizes // 28).prod(dim=-1).sum())
    else:
        lengths = [len(text) for text in batch.token_ids]
        groups = trainer._micro_batches(lengths)  # type: ignore[attr-defined]
        tokens = max(sum(lengths[text] for text in group) for group in groups)
        num_micro_batches = len(groups)
    trainer.train_step()
    live = LiveBytes()
    live.add([*trainer._module.parameters(), *trainer._module.buffers()])
    live.add(tensor for moments in trainer.state().optimizer.values() for tensor in moments.values())
    live.add(trainer._weights.values())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory counts from here on
    idle = _status("VmRSS")
    with live:
        live.restart()
        trainer.train_step()
    peak = _status("VmHWM")
    trainer.batches.close()  # type: ignore[attr-defined]
    return {
        "live": live.peak,
        "micro_batches": num_micro_batches,
        "tokens": tokens,
        "image_share": image_tokens / tokens,
        "resident": peak - before,
        "resident_growth": peak - idle,
    }


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

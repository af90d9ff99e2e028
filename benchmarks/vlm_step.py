"""A training step of the vision demo's model against transformers' Trainer: samples per CPU second, equal loss.

Same weights, same conversations of the demo (several questions about a scene), same order, AdamW. The peer is the stock
model under `transformers.Trainer`, with conversations tokenised and images processed beforehand and padded by its
collator; ours reads, tokenises and processes them as it goes. Each is measured over a grid of batch sizes, the peer in
every precision it offers on a CPU. Every case runs in a process of its own, on one thread. A case is timed between the
end of its first optimizer step and the end of its last one.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import in_own_process, table, write_result
from rich.console import Console

from ostro.config import load_recipe
from ostro.train import vlm
from ostro.train.prepare import prepare_inputs
from ostro.train.recipe import KINDS, VlmRecipe

BATCHES = (4, 8, 16, 32, 64)
PEER_MODES = ("bfloat16 weights", "bfloat16 autocast", "float32")
NUM_SAMPLES = 256


def demo(folder: str, batch: int, dtype: str, *, weights: str = "weights") -> VlmRecipe:
    """The demo's recipe on inputs in `folder`, in the order of the file."""
    overrides = [
        f"output={folder}/run",
        f"model.weights={folder}/{weights}",
        f"data.train={folder}/data/train.jsonl",
        "data.shuffle=false",
        f"data.global_batch_samples={batch}",
        f"model.dtype={dtype}",
    ]
    recipe = load_recipe("vlm-demo", overrides, KINDS)
    assert isinstance(recipe, VlmRecipe)
    return recipe


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """Packed, fused loss, float32 masters."""
    # "stock" is what the peer reads: FP8 products rounded to bfloat16
    recipe = demo(case["folder"], case["batch"], case["dtype"], weights="stock")
    model, encoder = vlm.build_model(recipe)
    with vlm.open_loader(recipe, encoder) as loader:
        trainer = vlm.VlmTrainer(recipe, model, loader)
        first = trainer.train_step()["loss"]
        started, num_steps = time.process_time(), NUM_SAMPLES // case["batch"]
        for _ in range(num_steps):
            trainer.train_step()
        seconds = time.process_time() - started
    return {"loss": first, "samples_per_s": num_steps * case["batch"] / seconds}


def peer(case: dict[str, Any]) -> dict[str, Any]:
    """The stock model under transformers' Trainer."""
    from transformers import Mistral3ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    mode, batch = case["mode"], case["batch"]
    samples = tokenised(case["folder"], NUM_SAMPLES + batch)
    model = Mistral3ForConditionalGeneration.from_pretrained(f"{case['folder']}/stock", dtype=torch.float32)
    if mode == "bfloat16 weights":
        model = model.bfloat16()
    marks: list[float] = []

    class Marks(TrainerCallback):  # type: ignore[misc]  # transformers' base class is not typed
        """Notes the CPU time at the end of every optimizer step."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Notes it."""
            marks.append(time.process_time())

    settings = TrainingArguments(
        output_dir=f"{case['folder']}/peer",
        per_device_train_batch_size=batch,
        max_steps=NUM_SAMPLES // batch + 1,
        learning_rate=1e-3,
        optim="adamw_torch_fused",
        bf16=mode == "bfloat16 autocast",
        use_cpu=True,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=samples, data_collator=pad, callbacks=[Marks()])
    trainer.train()
    seconds = marks[-1] - marks[0]
    first = trainer.state.log_history[0]["loss"]
    return {"loss": first, "samples_per_s": (len(marks) - 1) * batch / seconds}


def tokenised(folder: str, count: int) -> list[dict[str, Any]]:
    """Ids, labels in transformers' form (not shifted) and pixels of the first conversations, made once."""
    from ostro.data.conversation_collate import collate

    recipe = demo(folder, 1, "bfloat16")
    _, encoder = vlm.build_model(recipe)
    (source,) = vlm.open_conversations(recipe.data.train)
    rows = []
    for index in range(count):
        encoded = encoder.encode(source[index % len(source)])
        batch = collate([encoded])
        rows.append(
            {
                "input_ids": encoded.token_ids,
                "labels": [-100, *encoded.labels[:-1]],
                "pixel_values": batch.pixel_values,
                "image_sizes": batch.image_sizes,
            }
        )
    return rows


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded batch; the images of the demo have one size."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 11, "labels": -100}
    padded = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    images = {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_sizes")}
    return {**padded, "attention_mask": mask, **images}


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(json.dumps({"ours": ours, "peer": peer}[arguments.case["run"]](arguments.case)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_inputs(demo(folder, 1, "bfloat16"), Console(file=io.StringIO()))
        from ostro.checkpoint.export_vlm import export_vlm
        from ostro.checkpoint.load import load_vlm

        source = Path(folder) / "weights"
        export_vlm(load_vlm(source), source, Path(folder) / "stock", precision="bf16")
        cases = [
            {"run": run, "mode": mode, "dtype": mode.split()[0], "batch": batch, "folder": folder}
            for run, modes in (("ours", ("bfloat16 weights", "float32")), ("peer", PEER_MODES))
            for mode in modes
            for batch in arguments.batches
        ]
        rows = []
        for case in cases:
            rows.append({**case, **in_own_process(__file__, case)})
            print({key: value for key, value in rows[-1].items() if key != "folder"}, flush=True)
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The table, and ours against the peer at the best setting of each."""
    best = {run: max(row["samples_per_s"] for row in rows if row["run"] == run) for run in ("ours", "peer")}
    shown = [
        {
            "system": {"ours": "Ostro", "peer": "transformers Trainer"}[row["run"]],
            "precision": "bfloat16, float32 masters" if row["run"] == "ours" and "b" in row["dtype"] else row["mode"],
            "batch": row["batch"],
            "samples/cpu-s": f"{row['samples_per_s']:.1f}",
            "x best of the peer": f"{row['samples_per_s'] / best['peer']:.2f}",
            "loss of the first step": f"{row['loss']:.5f}",
        }
        for row in rows
    ]
    body = "\n\n".join(
        [
            f"Best of each: {best['ours']:.1f} against {best['peer']:.1f} samples per CPU second, "
            f"{best['ours'] / best['peer']:.2f} x. One thread; the first steps of equal batch sizes have equal "
            "conversations. `bfloat16 weights` of the peer has no float32 masters, so its updates are rounded away; it "
            "is the fastest it can do, not what one would train with.",
            table(shown, list(shown[0])),
        ]
    )
    packages = ["torch", "transformers", "accelerate"]
    write_result("vlm_step", "A vision-language training step against transformers' Trainer", body, packages=packages)


if __name__ == "__main__":
    main()

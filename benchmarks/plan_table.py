"""Scaling on paper: the best split of the five models on 8, 64 and 512 GPUs of 80 GiB, by `ostro plan`.

Nothing is run or downloaded: shapes come with Ostro. All other settings are those of one recipe.
"""

from __future__ import annotations

from typing import Any

from common import table, write_result

from ostro.config import load_recipe
from ostro.plan.releases import RELEASES
from ostro.plan.splits import GIB, Choice, Plan, make_plan
from ostro.train.recipe import KINDS

RECIPE = "vlm-mistral-medium-3.5-128b"
OVERRIDES = ("data.global_batch_samples=512",)
COUNTS = (8, 64, 512)
MEMORY_GIB = 80


def row(release: str, num_gpus: int, plan: Plan) -> dict[str, Any]:
    """The best split, or the nearest and what it lacks."""
    choice: Choice = (*plan.fitting, *plan.too_large)[0]
    split = ", ".join(f"{axis} {size}" for axis, size in vars(choice.split).items() if size > 1)
    return {
        "model": release,
        "GPUs": num_gpus,
        "fit": len(plan.fitting),
        "best or nearest": split,
        "GiB a rank": f"{choice.needs.peak / GIB:.1f}",
        "sends GiB a step": f"{sum(choice.step.sent.values()) / GIB:,.0f}",
        "step s": f"{choice.step.seconds:,.1f}",
        "why not": choice.reason,
    }


def main() -> None:
    """Plans all cases and writes the table."""
    rows = []
    for release in RELEASES:
        recipe = load_recipe(RECIPE, [f"model.weights={release}", *OVERRIDES], KINDS)
        for num_gpus in COUNTS:
            rows.append(row(release, num_gpus, make_plan(recipe, num_gpus=num_gpus, memory_gib=MEMORY_GIB)))
            print(rows[-1], flush=True)
    body = "\n\n".join(
        [
            f"Recipe `{RECIPE}` with `{' '.join(OVERRIDES)}` and the model's name as `model.weights`: vision frozen, "
            "the rest trained in bfloat16 with float32 masters, activations recomputed, micro-batches of 8,192 tokens, "
            "half of them of images. A rank may hold 72 GiB.",
            table(rows, list(rows[0])),
        ]
    )
    write_result("plan_table", "Scaling on paper", body, packages=["torch", "transformers"])


if __name__ == "__main__":
    main()

"""The vision tower, 1 to 64 images, against transformers' own: time, memory, equal results.

Ours is to grow with the number of images, transformers' joint tower grows with its square. Same weights, same images,
forward and backward, one thread. Every case runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import numpy
import torch
from common import in_own_process, measure, table, write_result
from transformers import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

from ostro.models.vision import PerImagePixtralModel

COUNTS = (1, 4, 16, 64)
PIXELS = (112, 224)
MIXED = "112-224, mixed"


def sizes(pixels: int | str, count: int) -> list[tuple[int, int]]:
    """Heights and widths of the images: square, or drawn between 112 and 224 pixels in steps of 28."""
    if isinstance(pixels, int):
        return [(pixels, pixels)] * count
    drawn = numpy.random.default_rng(0).integers(4, 9, (count, 2)) * 28
    return [(int(height), int(width)) for height, width in drawn]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Times one tower on one set of images.

    Args:
        case: `tower` (`ours` or `stock`), `dtype`, `pixels`, `count`.

    Returns:
        `cpu_s`, `wall_s` and `peak_mib` of a forward and backward pass, the number of `patches`, and `first` and `norm`
        of the states, to compare towers by.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = PixtralVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, patch_size=14
    )
    tower: Any = PixtralVisionModel(config)
    if case["tower"] == "ours":
        tower = PerImagePixtralModel.adopt(tower)
    tower.to(getattr(torch, case["dtype"]))
    given = sizes(case["pixels"], case["count"])
    pixels = torch.randn(len(given), 3, max(height for height, _ in given), max(width for _, width in given))

    def step() -> torch.Tensor:
        tower.zero_grad()
        states: torch.Tensor = tower(pixels, image_sizes=torch.tensor(given)).last_hidden_state
        states.float().square().mean().backward()
        return states.detach().float()

    patches = sum(height // 14 * (width // 14) for height, width in given)
    small = patches < 3000
    states, figures = measure(step, repeats=3 if small else 1, warm_up=small)
    return {**figures, "patches": patches, "first": states[0, 0, :8].tolist(), "norm": states.norm().item()}


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """A row of the table: both towers on one set of images."""
    ours, stock = (in_own_process(__file__, {**case, "tower": tower}) for tower in ("ours", "stock"))
    if case["dtype"] == "float32":
        numpy.testing.assert_allclose(ours["first"], stock["first"], atol=1e-4)
        numpy.testing.assert_allclose(ours["norm"], stock["norm"], rtol=1e-5)
    return {
        "dtype": case["dtype"],
        "pixels": case["pixels"],
        "images": case["count"],
        "patches": f"{ours['patches']:,}",
        "stock CPU s": f"{stock['cpu_s']:.3f}",
        "ours CPU s": f"{ours['cpu_s']:.3f}",
        "faster": f"{stock['cpu_s'] / ours['cpu_s']:.1f}",
        "stock ms/image": f"{1000 * stock['cpu_s'] / case['count']:.1f}",
        "ours ms/image": f"{1000 * ours['cpu_s'] / case['count']:.1f}",
        "stock peak MiB": f"{stock['peak_mib']:,.0f}",
        "ours peak MiB": f"{ours['peak_mib']:,.0f}",
    }


def main() -> None:
    """Runs all cases, or the one given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help="one case as JSON, for the script's own use")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS), help="images per batch")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="precisions of both towers")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(arguments.case)))
        return
    rows = []
    for dtype, pixels, count in itertools.product(arguments.dtypes, (*PIXELS, MIXED), arguments.counts):
        rows.append(compare({"dtype": dtype, "pixels": pixels, "count": count}))
        print(rows[-1], flush=True)
    body = "\n\n".join(
        [
            "Forward and backward of a Pixtral of 4 layers, hidden size 256, one thread. Linear means: the "
            "milliseconds per image stay what they are down the table. The states of both are compared in float32. "
            "Mixed images come in random order, so few neighbours share an attention call.",
            table(rows, list(rows[0])),
        ]
    )
    write_result("vision_tower", "Vision tower, 1 to 64 images", body, packages=["torch", "transformers"])


if __name__ == "__main__":
    main()

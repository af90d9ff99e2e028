"""How the command line shows a plan: what it rests on, the splits, and the best one by part of the model."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence

from ostro.parallel.mesh import AXES
from ostro.plan.memory import KINDS
from ostro.plan.shapes import Settings
from ostro.plan.splits import USABLE, Choice, Plan
from ostro.plan.traffic import BETWEEN, FLOPS, INSIDE
from ostro.train.parts import PARTS

_MAX_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What bytes are counted in."""

    name: str
    size: int

    def show(self, num_bytes: int) -> str:
        """So many of them."""
        return f"{num_bytes / self.size:,.1f}" if num_bytes else "-"


_GIB, _MIB = _Unit("GiB", 2**30), _Unit("MiB", 2**20)


def show_plan(plan: Plan, name: str) -> None:
    """Print what a plan rests on, the splits that fit, those that do not, and the best one by part.

    Args:
        plan: What `make_plan` found.
        name: Of the recipe, as it was asked for.
    """
    unit = _GIB if plan.limit >= 8 * _GIB.size else _MIB
    facts = dict(_facts(plan, name, unit))
    width = max(map(len, facts))
    for label, value in facts.items():
        print(f"{label:<{width}}  {value}")
    for title, choices in (("fits", plan.fitting), ("does not fit", plan.too_large)):
        if choices:
            order = "best first" if title == "fits" else "nearest first"
            print(f"\n{title}: {len(choices)} splits, {order}, in {unit.name}")
            _print_table(_choice_rows(choices[:_MAX_SHOWN], plan.settings, unit))
            if len(choices) > _MAX_SHOWN:
                print(f"  and {len(choices) - _MAX_SHOWN} more; --json lists them all")
    rules = Counter(rule for _, rule in plan.forbidden)
    if rules:
        print(f"\ncannot be: {len(plan.forbidden)} splits")
        for rule, number in rules.items():
            print(f"  {number:>2} x {rule}")
    for choice in (*plan.fitting, *plan.too_large)[:1]:
        sent = ", ".join(f"{axis} {unit.show(size)}" for axis, size in choice.step.sent.items() if size)
        print(f"\n{'best' if plan.fitting else 'nearest'}: {choice.split}")
        print(f"  a rank sends in a step, in {unit.name}: {sent or 'nothing'}")
        if choice.split.pp > 1:
            print(f"  its pipeline waits for {choice.step.idle:.0%} of the compute time")
        print(f"  it holds, in {unit.name}, at its worst moment, the {choice.needs.moment}:")
        _print_table(_part_rows(choice, unit))


def plan_as_json(plan: Plan) -> str:
    """Every split with its bytes, for other programs.

    Args:
        plan: What `make_plan` found.
    """
    choices = [
        {
            **dataclasses.asdict(choice.split),
            "fits": not choice.reason,
            "reason": choice.reason,
            "peak_bytes": choice.needs.peak,
            "moment": choice.needs.moment,
            "bytes": {f"{part}.{kind}": size for (part, kind), size in choice.needs.ledger.items()},
            "sent_bytes": choice.step.sent,
            "micro_batches": choice.num_micro_batches,
            "step_s": choice.step.seconds,
        }
        for choice in (*plan.fitting, *plan.too_large)
    ]
    refused = [{**dataclasses.asdict(split), "fits": False, "reason": rule} for split, rule in plan.forbidden]
    head = {"source": plan.source, "num_parameters": plan.num_parameters, "limit_bytes": int(plan.limit)}
    return json.dumps({**head, "splits": [*choices, *refused]}, indent=2)


def _facts(plan: Plan, name: str, unit: _Unit) -> Iterator[tuple[str, str]]:
    settings, batch = plan.settings, plan.batch
    yield "recipe", name
    number = plan.num_parameters
    yield "model", f"{f'{number / 1e9:,.1f} B' if number > 1e9 else f'{number / 1e6:.1f} M'} parameters; {plan.source}"
    if settings.frozen:
        yield "frozen", ", ".join(part for part in PARTS if part in settings.frozen)
    recompute = "recomputed" if settings.recompute else "kept"
    images = f", {settings.image_share:.0%} of them of images" if not settings.is_embedder else ""
    dtype = str(settings.dtype).removeprefix("torch.")
    yield "micro-batch", f"{settings.num_tokens:,} tokens{images}, in {dtype}; activations {recompute}"
    yield "step", f"{batch.num_samples:,} ({batch.key}) of {batch.sample_tokens:,} tokens, the most the recipe allows"
    stages = f", {settings.stages_per_rank} stages on each rank" if settings.stages_per_rank > 1 else ""
    yield "pipeline", f"{settings.schedule}{stages}"
    usable = f"{unit.show(int(plan.limit))} {unit.name} a rank"
    yield "fits", f"up to {usable}, {USABLE:.0%}: the rest is for CUDA, NCCL and gaps between tensors"
    links = f"{INSIDE / 1e9:.0f} GB/s in a machine, {BETWEEN / 1e9:.0f} between"
    yield "best", f"shortest step, as compute ({FLOPS / 1e12:.0f} TFLOP/s), idle pipeline and traffic ({links}) in turn"


def _choice_rows(choices: Sequence[Choice], settings: Settings, unit: _Unit) -> Iterator[list[str]]:
    other = "if kept" if settings.recompute else "if recomputed"
    yield [*AXES, "holds", other, "sends", "micro-batches", "step s", "why not"]
    for choice in choices:
        sizes = [str(vars(choice.split)[axis]) for axis in AXES]
        held = (choice.needs.peak, choice.other.peak, sum(choice.step.sent.values()))
        counts = [*map(unit.show, held), str(choice.num_micro_batches), f"{choice.step.seconds:,.3g}"]
        yield [*sizes, *counts, choice.reason]


def _part_rows(choice: Choice, unit: _Unit) -> Iterator[list[str]]:
    ledger = choice.needs.ledger
    yield ["", *KINDS, "all"]
    for part in PARTS:
        sizes = [ledger.get((part, kind), 0) for kind in KINDS]
        if any(sizes):
            yield [part, *map(unit.show, (*sizes, sum(sizes)))]
    totals = [sum(size for (_, of), size in ledger.items() if of == kind) for kind in KINDS]
    yield ["all", *map(unit.show, (*totals, sum(totals)))]


def _print_table(rows: Iterator[list[str]]) -> None:
    """Numbers to the right, names and reasons to the left; a column without an entry is left out."""
    table = list(rows)
    kept = [column for column in range(len(table[0])) if any(row[column] for row in table[1:])]
    for row in table:
        cells = []
        for column in kept:
            width = max(len(line[column]) for line in table)
            is_text = table[0][column] in ("", "why not")
            cells.append(row[column].ljust(width) if is_text else row[column].rjust(width))
        print(f"  {'  '.join(cells)}".rstrip())

"""The page of a run: `run.png` with its curves, and `report.html`, one file with results, examples and settings.

It only reads the files that a run leaves (`metrics.jsonl`, `recipe.yaml`, `environment.json`, `result.json`), so that
the page can be made again at any time without the model.
"""

from __future__ import annotations

import base64
import html
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostro.errors import DataError, missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): told apart by colour-blind readers, and in grey.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"
_MAX_POINTS = 400

Row = Mapping[str, Any]


def write_report(folder: str | Path) -> Path:
    """Draws the run and writes its page.

    Args:
        folder: Run folder.

    Returns:
        Path of `report.html`; the picture is inside it and beside it as `run.png`.

    Raises:
        DataError: When a file of the run cannot be read.
        OstroError: When matplotlib is not installed.
    """
    folder = Path(folder)
    rows = [json.loads(line) for line in _read(folder / "metrics.jsonl").splitlines()]
    result = json.loads(_read(folder / "result.json"))
    recipe, environment = _read(folder / "recipe.yaml"), _read(folder / "environment.json")
    picture, page = folder / "run.png", folder / "report.html"
    draw_run(rows, result, picture)
    steps = [row for row in rows if "loss" in row]
    values = {
        "name": html.escape(folder.resolve().name),
        "summary": _summary(steps[-1]),
        "table": _result_table(result),
        "picture": base64.b64encode(picture.read_bytes()).decode(),
        "samples": _SAMPLES[result["kind"]](result),
        "recipe": html.escape(recipe),
        "environment": html.escape(environment),
    }
    page.write_text(string.Template(_PAGE).substitute(values), encoding="utf-8")
    return page


def draw_run(rows: Sequence[Row], result: Row, path: Path) -> None:
    """Draws loss over steps, and beside it the first metric of the evaluations; other systems are dashed lines.

    Args:
        rows: Of `metrics.jsonl`.
        result: Of `result.json`.
        path: PNG to write.

    Raises:
        OstroError: When matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("eval", "matplotlib") from error
    evaluations = [row for row in rows if "evaluation" in row]
    panels = 2 if evaluations or result["metrics"] else 1
    last_step = max(row["step"] for row in rows)
    figure = Figure(figsize=(5.5 * panels, 3.7), dpi=150)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", wspace=0.06)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_loss(axes[0], [row for row in rows if "loss" in row])
    if panels == 2:
        _draw_metric(axes[1], evaluations, result, last_step)
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_xlim(0, last_step)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    figure.savefig(path)


def _draw_loss(axis: Axes, rows: Sequence[Row]) -> None:
    every = -(-len(rows) // _MAX_POINTS)
    groups = [rows[start : start + every] for start in range(0, len(rows), every)]
    steps = [group[-1]["step"] for group in groups]
    axis.plot(steps, [sum(row["loss"] for row in group) / len(group) for group in groups], color=_BLUE)
    axis.set_ylabel("loss")


def _draw_metric(axis: Axes, evaluations: Sequence[Row], result: Row, last_step: int) -> None:
    """Held-out curve during the run, and the test set before and after it, with the yardstick on that set."""
    name = next(iter(evaluations[0]["evaluation"] if evaluations else result["metrics"]))
    if evaluations:
        steps = [row["step"] for row in evaluations]
        values = [row["evaluation"][name] for row in evaluations]
        axis.plot(steps, values, "o-", color=_BLUE, clip_on=False, label=evaluations[0]["split"])
    baselines = result["baselines"]
    points = [(0, baselines.get("untrained", {})), (last_step, result["metrics"])]
    shown = [(step, metrics[name]) for step, metrics in points if name in metrics]
    if shown:
        axis.plot(*zip(*shown, strict=True), "D", color=_ORANGE, markersize=8, clip_on=False, zorder=3, label="test")
    for system in baselines.keys() - {"untrained"}:
        axis.axhline(baselines[system][name], color=_GREY, linestyle="--", label=f"{system}, test")
    axis.set_ylim(bottom=0)
    axis.set_ylabel(name)
    axis.legend(frameon=False, loc="best")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); is {path.parent} the folder of a finished run?"
        ) from error


def _summary(last: Row) -> str:
    """One line from the last logged step."""
    return f"{last['step']:,} steps &middot; loss {last['loss']:.3f} &middot; {last['tokens_per_s']:,.0f} tokens/s"


def _result_table(result: Row) -> str:
    """Trained model and baselines, the best of each column in bold; nothing without a test set."""
    if not result["metrics"]:
        return ""
    systems = {"trained": result["metrics"], **result["baselines"]}
    best = {name: max(metrics[name] for metrics in systems.values()) for name in result["metrics"]}
    rows = []
    for system, metrics in systems.items():
        cells = (
            f"<b>{metrics[name]:.3f}</b>" if metrics[name] == best[name] else f"{metrics[name]:.3f}" for name in best
        )
        rows.append(f"<tr><th>{html.escape(system)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in best)
    return f"<table><tr><th>test set</th>{head}</tr>{''.join(rows)}</table>"


def _search_samples(result: Row) -> str:
    """Queries of an embedding run with what was found for them."""
    if not result["samples"]:
        return ""
    name = html.escape(next(iter(result["metrics"])))
    note = f"Test queries at even steps of their order by {name}. ✓ relevant; ✗ relevant, but not among those shown."
    sections = "".join(_sample(sample, name) for sample in result["samples"])
    return f'<h2>Sample queries, from best to worst</h2><p class="quiet">{note}</p>{sections}'


def _sample(sample: Row, metric: str) -> str:
    """A query, what was found for it, and the relevant documents further down."""
    found = [
        _document("✓" if document["relevant"] else "", f"{document['score']:.3f}", document)
        for document in sample["documents"]
    ]
    missed = [
        _document("✗", f"rank {document['rank']}" if document["rank"] else "not found", document)
        for document in sample["missed"]
    ]
    query, value = html.escape(sample["query"]), f"{metric} {sample['metric']:.2f}"
    return f"<section><h3>{query}<span>{value}</span></h3><ul>{''.join(found + missed)}</ul></section>"


def _document(mark: str, place: str, document: Row) -> str:
    text, key = html.escape(document["text"]), html.escape(document["id"])
    kind = {"✓": "hit", "✗": "miss"}.get(mark, "")
    return f'<li class="{kind}"><i>{mark}</i><code>{place}</code><p><b>{key}</b> {text}</p></li>'


def _answer_samples(result: Row) -> str:
    """Questions of a vision-language run with their images, the model's answer and the reference."""
    if not result["samples"]:
        return ""
    cards = "".join(_answer(sample) for sample in result["samples"])
    note = "Held-out questions at even steps through the test set. ✓ exact match; ✗ with the reference beside it."
    return f'<h2>Sample answers</h2><p class="quiet">{note}</p><div class="cards">{cards}</div>'


def _answer(sample: Row) -> str:
    pictures = "".join(f'<img alt="" src="data:image/png;base64,{image}">' for image in sample["images"])
    answer, reference = html.escape(sample["answer"]), html.escape(sample["reference"])
    verdict = f'<p class="hit">✓ {answer}</p>'
    if not sample["correct"]:
        verdict = f'<p class="miss">✗ {answer}</p><p class="quiet">expected {reference}</p>'
    return f"<figure>{pictures}<figcaption><p>{html.escape(sample['question'])}</p>{verdict}</figcaption></figure>"


_SAMPLES = {"embed": _search_samples, "vlm": _answer_samples}

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$name</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 0; }
.quiet { color: #666; margin: 0 0 1rem; }
img { width: 100%; }
table { border-collapse: collapse; margin-bottom: 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #ddd; text-align: right; font-weight: normal; }
th:first-child { text-align: left; }
tr:first-child th { color: #666; }
section { border-top: 1px solid #ddd; padding: .8rem 0; }
h3 { font-size: 1rem; margin: 0 0 .4rem; display: flex; justify-content: space-between; gap: 2rem; }
h3 span { color: #666; font-weight: normal; white-space: nowrap; }
ul { list-style: none; margin: 0; padding: 0; }
li { display: flex; gap: .6rem; color: #666; font-size: .9rem; }
li i { flex: 0 0 1rem; font-style: normal; }
li code { flex: 0 0 5rem; text-align: right; white-space: nowrap; }
li p { margin: 0; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
li p:hover { white-space: normal; }
.hit, .hit i { color: #0072b2; }
.miss, .miss i { color: #d55e00; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
figure { margin: 0; border-top: 1px solid #ddd; padding: .6rem 0; font-size: .9rem; }
figure img { width: 10rem; image-rendering: pixelated; }
figcaption p { margin: .2rem 0; }
pre { font-size: .8rem; background: #f6f6f6; padding: .8rem; overflow-x: auto; }
summary { cursor: pointer; font-weight: bold; }
details { margin-top: 1rem; }
</style>
<h1>$name</h1>
<p class="quiet">$summary</p>
$table
<img alt="Loss and held-out score over the steps of the run" src="data:image/png;base64,$picture">
$samples
<details><summary>Recipe</summary><pre>$recipe</pre></details>
<details><summary>Environment</summary><pre>$environment</pre></details>
</html>
"""

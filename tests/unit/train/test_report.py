"""The page of a run, from the files of one."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from ostro.errors import DataError, OstroError
from ostro.train.report import write_report

BLUE, ORANGE, GREY = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x55, 0x55, 0x55)
METRICS = {"nDCG@10": 0.641, "Recall@10": 0.8}
BASELINES = {"BM25": {"nDCG@10": 0.386, "Recall@10": 0.85}, "untrained": {"nDCG@10": 0.037, "Recall@10": 0.1}}
SAMPLE = {
    "query": "uses <script>alert(1)</script> & $name",
    "metric": 0.5,
    "documents": [
        {"id": "T1", "text": "Phishing & <b>more</b>", "score": 0.71234, "relevant": False},
        {"id": "T2", "text": "Scripting", "score": 0.7, "relevant": True},
    ],
    "missed": [{"id": "T3", "text": "Far", "rank": 9}, {"id": "T4", "text": "Lost", "rank": None}],
}


class Page(HTMLParser):
    """Text of the page, and its tags with their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def run_folder(folder: Path, *, evaluated: bool = True, **result: Any) -> Path:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 5.0 / step, "learning_rate": 1e-3, "tokens_per_s": 20500.0} for step in range(1, 41)
    ]
    if evaluated:
        rows.insert(0, {"step": 0, "evaluation": {"nDCG@10": 0.03}, "split": "dev"})
        rows.append({"step": 40, "evaluation": {"nDCG@10": 0.6}, "split": "dev"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = {"kind": "embed", "metrics": METRICS, "baselines": BASELINES, "samples": [SAMPLE], **result}
    (folder / "result.json").write_text(json.dumps(page), encoding="utf-8")
    (folder / "recipe.yaml").write_text("kind: embed\nloss: {temperature: 0.05}  # <5 %\n", encoding="utf-8")
    (folder / "environment.json").write_text('{"python": "3.11.7"}\n', encoding="utf-8")
    return folder


def read_picture(path: Path) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """`[height, width, 3]`."""
    with Image.open(path) as picture:
        return numpy.asarray(picture.convert("RGB"))


def num_pixels(path: Path, colour: tuple[int, int, int]) -> int:
    return int((read_picture(path) == numpy.array(colour)).all(-1).sum())


def test_the_page_stands_alone_and_holds_the_picture(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path))
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")] == []
    (picture,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    kind, _, data = str(picture).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "run.png").read_bytes()
    assert "http" not in path.read_text(encoding="utf-8").replace(str(picture), "")


def test_the_page_tells_result_samples_recipe_and_environment(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path))
    text = " ".join(filter(None, Page(path).text))
    assert "40 steps · loss 0.125 · 20,500 tokens/s" in text
    assert "trained 0.641 0.800 BM25 0.386 0.850 untrained 0.037 0.100" in text
    bold = re.findall(r"<td><b>(.*?)</b></td>", path.read_text(encoding="utf-8"))
    assert bold == ["0.641", "0.850"], "the best of each column"
    assert "uses <script>alert(1)</script> & $name nDCG@10 0.50" in text
    assert "0.712 T1 Phishing & <b>more</b> ✓ 0.700 T2 Scripting ✗ rank 9 T3 Far ✗ not found T4 Lost" in text
    assert "kind: embed\nloss: {temperature: 0.05}  # <5 %" in text
    assert '{"python": "3.11.7"}' in text


def test_the_picture_shows_curve_test_set_and_bm25(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path))
    picture = tmp_path / "run.png"
    assert read_picture(picture).shape == (555, 1650, 3)
    assert all(num_pixels(picture, colour) > 500 for colour in (BLUE, ORANGE, GREY))


def test_a_run_without_a_test_set(tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path, metrics={}, baselines={}, samples=[]))
    assert not {"table", "section", "h2"} & {tag for tag, _ in Page(path).tags}
    picture = tmp_path / "run.png"
    assert num_pixels(picture, BLUE) > 500
    assert num_pixels(picture, ORANGE) == 0
    assert num_pixels(picture, GREY) < 100, "smoothed letters only"


def test_a_run_without_any_evaluation_has_one_panel(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path, evaluated=False, metrics={}, baselines={}, samples=[]))
    assert read_picture(tmp_path / "run.png").shape == (555, 825, 3)


def test_a_test_set_alone_is_drawn_too(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path, evaluated=False))
    assert num_pixels(tmp_path / "run.png", ORANGE) > 500


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "recipe.yaml", "environment.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (run_folder(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(No such file or directory\)"):
        write_report(tmp_path)


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OstroError, match=r"matplotlib: not installed; run: pip install 'ostro\[eval\]'"):
        write_report(run_folder(tmp_path))

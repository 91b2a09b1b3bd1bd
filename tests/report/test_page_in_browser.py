"""The page of a report as Chromium shows it: every text is seen, in light and in dark, and nothing comes from a net."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphzip as gz

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZE = (1000, 3000)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.slow,
]

FIND = """
<script>
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.data.trim() || ["STYLE", "SCRIPT", "title"].includes(node.parentNode.nodeName)) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const box = range.getBoundingClientRect();
  found.push([node.data.trim(), box.left, box.top, box.right, box.bottom]);
}
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
out.style.display = "none";
document.body.append(out);
</script>
"""


def chromium(page: Path, *flags: str) -> str:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={SIZE[0]},{SIZE[1]}"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()]
    environment = {**os.environ, "HOME": str(page.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)]
    model, data = nn.Sequential(*layers).eval(), [torch.randn(64, 6)]
    study = gz.WidthStudy(model, (data[0],), calibration=data)
    study.measure()
    plan = study.plan(macs=0.6)
    compiled = gz.compile(model, plan, (data[0],), calibration=data, evaluate=lambda _: 0.5)
    folder = tmp_path_factory.mktemp("page")
    compiled.export(folder / "slim.onnx")
    compiled.measure(model)
    compiled.report = gz.Report.from_dict({**compiled.report.to_dict(), "study": study.summary()})
    compiled.report.save(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "asked.html").write_text(text.replace("</body>", f"{FIND}</body>"), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def texts(page: Path) -> list[Any]:
    dom = chromium(page.with_name("asked.html"), "--dump-dom")
    match = re.search(r'<pre id="found"[^>]*>(.*?)</pre>', dom, re.DOTALL)
    assert match is not None
    found: list[Any] = json.loads(unescape(match[1]))
    return found


def test_it_says_all_that_a_reader_looks_for(texts: list[Any]) -> None:
    said = [text for text, *_ in texts]
    for heading in (
        *("Before and after", "Channels of each group", "Which layers are coupled", "Sensitivities", "Frontier"),
        *("Verification", "To reproduce"),
    ):
        assert heading in said
    for figure in ("parameters", "latency, batch 1", "peak memory", "ONNX file", "score"):
        assert figure in said
    assert any(re.fullmatch(r"16 → \d+", text) for text in said)
    assert any("cluster_merge" in text for text in said)


def test_it_is_as_wide_as_the_window(texts: list[Any]) -> None:
    assert all(left >= 0 and right <= SIZE[0] and bottom <= SIZE[1] for _, left, _, right, bottom in texts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out(page: Path, texts: list[Any], scheme: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    shot = page.with_name(f"{scheme}.png")
    dark = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    chromium(page, dark, f"--screenshot={shot}")
    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (SIZE[1], SIZE[0])
    light = (pixels**2.2) @ (0.2126, 0.7152, 0.0722)
    assert (light[5, 5] > 0.5) == (scheme == "light")
    for text, left, top, right, bottom in texts:
        inside = light[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
        contrast = (inside.max() + 0.05) / (inside.min() + 0.05)
        assert contrast > 4, f"{text!r} is not seen in {scheme}: {contrast:.2f}"


def test_it_asks_no_network_and_prints(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|@import|url\(", text)
    paper = page.with_name("report.pdf")
    chromium(page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    assert paper.read_bytes().startswith(b"%PDF")

"""The page in a real browser, on a wide screen and on a phone's: what a person would see at once to be wrong."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpuyard.cli import sizing

from .conftest import Command

PROJECT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium-headless-shell") or ""

pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium-headless-shell; run `tools/setup browser`")

# What the browser is asked, in a copy of the page: the page itself has no script.
QUESTIONS = """
<script>
const wrong = [];
addEventListener("error", event => wrong.push("error: " + (event.message || event.target.outerHTML)), true);
addEventListener("load", () => {
  const wide = told => {
    const page = document.documentElement;
    if (page.scrollWidth > page.clientWidth)
      wrong.push(`${told}: ${page.scrollWidth} px wide in a window of ${page.clientWidth}`);
    for (const cell of document.querySelectorAll("td, th, p, h1, h2, h3"))
      if (cell.scrollWidth > cell.clientWidth + 1) wrong.push(`${told}: cut off: ${cell.innerText.slice(0, 60)}`);
  };
  wide("closed");
  const plots = [...document.querySelectorAll("svg")].map(plot => {
    const paper = plot.getBoundingClientRect(), name = plot.getAttribute("aria-label");
    const seen = [...plot.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
    seen.forEach(([text, box], index) => {
      if (box.left < paper.left - 1 || box.right > paper.right + 1 ||
          box.top < paper.top - 1 || box.bottom > paper.bottom + 1)
        wrong.push(`${name}: outside of its plot: ${text.textContent}`);
      for (const [other, its] of seen.slice(index + 1))
        if (box.left < its.right - 1 && its.left < box.right - 1 &&
            box.top < its.bottom - 2 && its.top < box.bottom - 2)
          wrong.push(`${name}: one over the other: ${text.textContent}, ${other.textContent}`);
    });
    const drawn = [...plot.querySelectorAll("rect, polyline[stroke-width]")]
      .filter(shape => shape.getBoundingClientRect().width > 1);
    return {name, width: paper.width, height: paper.height, drawn: drawn.length};
  });
  const figures = document.querySelectorAll("details");
  figures.forEach(figure => figure.open = true);
  wide("opened");
  const shown = [...figures].filter(figure => figure.getBoundingClientRect().height > 20).length;
  const found = {wrong, plots, figures: figures.length, shown, title: document.title};
  const paper = document.createElement("pre");
  paper.id = "found";
  paper.textContent = JSON.stringify(found);
  document.body.append(paper);
});
</script>
"""


def opened(page: Path, width: int) -> dict[str, Any]:
    """What the browser found in the page, in a window this wide."""
    copy = page.with_name("asked.html")
    copy.write_text(page.read_text().replace("</title>", f"</title>{QUESTIONS}", 1))
    # The page is ours and nothing is fetched; root, as which machines of tests run, has no sandbox to give.
    command = [BROWSER, "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_in_a_browser(
    gpuyard: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    monkeypatch.setattr(sizing, "today", lambda: "2026-11-29")
    page = tmp_path / "plan.html"
    code, _, err = gpuyard("plan", PROJECT / "fleets/prod.yaml", "--html", page)
    assert code == 0, err
    found = opened(page, width)
    assert found["wrong"] == []
    assert found["title"] == "Plan of prod"
    assert found["figures"] == found["shown"] > 50
    kinds = [plot["name"].partition(" ")[0] for plot in found["plots"]]
    assert kinds.count("memory") >= 1 and kinds.count("USD") == 2 * kinds.count("memory")
    for plot in found["plots"]:
        assert plot["width"] > 0.6 * min(width, 736) and plot["height"] > 30 and plot["drawn"] >= 1, plot


def test_the_questions_find_what_is_wrong(tmp_path: Path) -> None:
    """A page that is too wide, lacks a picture, fails and draws outside of its plot: each is told."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><title>bad</title><body><div style='width: 3000px'>wide</div>"
        "<p style='width: 9px'>incomprehensible</p>"
        "<img src='gone.png'><svg viewBox='0 0 100 60' width='100' aria-label='plot'>"
        "<text x='90' y='20'>too long</text>"
        "<text x='10' y='20'>one</text><text x='12' y='20'>over</text></svg><script>nothing()</script></body>"
    )
    found = opened(page, 1280)
    told = "\n".join(found["wrong"])
    signs = ("closed: 3", "cut off: incompr", "outside of its plot", "one over the other", "Uncaught", "error: <img")
    for sign in signs:
        assert sign in told, (sign, told)

"""A page in a headless browser: what it looks like, and what it does wrong."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCHEMES = {"dark": 0, "light": 1}  # as Blink numbers them

# Every frame holds the page at one width. A figure shows one of its drawings; a text neither leaves its drawing nor lies on another
# text; an element is wider than the page only where it scrolls by itself.
MEASURE = """
<body><pre id="found"></pre><script>
const page = PAGE, widths = WIDTHS, found = [];
function touch(a, b) {
  return a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
}
function look(frame, width) {
  const view = frame.contentDocument, root = view.documentElement;
  const say = (what, element) => found.push(`${width}: ${what} ${(element.textContent || element.outerHTML).trim().slice(0, 60)}`);
  if (root.scrollWidth > root.clientWidth) say(`${root.scrollWidth} wide`, view.querySelector("title"));
  for (const element of view.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    if (box.width && box.right > width + 0.5 && !element.closest(".scroll > *")) say("beyond the edge:", element);
  }
  for (const figure of view.querySelectorAll("figure")) {
    const drawings = [...figure.querySelectorAll("svg")].filter(drawing => drawing.getBoundingClientRect().width);
    if (drawings.length != 1) say(`${drawings.length} drawings:`, figure);
  }
  for (const drawing of view.querySelectorAll("svg")) {
    const outer = drawing.getBoundingClientRect();
    if (!outer.width) continue;
    const texts = [...drawing.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
    texts.forEach(([text, box], place) => {
      if (parseFloat(getComputedStyle(text).fontSize) * outer.width / drawing.viewBox.baseVal.width < 9) say("small text:", text);
      if (box.left < outer.left - 1 || box.right > outer.right + 1 || box.top < outer.top - 2 || box.bottom > outer.bottom + 2)
        say("out of its drawing:", text);
      for (const [other, second] of texts.slice(place + 1)) if (touch(box, second)) say(`on "${other.textContent}":`, text);
    });
  }
  const loaded = frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name);
  if (loaded.length) found.push(`${width}: loads ${loaded}`);
}
const frames = widths.map(width => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.style.border = 0; frame.srcdoc = page;
  document.body.append(frame);
  return frame;
});
window.onload = () => {
  frames.forEach((frame, place) => look(frame, widths[place]));
  document.getElementById("found").textContent = "seen" + JSON.stringify(found);
};
</script></body>
"""


def needs_chromium() -> None:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here to look at the page with")


def chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With a profile of its own."""
    needs_chromium()
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    command = [str(CHROMIUM), *quiet, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


def faults(page: str, widths: list[int], folder: Path) -> list[str]:
    """What is wrong with a page at each width, and what its console says."""
    wrapper = folder / "wrapper.html"
    text = json.dumps(page).replace("</", "<\\/")
    wrapper.write_text(MEASURE.replace("PAGE", text, 1).replace("WIDTHS", json.dumps(widths), 1), encoding="utf-8")
    done = chromium(folder, "--dump-dom", wrapper.as_uri())
    seen = re.search(r'<pre id="found">seen(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, done.stderr
    return json.loads(html.unescape(seen[1])) + re.findall(r"CONSOLE.*", done.stderr)


def screenshot(page: Path, scheme: str, width: int, height: int) -> Path:
    target = page.with_name(f"{scheme}-{width}.png")
    shown = (f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--window-size={width},{height}")
    chromium(page.parent, *shown, f"--screenshot={target}", page.as_uri())
    return target

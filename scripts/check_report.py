#!/usr/bin/env python3
"""Open a run's report in headless Chromium and fail on anything a reader would trip over.

    python scripts/check_report.py RUN_DIR [--screenshots FOLDER]

Checked at phone and desktop width, in light and dark: no script error, no console error, no
horizontal scrolling, nothing loaded from anywhere, enough contrast between text and ground, charts
with text alternatives, unique ids. Exit code 1 on a finding, 4 when Chromium is missing.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = (390, 1600)
SCHEMES = {"light": 1, "dark": 0}  # values of Chromium's preferredColorScheme setting
BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 600
MARK = "llmcompress-check"

# runs before the page's own script, so that it also sees early errors
WATCH = """<script>
window.__errors = [];
window.addEventListener("error", function (e) {
  window.__errors.push(String(e.message || e.target && e.target.src));
}, true);
["error", "warn"].forEach(function (kind) {
  var old = console[kind];
  console[kind] = function () {
    window.__errors.push(Array.prototype.join.call(arguments, " "));
    old.apply(console, arguments);
  };
});
</script>"""

MEASURE = """<script>
window.addEventListener("load", function () {
  function channels(text) {
    var m = text.match(/rgba?\\(([^)]+)\\)/);
    return m ? m[1].split(/[ ,/]+/).map(Number) : null;
  }
  function luminance(c) {
    var l = c.slice(0, 3).map(function (v) { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2];
  }
  function ground(node) {
    for (; node; node = node.parentElement) {
      var c = channels(getComputedStyle(node).backgroundColor);
      if (c && (c.length < 4 || c[3] > 0.99)) return c;
    }
    return [255, 255, 255];
  }
  function pointer(type) {
    var target = document.querySelector(".plot [data-tip]");
    if (!target) return;
    target.dispatchEvent(new PointerEvent(type, { bubbles: true, clientX: 20, clientY: 20 }));
  }
  var found = { width: window.innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, problems: window.__errors.slice() };
  var root = document.documentElement;
  function overflow(state) {
    if (root.scrollWidth <= root.clientWidth) return;
    var wide = [];
    document.querySelectorAll("body *").forEach(function (e) {
      if (e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".scroll, pre")) wide.push(e.tagName.toLowerCase() + "." + e.getAttribute("class"));
    });
    found.problems.push("the page scrolls sideways" + state + ": " + root.scrollWidth + " of " + root.clientWidth + " px; " + wide.slice(0, 4).join(", "));
  }
  overflow("");
  document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  overflow(" with tables open");
  var texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), node, low = {};
  while ((node = texts.nextNode())) {
    var parent = node.parentElement;
    if (!node.data.trim() || !parent.getClientRects().length || /^(SCRIPT|STYLE)$/.test(parent.tagName)) continue;
    var style = getComputedStyle(parent), color = channels(parent.closest("svg") ? style.fill : style.color);
    if (!color) continue;
    var a = luminance(color), b = luminance(ground(parent)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    var size = parseFloat(style.fontSize), needed = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    if (ratio < needed) low[parent.tagName + "." + parent.getAttribute("class")] = ratio.toFixed(2);
    if (parent.closest("svg")) {
      var box = parent.closest("svg").getBoundingClientRect(), scale = box.width / parent.closest("svg").viewBox.baseVal.width;
      if (size * scale < 9.5) found.problems.push("chart text of " + (size * scale).toFixed(1) + " px: " + node.data);
      var own = parent.getBoundingClientRect();
      if (own.right > root.clientWidth + 1 || own.left < -1) found.problems.push("chart text cut off: " + node.data);
    }
  }
  Object.keys(low).forEach(function (k) { found.problems.push("contrast " + low[k] + " of " + k); });
  document.querySelectorAll("svg").forEach(function (s) {
    var host = s.closest("[role=img]");
    if (!host || !host.getAttribute("aria-label")) found.problems.push("a chart without a text alternative");
  });
  var ids = {};
  document.querySelectorAll("[id]").forEach(function (e) { if (ids[e.id]) found.problems.push("id twice: " + e.id); ids[e.id] = 1; });
  document.querySelectorAll("a[href^='#']").forEach(function (a) { if (!document.getElementById(a.getAttribute("href").slice(1))) found.problems.push("link to nowhere: " + a.getAttribute("href")); });
  performance.getEntriesByType("resource").forEach(function (r) { found.problems.push("loads " + r.name); });
  pointer("pointermove");
  if (document.querySelector(".plot [data-tip]") && !document.getElementById("tip")) found.problems.push("tooltips do not appear");
  found.problems = found.problems.concat(window.__errors.slice(found.problems.length ? window.__errors.length : 0));
  window.parent.postMessage(found, "*");
});
</script>"""  # noqa: E501 - one statement per line reads better than wrapped JavaScript

# Chromium opens no window narrower than 500 px, so each width gets a frame of that width
HOST = """<!doctype html><html><head><meta name="color-scheme" content="light dark"><style>
body { margin: 0; } iframe { border: 0; height: 1200px; display: block; }
</style></head><body>FRAMES<script>
var found = [];
window.addEventListener("message", function (e) {
  found.push(e.data);
  if (found.length < document.querySelectorAll("iframe").length) return;
  var out = document.createElement("pre");
  out.id = "llmcompress-check";
  out.textContent = JSON.stringify(found);
  document.body.appendChild(out);
});
</script></body></html>"""


def find_chromium() -> str | None:
    """Path of a Chromium binary; ``CHROMIUM`` in the environment wins."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    return next((path for path in map(shutil.which, BINARIES) if path), None)


def browse(binary: str, page: Path, width: int, scheme: str, *extra: str) -> subprocess.CompletedProcess[str]:
    """Open ``page`` once, in a throw-away profile."""
    # processes of the browser may write into it for a moment after it has ended
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--virtual-time-budget=5000", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            f"--user-data-dir={profile}", f"--window-size={width},1400", *extra, page.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def instrument(source: str) -> str:
    """Put the watcher before and the measurements behind the page's own content."""
    return source.replace("<head>", "<head>" + WATCH, 1).replace("</body>", MEASURE + "</body>", 1)


def check(binary: str, report: Path, scheme: str) -> dict[int, list[str]]:
    """Problems of the report in one colour scheme, by width."""
    with tempfile.TemporaryDirectory() as folder:
        copy, host = Path(folder) / "report.html", Path(folder) / "host.html"
        copy.write_text(instrument(report.read_text(encoding="utf-8")), encoding="utf-8")
        frames = "".join(f'<iframe src="report.html" style="width:{width}px"></iframe>' for width in WIDTHS)
        host.write_text(HOST.replace("FRAMES", frames), encoding="utf-8")
        done = browse(binary, host, max(WIDTHS) + 40, scheme, "--dump-dom")
    match = re.search(rf'<pre id="{MARK}">(.*?)</pre>', done.stdout, re.DOTALL)
    if match is None:
        text = f"the page did not finish loading (chromium exit code {done.returncode})"
        return {width: [text] for width in WIDTHS}
    results: list[dict[str, Any]] = json.loads(html.unescape(match[1]))
    by_width = {result["width"]: result for result in results}
    found = {}
    for width in WIDTHS:
        if width not in by_width:
            found[width] = [f"nothing was measured at this width, only at {sorted(by_width)}"]
            continue
        found[width] = [str(problem) for problem in by_width[width]["problems"]]
        if by_width[width]["dark"] != (scheme == "dark"):
            found[width].append(f"the browser did not use the {scheme} colour scheme")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Check report.html of a run in headless Chromium.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--screenshots", type=Path, help="folder for a picture per width and colour scheme")
    options = parser.parse_args()
    report = (options.run_dir if options.run_dir.is_file() else options.run_dir / "report.html").resolve()
    if not report.is_file():
        print(f"{report}: no report\nnext: llmcompress report {options.run_dir}", file=sys.stderr)
        return 1
    binary = find_chromium()
    if binary is None:
        print("Chromium is not installed\nnext: apt-get install chromium, or set CHROMIUM to it", file=sys.stderr)
        return 4
    failed = False
    for scheme in SCHEMES:
        for width, problems in check(binary, report, scheme).items():
            print(f"{width} px, {scheme}: {'ok' if not problems else f'{len(problems)} problems'}")
            for problem in dict.fromkeys(problems):
                print(f"  {problem}")
            failed = failed or bool(problems)
            if options.screenshots:
                options.screenshots.mkdir(parents=True, exist_ok=True)
                picture = (options.screenshots / f"report_{width}_{scheme}.png").resolve()
                browse(binary, report, width, scheme, f"--screenshot={picture}")
                failed = failed or not picture.is_file()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

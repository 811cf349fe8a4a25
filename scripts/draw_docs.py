"""Draws the pictures of the documentation into docs/images.

python scripts/draw_docs.py                      # the diagrams
python scripts/draw_docs.py --terminal           # and what a terminal shows of the demo, which it runs for that
python scripts/draw_docs.py --report FOLDER      # and a screenshot of a conversion's report.html (needs Chromium)
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

from mla_convert.report.html.svg import Chart, linear

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STYLE = """<style>
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1c1f23; }
.small { font-size: 12.5px; fill: #5f6871; } .bold { font-weight: 650; }
.key { fill: #8b949c; } .value { fill: #b9bfc4; } .latent { fill: #0072b2; } .rotary { fill: #c35a00; }
.on { fill: #fff; } .box { fill: none; stroke: #8b949c; stroke-width: 1.2; } .shade { fill: #8b949c; fill-opacity: .16; }
.line { stroke: #8b949c; stroke-width: 1.4; fill: none; } .grid { stroke: #e3e5e6; } .head { fill: #8b949c; stroke: none; }
.r { stroke: #c35a00; stroke-width: 2.2; fill: none; } .l { stroke: #0072b2; stroke-width: 2.2; fill: none; }
.d { stroke: #8b949c; stroke-width: 2; stroke-dasharray: 5 4; fill: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7e9ea; } .small { fill: #9aa4ac; } .latent { fill: #56b4e9; } .rotary { fill: #e69f00; } .on { fill: #15181b; }
  .key { fill: #7d868e; } .value { fill: #565e65; } .grid { stroke: #2b3035; } .r { stroke: #e69f00; } .l { stroke: #56b4e9; }
}
</style>"""


def save(figure: Chart, name: str) -> None:
    """Write a figure as a file of its own, with its colours."""
    start, end = str(figure).split(">", 1)
    (IMAGES / name).write_text(f"{start}>{STYLE}{end}\n", encoding="utf-8")


def box(figure: Chart, x: float, y: float, width: float, height: float, css: str, *lines: str, on: bool = True) -> None:
    """A box with centred lines of words."""
    figure.add("rect", css, x=x, y=y, width=width, height=height, rx=3)
    for index, line in enumerate(lines):
        middle = y + height / 2 + 5 + (index - (len(lines) - 1) / 2) * 17
        style = ("on " if on else "") + ("bold" if index == 0 else "")
        figure.text(x + width / 2, middle, line, style.strip(), "middle")


def arrow(figure: Chart, *points: tuple[float, float]) -> None:
    """A line through points with a head at its end."""
    figure.path(points, "line")
    (x0, y0), (x1, y1) = points[-2:]
    angle = math.atan2(y1 - y0, x1 - x0)
    corners = [(x1 + 3 * math.cos(angle), y1 + 3 * math.sin(angle))]
    corners += [(x1 - 8 * math.cos(angle + turn), y1 - 8 * math.sin(angle + turn)) for turn in (0.42, -0.42)]
    figure.add("path", "head", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "Z")


def draw_cache() -> None:
    """From keys and values of all heads to a latent and a rotary key."""
    figure = Chart(760, 330, "From keys and values to a latent", "Keys of all heads are split into complex planes. Planes that "
                    "would lose most stay rotary and form the rotary key. The rest, with the mean of their rotation, and the "
                    "values share one latent.")  # fmt: skip
    figure.text(0, 18, "what one token leaves in one layer's cache", "small")
    figure.text(0, 52, "before", "bold")
    for head in range(4):
        x = head * 150
        box(figure, x, 62, 70, 34, "key", f"key {head + 1}")
        box(figure, x + 72, 62, 70, 34, "value", f"value {head + 1}", on=False)
    figure.text(608, 84, "2 · heads · width", "small")
    figure.text(170, 132, "keys, as planes by rotary frequency", "small")
    kept = {0, 1, 2, 4, 5, 9}
    for plane in range(16):
        css = "rotary" if plane in kept else "latent"
        figure.add("rect", css, x=170 + plane * 22, y=140, width=19, height=30, rx=2)
    figure.text(170, 188, "fast", "small")
    figure.text(170 + 16 * 22 - 3, 188, "slow", "small", "end")
    figure.text(564, 153, "stay rotary", "small")
    figure.text(564, 170, "rotation replaced by its mean", "small")
    figure.add("rect", "rotary", x=546, y=143, width=11, height=11, rx=2)
    figure.add("rect", "latent", x=546, y=160, width=11, height=11, rx=2)
    arrow(figure, (485, 98), (485, 132))
    arrow(figure, (230, 176), (230, 214), (508, 214), (508, 252))
    arrow(figure, (400, 176), (400, 232), (260, 232), (260, 252))
    arrow(figure, (107, 98), (107, 252))
    figure.text(116, 246, "values", "small")
    figure.text(0, 274, "after", "bold")
    box(figure, 60, 258, 360, 38, "latent", "latent: rank numbers")
    box(figure, 424, 258, 170, 38, "rotary", "rotary key")
    figure.text(
        0,
        322,
        "One latent serves content and values: the best of its rank for the attention output, as tokens are really looked at.",
        "small",
    )
    save(figure, "cache.svg")


def draw_plane() -> None:
    """What a plane's score is with its rotation, with none, and with the mean of it."""
    figure = Chart(760, 300, "One plane with and without its rotation", "Score of one plane over distance: with rotation a "
                    "cosine; without, constant; with the mean rotation, a lower constant that is right on average over the "
                    "distances at which the head attends.")  # fmt: skip
    left, right, top, bottom = 60, 520, 24, 250
    x, y = linear((0, 48), (left, right)), linear((-1.15, 1.15), (bottom, top))
    omega, decay = 0.09, 14.0
    weights = [math.exp(-distance / decay) for distance in range(49)]
    mean = sum(w * math.cos(omega * d) for d, w in enumerate(weights)) / sum(weights)
    for value in (-1, 0, 1):
        figure.line(left, y(value), right, y(value), "grid")
        figure.text(left - 8, y(value) + 5, f"{value}", "small", "end")
    outline = [(x(0), bottom), *((x(d), bottom - 92 * w) for d, w in enumerate(weights)), (x(48), bottom)]
    figure.add("path", "shade", d="M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in outline) + "Z")
    figure.path([(x(d / 2), y(math.cos(omega * d / 2))) for d in range(97)], "r")
    figure.path([(x(0), y(1)), (x(48), y(1))], "d")
    figure.path([(x(0), y(mean)), (x(48), y(mean))], "l")
    figure.text(right + 12, y(math.cos(omega * 48)) - 2, "with its rotation: exact,", "bold")
    figure.text(right + 12, y(math.cos(omega * 48)) + 16, "and a plane in the rotary key")
    figure.text(right + 12, y(1) + 5, "rotation left out")
    figure.text(right + 12, y(mean) - 4, "its mean: right on average,", "bold")
    figure.text(right + 12, y(mean) + 14, "and nothing extra to cache")
    figure.text(x(0.6), bottom - 8, "how often the head attends there", "small")
    figure.text((left + right) / 2, bottom + 32, "distance between query and key, tokens", "small", "middle")
    for distance in (0, 12, 24, 36, 48):
        figure.text(x(distance), bottom + 15, str(distance), "small", "middle")
    figure.text(16, (top + bottom) / 2, "score of the plane", "small", "middle", turn=True)
    save(figure, "plane.svg")


def draw_decode() -> None:
    """Decoding reads the latent itself."""
    figure = Chart(760, 262, "Decoding on the latent", "The query's content part is carried into the space of the latent, the "
                    "rotary part is rotated as always. Attention runs on the cached latent and rotary key, and the output is "
                    "carried back to the heads' values.")  # fmt: skip
    box(figure, 0, 20, 130, 44, "box", "hidden state", on=False)
    box(figure, 190, 0, 190, 40, "box", "query, content part", "× key up-projection", on=False)
    box(figure, 190, 54, 190, 40, "box", "query, rotary part", "rotated", on=False)
    arrow(figure, (132, 34), (184, 20))
    arrow(figure, (132, 50), (184, 74))
    box(figure, 440, 14, 150, 66, "box", "attention", "as with one kv head", on=False)
    arrow(figure, (382, 20), (434, 36))
    arrow(figure, (382, 74), (434, 58))
    box(figure, 634, 14, 126, 66, "box", "× value up", "× output", on=False)
    arrow(figure, (592, 47), (628, 47))
    for row in range(3):
        y = 148 + row * 30
        figure.add("rect", "latent", x=390, y=y, width=170, height=24, rx=2)
        figure.add("rect", "rotary", x=563, y=y, width=58, height=24, rx=2)
    figure.text(475, 165, "latent", "on bold", "middle")
    figure.text(592, 165, "rotary", "on bold", "middle")
    figure.text(380, 165, "token 1", "small", "end")
    figure.text(380, 195, "token 2", "small", "end")
    figure.text(380, 225, "token 3", "small", "end")
    figure.text(505, 256, "the cache: all that is read for each new token", "small", "middle")
    arrow(figure, (515, 142), (515, 86))
    figure.text(0, 130, "Few query tokens: attend on the latent.", "bold")
    figure.text(0, 152, "Many (a prompt): expand keys and")
    figure.text(0, 172, "values once, and use the library's")
    figure.text(0, 192, "attention. Both give the same numbers.")
    save(figure, "decode.svg")


def draw_terminal() -> None:
    """A real run of the demo and of a plan, as a terminal shows them."""
    from rich.console import Console

    from mla_convert import ConvertConfig, convert
    from mla_convert.core.progress import Progress
    from mla_convert.core.settings import build_config
    from mla_convert.report.tables import print_summary

    console = Console(record=True, width=124, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        console.print("[bold green]$[/] mla-convert demo")
        config = build_config({"source": "demo"})
        report = convert(ConvertConfig(**config.model_dump()), Progress(quiet=True))
        print_summary(report, console)
        command = "gate demo-mla --max-ppl-ratio 1.05 --min-kv-saving 50% --from-report"
        console.print(f"[bold green]$[/] mla-convert {command}", highlight=False)
        from mla_convert.cli import gate
        from mla_convert.evaluate.gate import Limits, run_gate

        verdict = run_gate("demo-mla", Limits(max_ppl_ratio=1.05, min_kv_saving=0.5), from_report=True)
        gate.print_verdict(verdict, console=console)
    svg = console.export_svg(title="mla-convert", font_aspect_ratio=0.61)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they would come from a server
    (IMAGES / "terminal.svg").write_text(svg, encoding="utf-8")


def shoot_report(folder: Path) -> None:
    """The top of a report's page, as Chromium on a desktop draws it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or sys.exit("no chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": 900, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((folder / "report.html").resolve().as_uri())
        height = browser.execute_script("return document.querySelectorAll('h2')[3].getBoundingClientRect().top") - 24
        clip = {"x": 0, "y": 0, "width": 900, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        (IMAGES / f"report-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    browser.quit()


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terminal", action="store_true")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for draw in (draw_cache, draw_plane, draw_decode):
        draw()
    if options.terminal:
        draw_terminal()
    if options.report:
        shoot_report(options.report)


if __name__ == "__main__":
    main()

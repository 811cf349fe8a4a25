"""Draw the pictures of the documentation into docs/images, for light and for dark pages. Needs matplotlib (extra `docs`).

python scripts/draw_docs.py                      # the charts, from benchmarks/results, and the diagrams
python scripts/draw_docs.py --terminal           # and the output of the demo in a terminal; this converts the demo model
python scripts/draw_docs.py --report FOLDER      # and a screenshot of a conversion's report.html (needs Chromium)
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from make_results_tables import RESULTS, read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).parents[1] / "docs" / "images"
# Okabe and Ito's colours, which people with any colour vision tell apart; lighter ones on a dark page.
PALETTES = {
    "light": dict(page="#ffffff", ink="#1c1f23", soft="#5f6871", line="#8b949c", grid="#e3e5e6", on="#ffffff", key="#8b949c",
                  value="#b9bfc4", latent="#0072b2", rotary="#c35a00", healed="#00835f"),
    "dark": dict(page="#0d1117", ink="#e7e9ea", soft="#9aa4ac", line="#8b949c", grid="#2b3035", on="#15181b", key="#7d868e",
                 value="#565e65", latent="#56b4e9", rotary="#e69f00", healed="#2fc79a"),
}  # fmt: skip
TERMINAL_WIDTH = 100
TRADE_SOURCES = ("quality-bits-refined.csv", "speed-vllm-plugin.csv", "quality-quantised-cache-smollm2.csv")


def digest(*names: str) -> str:
    """The checksum of results files that a chart is stamped with, so that a test finds a stale chart."""
    return hashlib.sha256(b"".join((RESULTS / name).read_bytes() for name in names)).hexdigest()[:16]


@contextlib.contextmanager
def figure(name: str, size: tuple[float, float], palette: dict[str, str], source: str = "") -> Iterator[Figure]:
    """Make a figure and save it as `name`; `size` is in points. Text becomes paths, so that every browser shows the same."""
    import matplotlib
    from matplotlib.figure import Figure as MplFigure

    # With a fixed salt and no date the same data give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "mla_convert", "font.family": "DejaVu Sans", "font.size": 11}):
        made = MplFigure(figsize=(size[0] / 72, size[1] / 72), facecolor=palette["page"])
        yield made
        metadata = {"Date": None, "Creator": None, **({"Source": source} if source else {})}
        made.savefig(IMAGES / name, format="svg", metadata=metadata)


class Canvas:
    """A drawing surface in points, with the origin at the top left."""

    def __init__(self, figure: Figure, size: tuple[float, float], palette: dict[str, str]) -> None:
        """Cover `figure`, which is `size` points wide and high, with one axis without frame."""
        self.palette = palette
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
        self.axes.set_axis_off()

    def text(
        self, x: float, y: float, words: str, colour: str = "soft", weight: str = "normal", align: str = "left"
    ) -> None:
        """One line of text with its baseline at `y`."""
        self.axes.text(x, y, words, color=self.palette[colour], weight=weight, ha=align, va="baseline",
                       size=12 if weight == "bold" or colour == "ink" else 10.5)  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, colour: str, *lines: str) -> None:
        """A box, filled unless its colour is `line`, with centred lines of text of which the first is bold."""
        from matplotlib.patches import FancyBboxPatch

        filled = colour != "line"
        shade = self.palette[colour]
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=3", fc=shade if filled else "none",
                                           ec="none" if filled else shade, lw=1.2))  # fmt: skip
        for index, line in enumerate(lines):
            middle = y + height / 2 + (index - (len(lines) - 1) / 2) * 16
            ink = "ink" if not filled or colour == "value" else "on"
            self.axes.text(x + width / 2, middle, line, color=self.palette[ink], ha="center", va="center", size=11,
                           weight="normal" if index else "bold")  # fmt: skip

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points with a head at its end."""
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=self.palette["line"], lw=1.4, solid_capstyle="butt")
        style = dict(arrowstyle="-|>", color=self.palette["line"], lw=1.4, shrinkA=0, shrinkB=0)
        self.axes.annotate("", points[-1], points[-2], arrowprops=style)


def plain(axes: Axes, palette: dict[str, str]) -> None:
    """Colours of a chart's frame, ticks and grid."""
    axes.set_facecolor(palette["page"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette["line"])
    axes.tick_params(colors=palette["soft"], labelsize=10)
    axes.xaxis.label.set_color(palette["soft"])
    axes.yaxis.label.set_color(palette["soft"])


def draw_quality(axes: Axes, palette: dict[str, str]) -> None:
    """KL against bytes of the cache: less rank, fewer bits, and both."""
    _, _, refined = read_results(RESULTS / TRADE_SOURCES[0])
    _, _, trained = read_results(RESULTS / TRADE_SOURCES[2])
    series = {
        "bits alone: the original, quantised cache": (refined, "original", "rotary", "D", "none"),
        "rank alone: bfloat16, refined": (trained, "mla_convert", "latent", "o", ":"),
        "rank alone: bfloat16, refined and healed": (trained, "mla_convert, healed", "latent", "s", "-"),
        "rank and bits, refined": (refined, "`--cache-dtype", "healed", "^", "-"),
    }
    for label, (rows, begin, colour, marker, line) in series.items():
        found = [row for row in rows if row["cache"].partition("`, ")[0].rstrip("`").startswith(begin)]
        if begin == "mla_convert":
            found = [row for row in found if row["cache"] == begin]
        points: dict[float, float] = {}  # of two at equal bytes, the better
        for row in found:
            share, kl = float(row["bytes"].rstrip("%")), float(row["KL"].split()[0])
            points[share] = min(kl, points.get(share, kl))
        axes.plot(
            *zip(*sorted(points.items()), strict=True), color=palette[colour], marker=marker, ls=line, lw=2, ms=6,
            label=label,
        )  # fmt: skip
    for row in refined:
        if row["cache"].startswith("original"):
            name = row["cache"].partition(" in ")[2].partition(",")[0] + (
                " +\nHadamard" if "Hadamard" in row["cache"] else ""
            )
            place = (float(row["bytes"].rstrip("%")), float(row["KL"].split()[0]))
            shift = {
                "INT4": (-30, -3),
                "INT4 +\nHadamard": (-4, -34),
                "INT3 +\nHadamard": (-22, 9),
                "FP8": (-26, -4),
            }.get(name, (7, -4))
            axes.annotate(name, place, shift, textcoords="offset points", color=palette["soft"], size=9)
    axes.set(xlim=(60, 8), ylim=(1e-4, 60), yscale="log", xlabel="bytes of the KV cache, % of bfloat16 (smaller →)")
    axes.set_title(
        "Quality: KL(original ‖ model), nats a token", loc="left", color=palette["ink"], size=12, weight="bold", pad=22
    )
    axes.text(0, 1.03, "SmolLM2-135M-Instruct, WikiText-2; lower is better", transform=axes.transAxes, color=palette["soft"],
              size=9.5)  # fmt: skip
    axes.grid(axis="y", color=palette["grid"])
    axes.legend(frameon=False, labelcolor=palette["ink"], fontsize=9.5, loc="upper left")
    plain(axes, palette)


def draw_throughput(axes: Axes, palette: dict[str, str]) -> None:
    """Speed in vLLM's plugin over that of the original with a bfloat16 cache."""
    _, columns, rows = read_results(RESULTS / TRADE_SOURCES[1])
    work = {
        "decode, batch 32\nat 16k tokens": columns[6],
        "decode, one user\nat 127k tokens": columns[5],
        "decode, one user\nat 16k tokens": columns[4],
        "prompt\nof 16k tokens": columns[2],
    }
    bars = {
        "original, FP8 cache": "rotary",
        "converted with `--nope-dim 64`, plugin": "latent",
        "converted, int4": "healed",
    }
    labels = ("original, FP8", "converted, bfloat16, 64 + 64 a head", "converted, int4")
    back = dict(boxstyle="square,pad=0.1", fc=palette["page"], ec="none")
    for group, column in enumerate(work.values()):
        base = float(rows[0][column])
        for place, ((served, colour), label) in enumerate(zip(bars.items(), labels, strict=True)):
            speed = float(next(row for row in rows if row["served"].startswith(served))[column].split()[0]) / base
            x = group + (place - 1) * 0.27
            axes.bar(x, speed, 0.25, color=palette[colour], label=label if group == 0 else None)
            axes.text(x, speed + 0.04, f"{speed:.2f}", ha="center", color=palette["soft"], size=9, bbox=back)
    axes.axhline(1, color=palette["line"], lw=1.2, ls=(0, (4, 3)))
    axes.set(xticks=range(len(work)), xticklabels=list(work), ylim=(0, 2.9))
    axes.set_title("Speed: tokens/s ÷ the original's", loc="left", color=palette["ink"], size=12, weight="bold", pad=22)
    axes.text(0, 1.03, "vLLM 0.26 with the plugin, H200, Llama-3-8B shape, 512 + 64; higher is better", transform=axes.transAxes,
              color=palette["soft"], size=9.5)  # fmt: skip
    axes.legend(frameon=False, labelcolor=palette["ink"], fontsize=10, loc="upper right")
    plain(axes, palette)


def draw_trade(name: str, palette: dict[str, str]) -> None:
    """The measured trade: quality against bytes, and decode speed."""
    source = f"{', '.join(TRADE_SOURCES)} sha256 {digest(*TRADE_SOURCES)}"
    with figure(name, (880, 330), palette, source) as page:
        left, right = page.subplots(1, 2)
        page.subplots_adjust(left=0.05, right=0.985, top=0.83, bottom=0.16, wspace=0.13)
        draw_quality(left, palette)
        draw_throughput(right, palette)


def draw_cache(name: str, palette: dict[str, str]) -> None:
    """From keys and values of all heads to a latent and a rotary key."""
    size = (760, 330)
    with figure(name, size, palette) as page:
        canvas = Canvas(page, size, palette)
        canvas.text(0, 18, "cache of one token in one layer")
        canvas.text(0, 52, "before", "ink", "bold")
        for head in range(4):
            canvas.box(head * 150, 62, 70, 34, "key", f"key {head + 1}")
            canvas.box(head * 150 + 72, 62, 70, 34, "value", f"value {head + 1}")
        canvas.text(608, 84, "2 · heads · width")
        canvas.text(170, 132, "keys, as planes by rotary frequency")
        for plane in range(16):
            canvas.box(170 + plane * 22, 140, 19, 30, "rotary" if plane in {0, 1, 2, 4, 5, 9} else "latent")
        canvas.text(170, 188, "fast")
        canvas.text(519, 188, "slow", align="right")
        canvas.box(546, 143, 11, 11, "rotary")
        canvas.box(546, 160, 11, 11, "latent")
        canvas.text(564, 153, "stay rotary")
        canvas.text(564, 170, "rotation replaced by its mean")
        canvas.arrow((485, 98), (485, 134))
        canvas.arrow((230, 174), (230, 214), (508, 214), (508, 254))
        canvas.arrow((400, 174), (400, 232), (260, 232), (260, 254))
        canvas.arrow((107, 98), (107, 254))
        canvas.text(116, 246, "values")
        canvas.text(0, 281, "after", "ink", "bold")
        canvas.box(60, 258, 360, 38, "latent", "latent: rank numbers")
        canvas.box(424, 258, 170, 38, "rotary", "rotary key")
        canvas.text(0, 322, "One latent serves content keys and values: the best of its rank for the attention output.")


def draw_plane(name: str, palette: dict[str, str]) -> None:
    """The score of one plane over distance: with its rotation, with none, and with the mean rotation."""
    omega, decay = 0.09, 14.0
    distances = [step / 2 for step in range(97)]
    weights = [math.exp(-distance / decay) for distance in range(49)]
    mean = sum(w * math.cos(omega * d) for d, w in enumerate(weights)) / sum(weights)
    with figure(name, (760, 310), palette) as page:
        axes = page.add_axes((0.08, 0.17, 0.6, 0.78))
        plain(axes, palette)
        axes.fill_between(range(49), -1.15, [-1.15 + 0.9 * w for w in weights], color=palette["line"], alpha=0.2, lw=0)
        axes.plot(distances, [math.cos(omega * d) for d in distances], color=palette["rotary"], lw=2.2)
        axes.plot((0, 48), (1, 1), color=palette["line"], lw=2, ls=(0, (4, 3)))
        axes.plot((0, 48), (mean, mean), color=palette["latent"], lw=2.2)
        axes.text(0.6, -1.11, "how often the head attends there", color=palette["soft"], size=9.5)
        axes.set(xlim=(0, 48), ylim=(-1.15, 1.15), xticks=range(0, 49, 12), yticks=(-1, 0, 1),
                 xlabel="distance between query and key, tokens", ylabel="score of the plane")  # fmt: skip
        axes.grid(axis="y", color=palette["grid"])
        for y, first, second in ((1, "rotation left out", ""), (mean, "mean rotation:", "right on average, no cache of its own"),
                                 (math.cos(omega * 48), "with its rotation:", "exact, cached in the rotary key")):  # fmt: skip
            axes.text(49, y, first, color=palette["ink"], size=11, weight="bold", va="center")
            axes.text(49, y - 0.17, second, color=palette["soft"], size=10, va="center")


def draw_decode(name: str, palette: dict[str, str]) -> None:
    """Decoding attends to the cached latent."""
    size = (760, 262)
    with figure(name, size, palette) as page:
        canvas = Canvas(page, size, palette)
        canvas.box(2, 22, 130, 44, "line", "hidden state")
        canvas.box(190, 2, 190, 40, "line", "query, content part", "× key up-projection")
        canvas.box(190, 56, 190, 40, "line", "query, rotary part", "rotated")
        canvas.arrow((134, 36), (188, 22))
        canvas.arrow((134, 52), (188, 76))
        canvas.box(440, 16, 150, 66, "line", "attention", "as with one kv head")
        canvas.arrow((382, 22), (438, 38))
        canvas.arrow((382, 76), (438, 60))
        canvas.box(634, 16, 124, 66, "line", "× value up", "× output")
        canvas.arrow((592, 49), (632, 49))
        for row in range(3):
            y = 148 + row * 30
            canvas.box(390, y, 170, 24, "latent", *(["latent"] if row == 0 else []))
            canvas.box(563, y, 58, 24, "rotary", *(["rotary"] if row == 0 else []))
            canvas.text(380, y + 16, f"token {row + 1}", align="right")
        canvas.text(505, 256, "the cache: all that is read for a new token", align="center")
        canvas.arrow((515, 144), (515, 84))
        canvas.text(0, 130, "Few query tokens: attend to the latent.", "ink", "bold")
        canvas.text(0, 152, "A prompt: expand keys and values once and")
        canvas.text(0, 170, "use the library's attention. Both give the")
        canvas.text(0, 188, "same numbers to rounding.")


DRAWINGS: dict[str, Callable[[str, dict[str, str]], None]] = {
    "trade": draw_trade,
    "cache": draw_cache,
    "plane": draw_plane,
    "decode": draw_decode,
}


def draw_terminal() -> None:
    """Run the demo and a gate, and draw the output as a terminal shows it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=TERMINAL_WIDTH, file=io.StringIO(), force_terminal=True)
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(TERMINAL_WIDTH), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for command in ("demo", "gate demo-mla --max-ppl-ratio 1.05 --min-kv-saving 50% --from-report"):
            console.print(f"[bold green]$[/] mla-convert {command}", highlight=False)
            done = subprocess.run([sys.executable, "-m", "mla_convert", *command.split()], cwd=folder, env=environment,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)  # fmt: skip
            console.print(Text.from_ansi(done.stdout))
    svg = console.export_svg(title="mla-convert", font_aspect_ratio=0.61)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # the fonts would come from a server
    (IMAGES / "terminal.svg").write_text(svg, encoding="utf-8")


def shoot_report(folder: Path) -> None:
    """Photograph the top of a report's page in Chromium, light and dark."""
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
    """Draw the pictures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terminal", action="store_true")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        for scheme, palette in PALETTES.items():
            draw(f"{name}-{scheme}.svg", palette)
    if options.terminal:
        draw_terminal()
    if options.report:
        shoot_report(options.report)


if __name__ == "__main__":
    main()

"""report.html holds the report in one file; a real browser opens it where there is one."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mla_convert.core.report_schema import parse_report
from mla_convert.report.html import svg
from mla_convert.report.html.page import page_text, write_page

INPUT = 4
SECTIONS = ("The cache", "Perplexity", "Which planes stayed rotary", "Layer by layer", "Time and memory", "Details")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def report(convert_pico):
    return json.loads((convert_pico("llama", rank=10, rope_dim=6, refine_steps=2).out / "report.json").read_text())


def page(content):
    return page_text(parse_report(content))


def figures(html):
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]


def labels(html):
    return [figure.get("aria-label").partition(".")[0] for figure in figures(html)]


class Tags(HTMLParser):
    """Collects the addresses of a page; fails on scripts and on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.addresses = [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "poster")]
        assert tag != "script"
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_conversion_has_one(convert_pico):
    out = convert_pico("llama", rank=10, rope_dim=6, refine_steps=2).out
    html = (out / "report.html").read_text()
    assert html == page(json.loads((out / "report.json").read_text()))
    assert all(f"<h2>{section}</h2>" in html for section in SECTIONS)


def test_page_loads_nothing(report):
    html = page(report)
    assert Tags(html).addresses == ["data:,"]  # the icon, which is none
    assert "@import" not in html and "url(" not in html


def test_plots(report):
    found = labels(page(report))
    wanted = ["Numbers cached per token and layer", "KV cache of one sequence", "Perplexity", "Planes that stayed rotary",
              "Energy kept per layer", "Relative error per layer", "Relative error per layer", "Time and memory"]  # fmt: skip
    assert found == [name for name in wanted for _ in range(2)]  # for a desktop and for a phone


def marks(html, label, css):
    wide = next(figure for figure in figures(html) if figure.get("aria-label").startswith(label))
    return [element for element in wide if element.get("class", "").split()[:1] == [css] and len(element)]


def test_plots_show_the_values(report):
    html = page(report)
    kept = {(layer["layer"], frequency) for layer in report["layers"] for frequency in layer["plane_frequencies"]}
    titles = [mark[0].text for mark in marks(html, "Planes", "plane")]
    assert {tuple(map(int, re.findall(r"\d+", title)[:2])) for title in titles} == kept
    errors = [mark[0].text for mark in marks(html, "Relative error", "after")]
    assert errors == [f"layer {layer['layer']}, refined: {layer['output_error']:.2e}" for layer in report["layers"]]
    assert f"×{report['evaluation']['ratio']:.3f}" in html
    assert f"−{report['cache']['share_saved']:.1%}" in html
    for side in ("before", "after"):
        assert f"{side}: {report['evaluation'][side]['value']:.3f}" in html


def test_every_shape_lies_inside_its_figure(report):
    for figure in figures(page(report)):
        width, height = (float(number) for number in figure.get("viewBox").split()[2:])
        for shape in figure.iter():
            for name, size in (
                ("x", width),
                ("cx", width),
                ("x1", width),
                ("y", height),
                ("cy", height),
                ("y2", height),
            ):
                assert 0 <= float(shape.get(name, 0)) <= size + 0.01, ElementTree.tostring(shape)
        for number in re.findall(r'="(nan|inf)"', ElementTree.tostring(figure, "unicode")):
            raise AssertionError(number)


def test_text_is_escaped(report):
    html = page({**report, "source": {**report["source"], "name": "<b>&model"}, "notes": ["<script>x</script>"]})
    Tags(html)
    assert "&lt;b&gt;&amp;model" in html and "<script>" not in html


def test_charts_number_the_layers_of_a_hybrid_as_its_model_does(report):
    hybrid = json.loads(json.dumps(report))
    for place, layer in enumerate(hybrid["layers"]):
        layer["layer"] = 4 * place + 3
    words = [title.text for figure in figures(page(hybrid)) for title in figure.iter() if title.tag.endswith("title")]
    numbered = {int(found) for text in words for found in re.findall(r"layer (\d+)[,:]", text or "")}
    assert numbered == {4 * place + 3 for place in range(len(hybrid["layers"]))}


def test_the_cache_in_words(report):
    plain = page(report)
    assert "in the cache of every layer, and now leaves 16, of 4 bytes each." in plain
    packed = json.loads(json.dumps(report))
    packed["cache"] |= {
        "bytes_per_number": 3.0,
        "latent_cache": {"version": 1, "kind": "int4", "group": 0, "rope": "fp8"},
    }
    assert "now leaves 16 in int4, packed in 48 bytes with their scales." in page(packed)
    hybrid = json.loads(json.dumps(report))
    hybrid["cache"] |= {
        "layers": 2,
        "fixed_bytes": 3000,
        "growing_share_at_context": {"4096": {"before": 0.9, "after": 0.8}},
    }
    words = page(hybrid)
    assert "in the cache of every layer with attention" in words and "The states of the other layers, 3.0 kB" in words
    assert "share of the whole that grows, 4k: 90.0% before, 80.0% after." in words


def test_layers_that_differ_are_drawn(report):
    layers = [{**layer, "kv_lora_rank": 8 + 2 * index} for index, layer in enumerate(report["layers"])]
    found = labels(page({**report, "layers": layers}))
    assert "Cache per layer" in found and "Cache per layer" not in labels(page(report))


def test_sections_that_other_commands_add(report):
    more = {
        "sweep": [{"numbers": n, "share": n / 32, "ratio": 1 + 3 / n, "stderr": 0.01} for n in (8, 16, 24)],
        "heal": {"curve": [{"tokens": 1e6 * n, "kl": 0.3 - 0.01 * n} for n in range(1, 6)]},
        "bench": {"device": "a card", "decode": [{"context": 8192, "before": 1000.0, "after": 2500.0}]},
    }
    html = page({**report, **more})
    for title in ("The frontier", "Healing", "Speed"):
        assert f"<h2>{title}</h2>" in html and f"<h2>{title}</h2>" not in page(report)
    assert "×2.50" in html and "perplexity ratio over cache" in html


@pytest.mark.parametrize(
    "change",
    [
        {
            "evaluation": {
                "text": "t",
                "protocol": "p",
                "before": {"value": None},
                "after": {"value": None},
                "ratio": None,
            }
        },
        {"sweep": [], "heal": {}, "bench": {}},
        {"layers": [{"layer": 0, "kv_lora_rank": 4, "qk_rope_head_dim": 0, "plane_frequencies": [], "energy": {}}]},
        {"phases": {"open": {"seconds": 0.0, "peak_host_bytes": 0}}},
    ],
)
def test_missing_values(report, change):
    html = page({**report, **change})
    Tags(html)
    assert figures(html)


def test_first_reports_can_be_drawn(report):
    """Version 0.1.0 did not report the shape of the original's attention."""
    source = {key: report["source"][key] for key in ("name", "revision", "model_type")}
    assert "Planes that stayed rotary" in labels(page({**report, "source": source}))


def test_command(convert_pico, cli, tmp_path):
    folder = shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted")
    expected = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert cli("report", folder) == (0, f"{folder / 'report.html'}\n", "")
    assert (folder / "report.html").read_text() == expected
    code, out, _ = cli("report", folder / "report.json", "--html", tmp_path / "x.html", "--json")
    assert code == 0 and json.loads(out) == json.loads((folder / "report.json").read_text())
    assert (tmp_path / "x.html").read_text() == expected


@pytest.mark.parametrize("content", [None, "{}", "[]", "{", '{"source": {"name": "x"}, "cache": 3}'])
def test_no_report(cli, tmp_path, content):
    if content:
        (tmp_path / "report.json").write_text(content)
    code, out, err = cli("report", tmp_path)
    assert code == INPUT and len(err.splitlines()) == 1 and "report" in err and not out
    assert not (tmp_path / "report.html").exists()


def test_page_imports_no_torch(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    code = (
        "import sys; from pathlib import Path; from mla_convert.report.html.page import write_page; "
        "write_page(Path(sys.argv[1]), Path(sys.argv[1]) / 'report.html'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (18.2, 40.7), (0.0012, 0.0013), (5.0, 5.0), (0, 131072)])
def test_ticks(low, high):
    found = svg.ticks(low, high)
    assert found and all(low <= mark <= high for mark in found) and found == sorted(set(found)) and len(found) <= 7


@pytest.mark.parametrize("layers", [1, 2, 6, 30, 32, 80, 126])
def test_layer_ticks(layers):
    found = svg.layer_ticks(layers)
    assert found[0] == 0 and found[-1] == layers - 1 and len(found) <= 10 and found == sorted(set(found))


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium with its driver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                     "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


COLOURS = """
const paint = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
return [paint('body', 'backgroundColor'), paint('svg text', 'fill')];
"""
SHOWN = """
return [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0)
  .map(s => [s.getAttribute('aria-label').split('.')[0], s.getBoundingClientRect().width,
             Math.min(...[...s.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))]);
"""


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium(browser, report, tmp_path, width, scheme):
    more = {"sweep": [{"numbers": n, "share": n / 32, "ratio": 1 + 3 / n, "stderr": 0.01} for n in (8, 16, 24)]}
    write_page(parse_report({**report, **more}), tmp_path / "report.html")
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.title == "source with Multi-head Latent Attention"
    shown = browser.execute_script(SHOWN)
    assert [name for name, *_ in shown] == labels(page({**report, **more}))[::2]
    for name, across, smallest in shown:
        assert 300 < across <= width and smallest >= 11, name  # it can be read
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper, ink = ([int(n) for n in re.findall(r"\d+", colour)[:3]] for colour in browser.execute_script(COLOURS))
    assert (sum(paper) > sum(ink)) == (scheme == "light") and abs(sum(paper) - sum(ink)) > 450
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert all(Path(url).name == "report.html" or url == "data:," for url in urls), urls

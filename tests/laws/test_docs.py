"""The documentation: it builds, its links and anchors exist, its commands are valid, its tables and charts match the results."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import typer.main
import yaml

from mla_convert.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS.rglob("*.md")])
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands


def page_name(page):
    return str(page.relative_to(ROOT))


def script(name, monkeypatch):
    """A module of scripts/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed (extra docs)")
def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    for name in ("pipeline.convert.convert", "publish.hub.push", "evaluate.gate.check", "core.errors.InputError"):
        assert f'id="mla_convert.{name}"' in api
    # nothing but links leads out: fonts, scripts and styles are the site's own
    for address in re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(\w+://[^"]+)', api):
        raise AssertionError(address)


def test_navigation_names_every_page_once_but_research_notes():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    nav = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert len(nav) == len(set(nav))
    assert set(nav) == {page for page in there if not page.startswith("research/")}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', text):
        target = "".join(target)
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 165 and not line.startswith(("<!--", "|"))] == []
    first_screens = "\n".join(lines[:35])
    assert "mla-convert demo" in first_screens and "bin/python -m pytest" in first_screens


def commands(text):
    """Command lines of mla-convert in a page's shell blocks, without comments and line ends."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.split(r"\n|&&|;", block):
            words = shlex.split(line.strip(), comments=True)
            if words and words[0].endswith("mla-convert"):
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_take_the_options_of_the_page(page):
    for words in commands(page.read_text(encoding="utf-8")):
        command = COMMANDS[words[0] if words[0] in COMMANDS else "convert"]
        known = {option for parameter in (*command.params, *GROUP.params) for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, words


def test_tables_are_those_of_the_results(monkeypatch):
    tables = script("make_results_tables", monkeypatch)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == tables.with_tables(text), f"{page}: python scripts/make_results_tables.py"
    shown = {match["name"] for page in PAGES for match in tables.TABLE.finditer(page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in tables.RESULTS.glob("*.csv")}


def test_results_state_their_conditions(monkeypatch):
    tables = script("make_results_tables", monkeypatch)
    for path in tables.RESULTS.glob("*.csv"):
        facts, columns, rows = tables.read_results(path)
        assert {"model", "machine", "version"} <= facts.keys(), path.name
        assert all(None not in row and None not in row.values() for row in rows), path.name
        assert len(set(columns)) == len(columns)


@pytest.mark.parametrize("path", sorted((DOCS / "images").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_need_nothing_else(path):
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.findall(r"""(?:href|src)="(?!#)|url\(["']?http|@import""", text)


def test_chart_is_drawn_from_the_results(monkeypatch):
    """The chart holds the checksum of its CSV files, as other versions of matplotlib draw other bytes."""
    draw = script("draw_docs", monkeypatch)
    for scheme in draw.PALETTES:
        assert draw.digest(*draw.TRADE_SOURCES) in (DOCS / "images" / f"trade-{scheme}.svg").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed (extra docs)")
def test_every_picture_can_be_drawn(tmp_path, monkeypatch):
    draw = script("draw_docs", monkeypatch)
    monkeypatch.setattr(draw, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw_docs.py"])
    draw.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}-{scheme}.svg" for name in draw.DRAWINGS for scheme in draw.PALETTES}
    assert drawn <= {path.name for path in (DOCS / "images").iterdir()}

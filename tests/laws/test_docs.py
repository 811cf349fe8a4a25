"""The documentation: it builds, its links lead somewhere, and what it tells people to type is what the program takes."""

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
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed (extra docs)")
def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("pipeline.convert", "hub.push", "gate.check", "errors.InputError"):
        assert f'id="mla_convert.{name}"' in api
    # nothing but links leads out: fonts, scripts and styles are the site's own
    for address in re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(\w+://[^"]+)', api):
        raise AssertionError(address)


def test_every_page_of_the_site_is_there():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    nav = re.findall(r"[\w-]+\.md", str(yaml.safe_load(text)["nav"]))
    assert len(nav) == len(set(nav)) and all((ROOT / "docs" / name).is_file() for name in nav)
    assert {"index.md", "quick-start.md", "how-it-works.md", "choosing-a-rank.md", "ci.md", "push.md", "format.md", "api.md",
            "faq.md", "exit-codes.md"} <= set(nav)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def commands(text):
    """Command lines of mla-convert in a page's shell blocks, comments and line ends taken off."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.split(r"\n|&&", block):
            words = shlex.split(line.strip(), comments=True)
            if words and words[0].endswith("mla-convert"):
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_what_the_page_says(page):
    for words in commands(page.read_text(encoding="utf-8")):
        command = COMMANDS[words[0] if words[0] in COMMANDS else "convert"]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, words


@pytest.mark.parametrize("name", ["cache.svg", "plane.svg", "decode.svg", "terminal.svg"])
def test_pictures_need_nothing_else(name):
    text = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.findall(r"""(?:href|src)="|url\(["']?http|@import""", text)


def test_diagrams_are_those_of_the_script(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("draw_docs", ROOT / "scripts" / "draw_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["draw_docs.py"])
    script.main()
    for drawn in tmp_path.iterdir():
        assert drawn.read_text() == (ROOT / "docs" / "images" / drawn.name).read_text(), drawn.name
    assert len(list(tmp_path.iterdir())) == 3

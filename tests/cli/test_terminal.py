"""Output on any console: signs may be lost, nothing fails; names are text, and control characters stay out of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pico
import pytest

from mla_convert.core.words import plain

OK, INPUT, RESOURCE, GONE = 0, 4, 5, 141
# Markup that closes, and that opens; signs of formats and options; control characters; letters and a change of direction.
NAMES = ["m[/b]", "-dash[red]:smile:#1", "50%{x}", "a\nb\tc\x1b[31md\x85e", "modèle\u202egnp"]


def small(text, out):
    return ("--calib", text, "--eval", text, "--calib-samples", 4, "--calib-length", 32, "--eval-windows", 1, "--eval-length", 32,
            "--refine-steps", 0, "--device", "cpu", "--uniform", "--out", out)  # fmt: skip


def run(*arguments, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "mla_convert", *map(str, arguments)], env=environment, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(pico.text(4000))
    return path


@pytest.mark.parametrize(
    ("command", "encoding"),
    [(command, encoding) for command in ("recipes", "--help") for encoding in ("ascii", "cp1252", "utf-16", "latin-1")]
    + [("plan", "cp1252")],
)
def test_any_encoding_of_the_console(encoding, command, sources):
    arguments = (command, sources("llama")) if command == "plan" else (command,)
    found = run(*arguments, env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, capture_output=True)
    assert found.returncode == OK and not found.stderr
    assert found.stdout.decode(encoding)


def test_a_conversion_on_an_ascii_console_is_finished(sources, text, tmp_path):
    """And the libraries that it uses print nothing."""
    found = run(
        sources("llama"), *small(text, tmp_path / "out"), "-q", env={"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert found.returncode == OK and (tmp_path / "out" / "report.json").is_file()
    assert b"->" in found.stdout and not found.stderr


def test_a_line_on_an_ascii_console(tmp_path):
    found = run("report", tmp_path / "modèle→", env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert found.returncode == INPUT and found.stderr.count(b"\n") == 1 and b"mod" in found.stderr


def test_closed_streams():
    for closed in (">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"):
        found = subprocess.run(["sh", "-c", f"{sys.executable} -m mla_convert recipes {closed}"], capture_output=True)
        assert found.returncode == OK and b"Traceback" not in found.stderr, closed


def test_nobody_reads():
    for command in ("recipes", "--help", "recipes --json"):
        read, write = os.pipe()
        os.close(read)
        found = run(*command.split(), stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert found.returncode == GONE and not found.stderr, command


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_disk_that_is_full_takes_no_output():
    with open("/dev/full", "w") as full:
        found = run("recipes", stdout=full, stderr=subprocess.PIPE)
    assert found.returncode == RESOURCE and found.stderr.count(b"\n") == 1 and b"Traceback" not in found.stderr


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text(name, cli, sources, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / name
    if "/" in name:
        source.parent.mkdir()
    shutil.copytree(sources("llama"), source)
    own = tmp_path / f"{Path(name).name}.txt"
    shutil.copy(text, own)
    out = tmp_path / f"{Path(name).name}-mla"
    results = {"convert": cli(source, *small(own, out)), "inspect": cli("inspect", source), "plan": cli("plan", source),
               "again": cli("inspect", out), "report": cli("report", out), "verify": cli("verify", out),
               "gate": cli("gate", out, "--from-report", "--max-ppl", "1e9")}  # fmt: skip
    for step, (code, printed, err) in results.items():
        assert code == OK, (step, err)
        assert not any((ord(sign) < 32 and sign not in "\n\t") or 127 <= ord(sign) < 160 for sign in printed + err), (
            step
        )
    for step in ("convert", "inspect", "plan"):
        assert plain(Path(name).name) in results[step][1].replace("\n", ""), step
    report = (out / "report.json").read_bytes().decode("utf-8")
    assert json.loads(report)["source"]["name"] == plain(Path(name).name)
    (out / "README.md").read_bytes().decode("utf-8")


def test_a_name_that_is_no_utf8(cli, sources, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, folder = (os.fsdecode(name) for name in (b"caf\xe9.txt", b"mod\xe8le"))
    try:
        shutil.copy(text, own)
    except OSError:
        pytest.skip("this file system has no such names")
    code, _, err = cli(sources("llama"), *small(f"./{own}", "out"))
    assert code == OK, err
    for file in ("report.json", "README.md", "recipe.yaml", "report.html"):
        found = (Path("out") / file).read_bytes().decode("utf-8")
        assert "caf\\xe9.txt" in found or "caf\\\\xe9.txt" in found, file
    # weights cannot lie there: the library that reads them takes no such names
    shutil.copytree(sources("llama"), folder)
    for arguments in ((f"./{folder}", *small(text, "other")), (sources("llama"), *small(text, f"./{folder}-mla"))):
        code, printed, err = cli(*arguments)
        assert code == INPUT and len(err.splitlines()) == 1 and "not UTF-8" in err and not printed
    assert not Path("other").exists() and not Path(f"{folder}-mla").exists()


PLACES = [("inspect", "~nosuchuser/m"), ("plan", "~nosuchuser/r.yaml"), ("gate", "~nosuchuser/m", "--max-ppl", 9),
          ("heal", "~nosuchuser/m"), ("inspect", "x" * 5000), ("eval", "~nosuchuser/m")]  # fmt: skip


@pytest.mark.parametrize("arguments", PLACES, ids=lambda words: words[0])
def test_places_that_cannot_be(cli, arguments):
    code, printed, err = cli(*arguments)
    assert code == INPUT and len(err.splitlines()) == 1 and not printed

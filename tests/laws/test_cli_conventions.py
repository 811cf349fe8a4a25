"""Conventions of every command: help with an example, --json, quiet and plain output, completion, a quick start."""

import json
import os
import re
import subprocess
import sys

import pytest
import typer.main

from mla_convert.cli.main import EXIT_CODES, app

COMMANDS = typer.main.get_command(app).commands
ESCAPE = "\x1b"


def run(*arguments, **env):
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")} | env
    command = [sys.executable, "-m", "mla_convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def flat(text):
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help(cli, name):
    code, out, err = cli(name, "--help")
    assert code == 0 and not err
    assert f"Example: mla-convert {'' if name == 'convert' else name}".rstrip() in flat(out)
    assert EXIT_CODES in flat(out)
    for option in ("--json", "--verbose"):
        assert option in out
    assert ("--quiet" in out) == (name not in ("recipes", "report"))  # those have nothing to be quiet about


def test_examples_parse():
    """Options of every example are options of its command."""
    for name, command in COMMANDS.items():
        example = command.epilog.partition("\n")[0]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", example)) <= known, name


def test_help_lists_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0 and all(re.search(rf"^│ {name} ", out, re.MULTILINE) for name in COMMANDS)


def test_help_imports_no_torch():
    code = (
        "import sys; from mla_convert.cli.main import main; sys.argv = ['mla-convert', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'yaml'} & sys.modules.keys()\n"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_names_what_a_bug_report_needs(cli):
    code, out, err = cli("--version")
    found = dict(line.split(" ", 1) for line in out.splitlines())
    assert code == 0 and not err and next(iter(found)) == "mla_convert"
    assert {"mla_convert", "python", "torch", "transformers", "cuda"} <= found.keys() and all(found.values())


def test_completion():
    script = "import sys; sys.argv[0] = 'mla-convert'; from mla_convert.cli.main import main; main()"
    show = [sys.executable, "-c", script, "--show-completion", "bash"]
    env = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "_MLA_CONVERT_COMPLETE=complete_bash" in subprocess.run(show, capture_output=True, text=True, env=env).stdout
    line = {"COMP_WORDS": "mla-convert ga", "COMP_CWORD": "1", "_MLA_CONVERT_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | line)
    assert done.stdout.split() == ["gate"], done.stderr


@pytest.fixture
def folder(convert_pico):
    return convert_pico("llama", rank=10, rope_dim=6).out


@pytest.fixture
def arguments(folder, convert_pico, sources, tmp_path):
    tabled = convert_pico("llama", rank=10, rope_dim=8, rope_selection="engine_table").out  # engines can express it
    text = sources("llama").parent / "text.txt"
    windows = ("--eval", text, "--eval-windows", 2, "--eval-length", 32, "--device", "cpu")
    return {
        "convert": (sources("llama"), "--calib", text, "--calib-samples", 8, "--calib-length", 32, "--refine-steps", 0,
                    "--out", tmp_path / "out", *windows),
        "heal": (folder, "--teacher", sources("llama"), "--data", text, "--tokens", "4k", "--length", 64, "--step-tokens", 512,
                 "--out", tmp_path / "healed", "--lr", 0.01, "--eval", "package:mla_demo/calibration.txt.gz", *windows[2:]),
        "sweep": (sources("llama"), "--kv-ratios", "0.5", "--calib", text, "--calib-samples", 8, "--calib-length", 32,
                  "--refine-steps", 0, "--folder", tmp_path / "sweep", *windows),
        "plan": (sources("llama"),),
        "inspect": (sources("llama"),),
        "recipes": (),
        "verify": (folder,),
        "refresh": (folder,),
        "quantize": (folder, "--cache-dtype", "fp8", "--against", sources("llama"), "--out", tmp_path / "fp8", "--device", "cpu"),
        "eval": (folder, *windows),
        "bench": (folder, "--context", 16, "--steps", 2, "--device", "cpu", "--dtype", "float32"),
        "gate": (folder, "--min-kv-saving", "10%", *windows),
        "export": (tabled, "--out", tmp_path / "exported"),
        "push": (folder, "me/tiny-mla"),
        "report": (folder, "--html", tmp_path / "report.html"),
    }  # fmt: skip


# serve-check starts an engine's process: tests/publish/test_serve.py asks the same of it.
@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"serve-check"}))
def test_json_alone_is_on_stdout(hub, cli, arguments, name):
    code, out, err = cli(name, *arguments[name], "--json")
    assert code == 0, err
    assert isinstance(json.loads(out), dict | list)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"recipes", "report", "serve-check"}))
def test_quiet_says_nothing_on_stderr(hub, cli, arguments, name):
    code, _, err = cli(name, *arguments[name], "--quiet")
    assert code == 0 and not err


def test_verbose_says_every_layer(cli, arguments):
    code, _, err = cli("convert", *arguments["convert"], "--verbose")
    assert code == 0 and [line for line in range(1, 4) if f"layer {line}/3" in err] == [1, 2, 3]


@pytest.mark.parametrize("words", [["recipes"], ["--help"]])
def test_no_colour(words):
    assert ESCAPE in run(*words, FORCE_COLOR="1").stdout
    assert ESCAPE not in run(*words, NO_COLOR="1").stdout
    assert ESCAPE not in run(*words).stdout  # a pipe is no terminal


def test_progress_is_plain_lines_in_a_log(cli, arguments):
    code, _, err = cli("convert", *arguments["convert"])
    assert code == 0 and "layer 3/3" in err
    assert ESCAPE not in err and "\r" not in err

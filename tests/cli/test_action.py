"""The composite GitHub Action: what it says is what mla-convert takes, and its script runs as a runner would run it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".github" / "actions" / "gate" / "action.yml"
ACTION = yaml.safe_load(FILE.read_text())
STEPS = ACTION["runs"]["steps"]
GATE = next(step for step in STEPS if step.get("id") == "gate")


def test_it_is_a_composite_action():
    assert ACTION["runs"]["using"] == "composite" and ACTION["name"] and ACTION["description"]
    assert all(step["shell"] == "bash" and step["run"] for step in STEPS)
    for name, entry in ACTION["inputs"].items():
        assert entry["description"] and ("default" in entry) != entry.get("required", False), name
        assert isinstance(entry.get("default", ""), str), name  # a runner knows no other type


def test_inputs_are_all_used_and_none_is_pasted_into_the_script():
    used = set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", "\n".join(GATE["env"].values())))
    used |= {name for step in STEPS for name in re.findall(r"inputs\.([\w-]+)", step.get("if", ""))}
    assert used == ACTION["inputs"].keys()
    assert not any("${{" in step["run"] for step in STEPS)
    for output in ACTION["outputs"].values():
        (name,) = re.findall(r"steps\.gate\.outputs\.(\w+)", output["value"])
        assert f"{name}=" in GATE["run"]


def test_every_option_is_one_of_the_gate(cli):
    code, out, _ = cli("gate", "--help")
    assert code == 0
    known = set(re.findall(r"--[\w-]+", out))
    for name in re.search(r"for name in ([A-Z_ ]+);", GATE["run"])[1].split():
        assert f"--{name.lower().replace('_', '-')}" in known, name


def test_it_installs_this_repository():
    folder = re.search(r'"\$GITHUB_ACTION_PATH/([./]+)"', STEPS[0]["run"])[1]
    assert (FILE.parent / folder).resolve() == ROOT


def test_workflow_in_the_docs_is_valid():
    text = (ROOT / "docs" / "guides" / "gate-in-ci.md").read_text()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        content = yaml.safe_load(block)
        for job in content["jobs"].values():
            for step in job["steps"]:
                if "actions/gate" in step.get("uses", ""):
                    assert step["with"].keys() <= ACTION["inputs"].keys() and "model" in step["with"]
    assert "actions/gate" in text


@pytest.mark.parametrize("saving, code", [("40%", 0), ("90%", 3)])
def test_script(convert_pico, tmp_path, saving, code):
    if not shutil.which("bash"):
        pytest.skip("no bash")
    folder = shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "a model; exit 9")
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "mla-convert").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mla_convert "$@"\n')
    (scripts / "mla-convert").chmod(0o755)
    defaults = {name: entry.get("default", "") for name, entry in ACTION["inputs"].items()}
    given = {**defaults, "model": folder.name, "min-kv-saving": saving, "from-report": "true", "junit": "gate.xml"}
    env = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: given[m[1]], value)
        for name, value in GATE["env"].items()
    }
    env |= {"PATH": f"{scripts}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_ACTIONS": "true",
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"), "RUNNER_TEMP": str(tmp_path)}  # fmt: skip
    run = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", GATE["run"]], cwd=tmp_path, env=os.environ | env,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == code, run.stderr
    assert json.loads((tmp_path / "mla-gate.json").read_text())["passed"] == (code == 0)
    outputs = dict(line.split("=", 1) for line in (tmp_path / "output").read_text().splitlines())
    assert outputs == {"json": str(tmp_path / "mla-gate.json"), "passed": "true" if code == 0 else "false"}
    assert (tmp_path / "gate.xml").is_file() and "KV cache saved" in (tmp_path / "summary.md").read_text()
    assert ("::error::" in run.stdout + run.stderr) == bool(code)

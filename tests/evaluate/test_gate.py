"""`gate` passes values within their limits and nothing else."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mla_convert.core.errors import InputError, UsageError
from mla_convert.evaluate import gate
from mla_convert.evaluate.gate import Limits, check, percentage
from mla_convert.report import gate_formats

USAGE, GATE, INPUT, RESOURCE = 2, 3, 4, 5
RANK, ROPE_DIM = 10, 6
FIGURES = {
    "cache": {"share_saved": 0.75},
    "evaluation": {"text": "text.txt", "ratio": 1.04, "after": {"value": 10.4, "windows": 4, "length": 48}},
}
PATHS = {"max_ppl_ratio": gate.RATIO, "max_ppl": gate.AFTER, "min_kv_saving": gate.SAVED, "baseline": gate.AFTER}
WIDE = {"max_ppl_ratio": 1e6, "max_ppl": 1e6, "min_kv_saving": 0.0, "baseline": FIGURES}


@pytest.fixture(autouse=True)
def outside_actions(monkeypatch):
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def report(convert_pico):
    return convert_pico("llama", rank=RANK, rope_dim=ROPE_DIM)


@pytest.fixture
def folder(report, tmp_path):
    return Path(shutil.copytree(report.out, tmp_path / "converted"))


@pytest.fixture
def small(sources):
    """Options of a quick measurement."""
    text = sources("llama").parent / "text.txt"
    return "--eval", text, "--eval-windows", 4, "--eval-length", 48, "--device", "cpu", "--quiet"


def changed(path, value, figures=FIGURES):
    figures = copy.deepcopy(figures)
    *parents, last = path.split(".")
    inner = figures
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return figures


def only(results):
    (result,) = results
    return result


# ---- the library


@pytest.mark.parametrize(
    "limits, passed",
    [
        ({"max_ppl_ratio": 1.04}, True),
        ({"max_ppl_ratio": 1.0399}, False),
        ({"max_ppl": 10.4}, True),
        ({"max_ppl": 10.3}, False),
        ({"min_kv_saving": 0.75}, True),
        ({"min_kv_saving": 0.76}, False),
        ({"baseline": FIGURES}, True),
        ({"baseline": changed(gate.AFTER, 10.2)}, False),
        ({"baseline": changed(gate.AFTER, 10.2), "max_regression": 0.02}, True),
        ({"baseline": changed(gate.AFTER, 10.39), "max_regression": 0}, False),
        ({"baseline": changed(gate.AFTER, 99.0), "max_regression": 0}, True),
    ],
)
def test_check(limits, passed):
    result = only(check(FIGURES, limits))
    assert result.passed is passed and bool(result.reason) is not passed
    assert result.figure is not None


def test_every_limit_is_checked_in_a_fixed_order():
    results = check(FIGURES, Limits(**WIDE))
    assert [result.figure for result in results] == [1.04, 10.4, 0.75, 0.0]
    assert all(result.passed for result in results)
    assert [result.passed for result in check(FIGURES, {"max_ppl": 5, "min_kv_saving": 0.5})] == [False, True]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "1.0", True, [1.0], {}])
@pytest.mark.parametrize("limit", PATHS)
def test_never_passes_without_a_figure(limit, value):
    """Neither missing nor NaN nor infinite, whatever the limit."""
    result = only(check(changed(PATHS[limit], value), {limit: WIDE[limit]}))
    assert not result.passed and result.figure is None and PATHS[limit] in result.reason


@pytest.mark.parametrize(
    "limit, value", [("max_ppl_ratio", -1.0), ("max_ppl_ratio", 0), ("max_ppl", -5.0), ("min_kv_saving", 1.5)]
)
def test_never_passes_on_an_impossible_figure(limit, value):
    result = only(check(changed(PATHS[limit], value), {limit: WIDE[limit]}))
    assert not result.passed and "cannot be" in result.reason


@pytest.mark.parametrize("figures", [{}, {"evaluation": None, "cache": 5}, {"evaluation": {"after": []}}])
def test_never_passes_on_an_empty_report(figures):
    assert not any(result.passed for result in check(figures, WIDE))


@pytest.mark.parametrize("value", [None, math.nan, "10", 0])
def test_baseline_without_a_figure(value):
    result = only(check(FIGURES, {"baseline": changed(gate.AFTER, value)}))
    assert not result.passed and result.reason.startswith("baseline: ")


@pytest.mark.parametrize(
    "path, value",
    [
        ("evaluation.text", "other.txt"),
        ("evaluation.after.windows", 5),
        ("evaluation.after.length", 49),
        ("evaluation.text", None),
    ],
)
def test_baseline_of_other_text(path, value):
    """Perplexities of different text say nothing about each other."""
    for figures, baseline in ((FIGURES, changed(path, value)), (changed(path, value), FIGURES)):
        result = only(check(figures, {"baseline": baseline, "max_regression": 1e6}))
        assert not result.passed and "other text" in result.reason


def test_remark_on_a_text_is_not_its_name():
    remarked = changed("evaluation.text", "text.txt (WikiText-2 could not be fetched from the Hub)")
    assert only(check(remarked, {"baseline": FIGURES})).passed


def test_rounding_is_not_failure():
    assert only(check(changed(gate.SAVED, 1 - 0.9), {"min_kv_saving": 0.1})).passed


def test_reason_tells_figure_from_limit():
    result = only(check(changed(gate.RATIO, 1.0500001), {"max_ppl_ratio": 1.05}))
    assert not result.passed and "1.0500001" in result.reason


@pytest.mark.parametrize(
    "limits",
    [
        {},
        Limits(),
        {"max_ppl": math.nan},
        {"max_ppl": math.inf},
        {"max_ppl": "5"},
        {"max_ppl": True},
        {"max_ppl_ratio": -1},
        {"min_kv_saving": 70},
        {"max_regression": 0.1},
        {"max_regresion": 0.1, "baseline": FIGURES},
    ],
)
def test_no_limit(limits):
    with pytest.raises(UsageError):
        check(FIGURES, limits)


def test_takes_reports_paths_and_evaluations(report):
    limits, path = {"max_ppl_ratio": 1e6, "min_kv_saving": 0.5, "baseline": report}, report.out / "report.json"
    for figures in (report, report.as_dict(), report.out, path, str(path)):
        assert all(result.passed for result in check(figures, limits))
    with pytest.raises(InputError, match="not found"):
        check(report.out / "nothing.json", limits)


@pytest.mark.parametrize(
    "text, value", [("70%", 0.7), ("0.7", 0.7), (".5", 0.5), ("1.5 %", 0.015), ("100%", 1), ("0", 0), ("0%", 0)]
)
def test_percentage(text, value):
    assert percentage(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["70", "1", "-5%", "", "%", "nan", "inf%", "1e-2", "70%%", "0,7"])
def test_not_a_percentage(text):
    with pytest.raises(UsageError):
        percentage(text)


def test_no_torch_for_figures_at_hand(report):
    code = "import sys; from mla_convert.evaluate.gate import check; check(sys.argv[1], {'max_ppl': 1e9})"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules", str(report.out)], check=True)


# ---- the command


def test_measures_and_passes(cli, folder, sources, small, report):
    """Figures in report.json do not count: they may be wrong."""
    content = json.loads((folder / "report.json").read_text())
    content["evaluation"]["ratio"] = content["cache"]["share_saved"] = None
    (folder / "report.json").write_text(json.dumps(content))
    ratio = report.perplexity_ratio
    code, out, err = cli("gate", folder, "--max-ppl-ratio", ratio * 1.001, "--min-kv-saving", "50%", "--max-ppl", 1e6,
                         "--baseline", report.out / "report.json", "--against", sources("llama"), *small)  # fmt: skip
    assert code == 0 and not err
    assert (
        f"×{report.perplexity_ratio:.4f}" in out
        and out.count("pass") == 4
        and "FAIL" not in out
        and "measured on text.txt" in out
    )


def test_measures_and_fails(cli, folder, sources, small, report):
    ratio = report.perplexity_ratio
    code, out, err = cli("gate", folder, "--max-ppl-ratio", ratio * 0.999, "--min-kv-saving", "0.51", "--max-ppl", 1e6,
                         "--against", sources("llama"), *small)  # fmt: skip
    assert code == GATE and out.count("FAIL") == 2 and out.count("pass") == 1
    (line,) = err.splitlines()
    assert line.startswith("mla-convert: 2 of 3 gates failed: ") and f"×{report.perplexity_ratio:.4f}" in line


def test_limits_that_need_no_original(cli, folder, small):
    code, out, _ = cli("gate", folder, "--min-kv-saving", "50%", "--max-ppl", 1e6, *small)
    assert code == 0 and "against" not in out


def test_original_from_the_report(cli, folder, sources, small, monkeypatch):
    monkeypatch.chdir(sources("llama").parent)
    code, out, _ = cli("gate", folder, "--max-ppl-ratio", 1e6, *small)
    assert code == 0 and "against source" in out


def test_original_not_found(cli, folder, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("gate", folder, "--max-ppl-ratio", 1e6, *small)
    assert code == INPUT and not out and "--against" in err and len(err.splitlines()) == 1


def test_not_finite_weights_fail(cli, folder, small):
    import torch
    from safetensors.torch import load_file, save_file

    shard = folder / "model-00003-of-00005.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.input_layernorm.weight"].fill_(torch.nan)
    save_file(tensors, shard, {"format": "pt"})
    code, out, err = cli("gate", folder, "--max-ppl", 1e300, *small, "--json")
    assert code == GATE and len(err.splitlines()) == 1
    found = json.loads(out)
    assert found["passed"] is False and found["gates"][0]["figure"] is None


def test_from_report(cli, folder, report):
    for path in (folder, folder / "report.json"):
        code, out, err = cli(
            "gate", path, "--from-report", "--max-ppl-ratio", report.perplexity_ratio * 1.001, "--min-kv-saving", "0.5"
        )
        assert code == 0 and not err and "trusted from report.json" in out
    code, out, _ = cli("gate", folder, "--from-report", "--max-ppl-ratio", report.perplexity_ratio * 0.999)
    assert code == GATE and "trusted from report.json" in out


def test_json_is_all_there_is_on_stdout(cli, folder, small, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for options in (["--from-report"], small):
        code, out, err = cli("gate", folder, "--max-ppl", 1.0, "--min-kv-saving", "10%", "--json", *options)
        found = json.loads(out)
        assert code == GATE and not found["passed"] and [entry["passed"] for entry in found["gates"]] == [False, True]
        assert found["basis"] and found["figures"]["evaluation"]["after"]["value"] == found["gates"][0]["figure"]
        assert err.count("::error::") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_junit(cli, folder, tmp_path, fails):
    path = tmp_path / "deep" / "gate.xml"
    limit = 1.0 if fails else 1e6
    code, _, _ = cli("gate", folder, "--from-report", "--max-ppl", limit, "--min-kv-saving", "50%", "--junit", path)
    assert code == (GATE if fails else 0)
    root = ElementTree.parse(path).getroot()
    (suite,) = root.findall("testsuite")
    assert (root.tag, suite.get("tests"), suite.get("failures")) == ("testsuites", "2", str(int(fails)))
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["perplexity", "KV cache saved"]
    failures = [case.find("failure") for case in cases]
    assert [failure is not None for failure in failures] == [fails, False]
    if fails:
        assert "above the limit of 1.000" in failures[0].get("message")


@pytest.mark.parametrize("fails", [False, True])
def test_github(cli, folder, tmp_path, monkeypatch, fails):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    limit = "60%" if fails else "50%"
    for _ in range(2):
        code, out, _ = cli("gate", folder, "--from-report", "--max-ppl", 1e6, "--min-kv-saving", limit)
        assert code == (GATE if fails else 0)
        errors = [line for line in out.splitlines() if line.startswith("::error::")]
        assert len(errors) == fails and all("50.0%25 is below" in line for line in errors)
    text = summary.read_text()
    assert text.startswith("before\n") and text.count("| check | figure | limit | result |") == 2
    assert ("**fail**" in text) is fails
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_names_cannot_break_out():
    """A model's name ends up in XML, in a Markdown cell and in a workflow command."""
    name = "a|b<c>&\"'\x00\x1b\n::error::100% `*x*`\r\n| d"
    result = gate.GateResult("perplexity", None, 1.0, False, f"missing in {name}")
    verdict = gate.Verdict(name, f"from {name}", [result], {})
    root = ElementTree.fromstring(gate_formats.junit_xml(verdict, 0.5))
    assert "a|b<c>&" in root.find("testsuite").get("name")
    (line,) = gate_formats.error_lines(verdict)
    assert "\n" not in line and "\r" not in line and "100%25" in line and "%0A" in line
    table = gate_formats.markdown(verdict)
    assert not re.search(r"(?<!\\)[<>`]", table) and len(table.splitlines()) == 8
    (row,) = (line for line in table.splitlines() if line.startswith("| perplexity"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert not verdict.passed and not gate.Verdict(name, "", [], {}).passed


@pytest.mark.parametrize(
    "code, culprit, options",
    [
        (USAGE, "nothing to check", ()),
        (USAGE, "nothing to check", ("--from-report",)),
        (USAGE, "--baseline", ("--max-regression", "1%")),
        (USAGE, "70%", ("--min-kv-saving", "70")),
        (USAGE, "max_ppl nan", ("--max-ppl", "nan")),
        (USAGE, "max_ppl_ratio inf", ("--max-ppl-ratio", "inf")),
        (USAGE, "above 100%", ("--min-kv-saving", "101%")),
        (USAGE, "--from-report", ("--from-report", "--max-ppl", "5", "--against", "demo")),
        (INPUT, "nothing.json", ("--max-ppl", "5", "--baseline", "nothing.json")),
        (INPUT, "pyproject.toml", ("--max-ppl", "5", "--baseline", Path(__file__).parents[2] / "pyproject.toml")),
        (INPUT, "folder", ("--from-report", "--max-ppl", "5", "--junit", Path(__file__).parent)),
        (INPUT, "nowhere", ("--max-ppl-ratio", "5", "--against", "./nowhere")),
    ],
)
def test_refused(cli, folder, code, culprit, options):
    found, out, err = cli("gate", folder, *options)
    assert found == code and not out
    (line,) = err.splitlines()
    assert line.startswith("mla-convert: ") and culprit in line


@pytest.mark.parametrize("options", [(), ("--from-report",)])
@pytest.mark.parametrize("model, code", [("./nowhere", INPUT), ("nowhere", INPUT), ("owner/name", RESOURCE)])
def test_no_model(cli, model, code, options):
    found, out, err = cli("gate", model, "--max-ppl", 5, *options)
    assert found == code and not out and len(err.splitlines()) == 1


def test_example_in_the_docs(report, monkeypatch):
    """The test that docs/guides/gate-in-ci.md shows runs as it stands."""
    docs = (Path(__file__).parents[2] / "docs" / "guides" / "gate-in-ci.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    monkeypatch.chdir(report.out.parent)
    scope = {}
    exec(example.replace("llama-8b-mla", report.out.name), scope)
    test = scope["test_conversion"]
    monkeypatch.setitem(scope["LIMITS"], "max_ppl_ratio", 1e6)
    monkeypatch.setitem(scope["LIMITS"], "min_kv_saving", 0.5)
    test()
    monkeypatch.setitem(scope["LIMITS"], "min_kv_saving", 0.6)
    with pytest.raises(AssertionError, match="below the limit"):
        test()

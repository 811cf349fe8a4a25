"""report.json as types: what is read of every schema, what is written, and what is refused by its path."""

import copy
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mla_convert.core.errors import InputError
from mla_convert.core.report_file import look_up, read_report
from mla_convert.core.report_schema import SCHEMA, Report, parse_report
from mla_convert.evaluate.gate import check

ROOT = Path(__file__).parents[2]
MEAN = {"value": 0.5, "error": 0.1}
PROBES = {"next_token": {"text": "t.txt", "protocol": "4 windows", "kl": MEAN, "agreement": MEAN, "against": "x"},
          "of_somebody": {"value": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def content(convert_pico):
    report = convert_pico("llama", rank=10, rope_dim=6, held_out="calib")
    return json.loads((report.out / "report.json").read_text())


def first_schema(content):
    """The same report as versions before 0.2 wrote it."""
    old = copy.deepcopy(content)
    old["schema"], old["beyond"] = 1, copy.deepcopy(PROBES)
    old["heal"] = {
        "curve": [{"tokens": 100, "kl": None}],
        "before": {"evaluation": old["evaluation"], "beyond": copy.deepcopy(PROBES)},
        "conversion": {"evaluation": old["evaluation"], "beyond": None},
    }
    return old


def test_a_report_is_read_and_written_as_it_is(content, tmp_path):
    report = parse_report(content)
    assert report.as_dict() == content and content["schema"] == SCHEMA
    report.write(tmp_path)
    assert (tmp_path / "report.json").read_text() == json.dumps(content, indent=2) + "\n"
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == report


def test_the_first_schema_is_read_and_the_newest_written(content):
    old = first_schema(content)
    report = parse_report(old)
    assert report.probes.next_token.kl.value == report.heal.before.probes.next_token.kl.value == 0.5
    assert report["beyond"] is report["probes"] is report.probes and "beyond" in report
    new = report.as_dict()
    assert new["schema"] == SCHEMA and "beyond" not in new and new["probes"] == PROBES
    assert new["heal"]["before"]["probes"] == PROBES and new["heal"]["conversion"]["probes"] is None
    assert new["heal"]["curve"] == old["heal"]["curve"]
    assert parse_report(new).as_dict() == new


def test_reports_of_version_0_1_lack_later_entries(content):
    old = {key: value for key, value in content.items() if key not in ("notes", "schema", "self_check")}
    old["source"] = {key: content["source"][key] for key in ("name", "revision", "model_type")}
    old["calibration"] = {"protocol": "8 windows"}
    old["evaluation"] = {key: content["evaluation"][key] for key in ("text", "protocol", "before", "after", "ratio")}
    old["layers"] = [{"layer": 0, "kv_lora_rank": 10, "qk_rope_head_dim": 6, "energy": {}}]
    report = parse_report(old)
    assert report.self_check is None and report.measured.kl is None and math.isnan(report.measured.ratio_error)
    assert report.as_dict() == {**old, "schema": SCHEMA}


def test_dotted_paths_of_both_schemas(content):
    old, new = first_schema(content), parse_report(first_schema(content)).as_dict()
    for figures in (old, new, parse_report(old)):
        for path in (
            "beyond.next_token.kl.value",
            "probes.next_token.kl.value",
            "heal.before.beyond.next_token.kl.value",
        ):
            assert look_up(figures, path) == 0.5, path
        assert look_up(figures, "evaluation.after.value") == content["evaluation"]["after"]["value"]
        assert look_up(figures, "evaluation.nothing.value") is None
        assert all(result.passed for result in check(figures, {"max_ppl": 1e9, "baseline": content}))


def test_entries_of_somebody_stay(content):
    changed = copy.deepcopy(content)
    changed["of_somebody"] = {"else": [1, None, {"beyond": 2}]}
    changed["layers"][0]["of_somebody"] = changed["cache"]["of_somebody"] = [0.5]
    assert parse_report(changed).as_dict() == changed


def test_nested_too_deeply(content):
    deep = json.loads("[" * 700 + "]" * 700)
    for changed in ({**content, "of_somebody": deep}, {**content, "settings": {"x": deep}}):
        with pytest.raises(InputError, match="nested too deeply"):
            parse_report(changed).text()


def test_not_finite_is_null_in_the_file(content):
    changed = copy.deepcopy(content)
    changed["evaluation"]["ratio"] = changed["evaluation"]["after"]["value"] = None
    report = parse_report(changed)
    assert math.isnan(report.perplexity_ratio) and math.isnan(report.evaluation.after.value)
    report.layers[0].residual_error = math.inf
    changed["layers"][0]["residual_error"] = None
    assert report.as_dict() == changed
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("path, value, words", [
    ("cache.share_saved", "half", "cache.share_saved should be a number, and is 'half'"),
    ("seconds", None, "seconds should be a number, and is None"), ("seconds", -1, "seconds should be no less than 0"),
    ("layers", {}, "layers should be a list"), ("evaluation", [], "evaluation should be an object"),
    ("evaluation.after.value", "x" * 99, "evaluation.after.value should be a number or null"),
    ("evaluation.held_out.text", 3, "evaluation.held_out.text should be a string, and is 3"),
    ("layers.1.plane_frequencies", [0.5], "layers[1].plane_frequencies[0] should be a whole number, and is 0.5"),
    ("cache.bytes_at_context", {"4\n": {"before": 1, "after": 1}}, "should be under a number of tokens"),
    ("evaluation", {"skipped": True, "text": "t"}, "evaluation.text should be null"),
    ("source.license", ["mit", 1], "source.license should be a word or a list of words"),
    ("layers", [{}] * 5000, "layers"), ("of_somebody", None, None),
])  # fmt: skip
def test_what_is_wrong_is_named_by_its_path(content, path, value, words):
    changed = inner = copy.deepcopy(content)
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[int(key) if key.isdigit() else key]
    inner[last] = value
    if words is None:
        assert parse_report(changed)["of_somebody"] is value
        return
    with pytest.raises(InputError, match="is not that of a conversion") as error:
        parse_report(changed)
    assert words in str(error.value) and len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_what_is_missing_is_named(content):
    for key in ("source", "cache", "evaluation", "layers", "checksums"):
        with pytest.raises(InputError, match=f"it has no {key}$"):
            parse_report({name: value for name, value in content.items() if name != key})
    with pytest.raises(InputError, match=r"it has no evaluation\.before\.value"):
        parse_report({**content, "evaluation": {**content["evaluation"], "before": {}}})


def test_the_folder_is_no_part_of_the_file(content, convert_pico):
    report = convert_pico("llama", rank=10, rope_dim=6, held_out="calib")
    assert report.out.is_dir() and "out" not in report.as_dict()
    assert parse_report({**content, "out": "/elsewhere"}).out is None


def test_the_old_name_of_the_ratio_warns(content):
    report = parse_report(content)
    with pytest.warns(DeprecationWarning, match="perplexity_ratio"):
        assert report.ratio == content["evaluation"]["ratio"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.perplexity_ratio == report["evaluation"]["ratio"] == report.evaluation.ratio


def test_the_published_schema_is_up_to_date():
    script = ROOT / "scripts" / "make_report_schema.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0, f"run {script.relative_to(ROOT)}"


def test_the_published_schema_names_every_entry(content):
    schema = json.loads((ROOT / "docs" / "reference" / "report.schema.json").read_text(encoding="utf-8"))
    assert content.keys() <= schema["properties"].keys() and "out" not in schema["properties"]
    assert schema["required"] == [name for name, field in Report.model_fields.items() if field.is_required()]
    evaluation, layer = schema["$defs"]["EvaluationSection"], schema["$defs"]["LayerEntry"]
    assert content["evaluation"].keys() <= evaluation["properties"].keys()
    assert content["layers"][0].keys() <= layer["properties"].keys()
    assert (
        "held-out" in layer["description"] and "after refinement" in layer["properties"]["output_error"]["description"]
    )


def test_sections_import_no_torch():
    code = "import sys, mla_convert.core.report_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The packaged suite: its texts, its measurement, and the worst kind of text wherever results are shown."""

import copy
import gzip
import json
import math
import re
import subprocess
import sys
from importlib import resources

import pico
import pytest
import torch

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.core.report_schema import Measurement, SuiteSection, WorstKind, parse_report
from mla_convert.evaluate import gate
from mla_convert.evaluate.quality import suite
from mla_convert.evaluate.quality.evaluation import evaluate_model
from mla_convert.evaluate.quality.kinds import KINDS
from mla_convert.evaluate.quality.perplexity import Scores
from mla_convert.report.quality_rows import heal_table, kinds_table, suite_headline, suite_rows
from mla_convert.report.tables import report_table
from mla_convert.source.chat import dialogues

CPU = torch.device("cpu")
CALIBRATION = ("mla_demo/calibration.txt.gz", "mla_texts/calibration/python.txt.gz", "mla_texts/calibration/code.txt.gz",
               "mla_texts/calibration/documentation.txt.gz", "mla_texts/calibration/mathematics.txt.gz",
               "mla_texts/calibration/languages.txt.gz", "mla_texts/calibration/well_known.txt.gz")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}"
)


def packed(name: str) -> bytes:
    package, _, file = name.partition("/")
    return gzip.decompress((resources.files(package) / file).read_bytes())


@pytest.fixture(scope="module")
def report(convert_pico):
    return convert_pico("llama", kv_ratio=0.5, suite_windows=2, dtype="float32")


def test_every_kind_is_small_and_in_no_calibration_text():
    folder = resources.files("mla_texts") / "suite"
    assert {file.name.partition(".")[0] for file in folder.iterdir()} == set(KINDS)
    lines = {line.strip() for name in CALIBRATION for line in packed(name).decode().splitlines()}
    for kind in KINDS:
        text, _ = suite.load_kind(kind, pico.tokenizer())
        assert 5_000 < len(text.encode()) <= 100_000
        assert not {line.strip() for line in text.splitlines() if len(line.strip()) >= 80} & lines, kind


def test_every_source_is_attributed():
    pages = (resources.files("mla_texts") / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for folder in ("suite", "calibration"):
        for file in (resources.files("mla_texts") / folder).iterdir():
            assert f"`{file.name}`" in pages


def test_windows_are_spread_and_begin_as_the_tokenizer_begins():
    class Tokenizer:
        all_special_ids, chat_template = [], None

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [0] * add_special_tokens + [1 + ord(c) % 200 for c in text]}

    found = suite.load_suite(Tokenizer(), 3, 64)
    assert found.windows.shape == (3 * len(KINDS), 64) and list(found.kinds) == list(KINDS)
    assert (found.windows[:, 0] == 0).all()
    whole = Tokenizer()(suite.load_kind("rust", Tokenizer())[0], add_special_tokens=False)["input_ids"]
    first = 3 * KINDS.index("rust")
    for index in range(3):
        start = index * (len(whole) // 3)
        assert found.windows[first + index, 1:].tolist() == whole[start : start + 63]
    # a text that fills no window is left out, and said so by the number of kinds
    longest = suite.load_suite(Tokenizer(), 1, 20_000)
    assert 0 < len(longest.kinds) < len(KINDS) and longest.protocol.startswith(f"{len(longest.kinds)} packaged")
    assert suite.load_suite(Tokenizer(), 0, 64) is None


def test_size_is_a_small_part_of_the_evaluation():
    assert suite.size(None, True, 40, 2048) == (4, 1024) and suite.size(None, False, 40, 2048) == (2, 512)
    assert suite.size(None, True, 2, 256) == (2, 256) and suite.size(7, False, 2, 256) == (7, 256)


def test_dialogue_is_written_by_the_chat_template():
    tokenizer = pico.tokenizer()
    plain, templated = suite.load_kind("dialogue", tokenizer)
    assert not templated and plain.startswith("User: ") and "\n\nAssistant: " in plain
    tokenizer.chat_template = TEMPLATE.replace("{{ raise_exception('no system turn') }}", "")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert dialogues([system], tokenizer) == ("<system>Be brief.</><user>Hi</>", True)
    # one that refuses a system turn gets it as part of the user's
    tokenizer.chat_template = TEMPLATE
    assert dialogues([system], tokenizer) == ("<user>Be brief.\n\nHi</>", True)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert dialogues([system], tokenizer) == ("System: Be brief.\n\nUser: Hi", False)


def test_a_conversion_measures_it_as_eval_does(report, sources):
    ours = report.evaluation["suite"]
    assert list(ours["kinds"]) == list(KINDS) and (ours["windows"], ours["length"]) == (2, 48)
    found = evaluate_model(str(report.out), str(sources("llama")), text=str(sources("llama").parent / "text.txt"),
                           device="cpu", progress=Progress(quiet=True))  # fmt: skip
    theirs = found.as_dict()["evaluation"]["suite"]
    assert theirs["worst"]["kind"] == ours["worst"]["kind"] and theirs["protocol"] == ours["protocol"]
    for kind in KINDS:
        for path in (("ratio",), ("kl", "value"), ("kl", "p99"), ("agreement", "value"), ("before", "value")):
            values = ours["kinds"][kind], theirs["kinds"][kind]
            for key in path:
                values = tuple(value[key] for value in values)
            assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), (kind, path)
    assert ours["worst"]["ratio"] == max(entry["ratio"] for entry in ours["kinds"].values())
    mean = sum(entry["kl"]["value"] for entry in ours["kinds"].values()) / len(KINDS)
    assert ours["kl"]["value"] == pytest.approx(mean)
    # of the model alone there are perplexities and nothing to compare
    alone = evaluate_model(str(report.out), device="cpu", windows=1, text=str(sources("llama").parent / "text.txt"),
                           progress=Progress(quiet=True)).as_dict()["evaluation"]["suite"]  # fmt: skip
    assert "worst" not in alone and set(alone["kinds"]["rust"]) == {"after"}
    section = SuiteSection.model_validate(alone)
    assert suite_rows(section) == [] and kinds_table(section).rows[0][1] == "–"


def test_it_can_be_left_out(convert_pico):
    assert "suite" not in convert_pico("llama", kv_ratio=0.5).evaluation


def test_report_card_and_page_show_the_worst_kind(report):
    worst = report.evaluation["suite"]["worst"]
    assert any(worst["kind"] in row[0] for row in report_table(report).rows)
    card = (report.out / "README.md").read_text(encoding="utf-8")
    assert f"×{worst['ratio']:.3f} on the worst kind of text ({worst['kind']})" in card
    page = (report.out / "report.html").read_text(encoding="utf-8")
    assert "worst kind of text" in page and all(f">{kind}<" in page for kind in KINDS)
    written = json.loads((report.out / "report.json").read_text(encoding="utf-8"))
    assert written["evaluation"]["suite"] == report.as_dict()["evaluation"]["suite"]
    rows = kinds_table(parse_report(written).measured.suite).rows
    assert rows[0][0] == worst["kind"]  # the worst comes first


def test_a_ratio_that_is_not_finite_is_the_worst(report):
    section = report.evaluation.suite.model_copy(deep=True)
    section.kinds["c"].ratio = math.nan
    assert max(section.kinds, key=lambda kind: suite._rank(section.kinds[kind].ratio)) == "c"
    row = kinds_table(section).rows[0]
    assert row[0] == "c" and row[3] == "–"
    section.worst = WorstKind(kind="c", ratio=math.nan)
    assert "not finite" in suite_headline(section)
    assert section.as_dict()["worst"] == {"kind": "c", "ratio": None}
    assert math.isnan(SuiteSection.model_validate(section.as_dict()).worst.ratio)


def test_gates_on_the_suite(report):
    figures = report.as_dict()
    found = figures["evaluation"]["suite"]
    for name, value, at_least in (
        ("max_worst_ratio", found["worst"]["ratio"], False),
        ("max_kl", found["kl"]["value"], False),
        ("min_agreement", found["agreement"]["value"], True),
    ):
        assert gate.check(figures, {name: value})[0].passed
        (failed,) = gate.check(figures, {name: value + 0.01 if at_least else value * 0.99})
        assert not failed.passed and ("below" if at_least else "above") in failed.reason
        missing = copy.deepcopy(figures)
        del missing["evaluation"]["suite"]
        (unknown,) = gate.check(missing, {name: value})
        assert not unknown.passed and "missing" in unknown.reason
    with pytest.raises(UsageError, match="above 100%"):
        gate.Limits(min_agreement=1.5)


def test_gate_measures_the_suite_only_where_a_limit_asks_for_it(report, sources, cli):
    text = sources("llama").parent / "text.txt"
    small = ("--eval", text, "--eval-windows", 1, "--device", "cpu", "--quiet", "--against", sources("llama"), "--json")
    code, out, _ = cli("gate", report.out, "--max-ppl-ratio", 1e6, *small)
    assert code == 0 and "suite" not in json.loads(out)["figures"]["evaluation"]
    code, out, _ = cli("gate", report.out, "--max-worst-ratio", 1e6, "--max-kl", 1e6, "--min-agreement", "0%", *small)
    assert code == 0 and len(json.loads(out)["gates"]) == 3
    code, _, err = cli("gate", report.out, "--max-kl", 0.0, "--suite-windows", 1, *small)
    assert code == 3 and re.search(r"KL divergence, mean over kinds of text: [\d.]+ is above the limit", err)


def test_healing_shows_the_worst_kind(report):
    side = Measurement(evaluation=report.evaluation)
    shown = {row[0]: row[1:] for row in heal_table(side, side).rows}
    assert "worst kind of text, over the original's" in shown and "KL, mean over kinds" in shown


def test_tables_import_no_torch():
    modules = "mla_convert.evaluate.quality.kinds, mla_convert.report.quality_rows, mla_convert.report.gate_formats"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_enormous_perplexity_is_infinite_and_null_in_the_report(report):
    found = suite._kind(
        Scores(torch.full((2, 4), 60.0), torch.full((2, 4), 1.0), torch.ones(2, 4), torch.ones(2, 4)), slice(0, 2)
    )
    assert found.ratio == found.after.value == math.inf and found.before.value == pytest.approx(math.e)
    content = report.as_dict()
    content["evaluation"]["suite"]["kinds"]["c"] = found.as_dict()
    assert math.isnan(parse_report(content).measured.suite.kinds["c"].ratio)


@pytest.mark.parametrize("path, value", [
    ("kinds", {"<b>": {"after": {"value": 1.0}}}), ("kinds", {"a|b": {"after": {"value": 1.0}}}),
    ("worst", {"kind": "**c**", "ratio": 1.0}), ("kl", {"value": "much"}), ("protocol", 3),
])  # fmt: skip
def test_wrong_entries_of_the_suite_are_refused(report, path, value):
    content = report.as_dict()
    content["evaluation"]["suite"][path] = value
    with pytest.raises(InputError, match="is not that of a conversion"):
        parse_report(content)

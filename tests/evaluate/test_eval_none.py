"""`--eval none`: report, card, page and commands state that the conversion was not evaluated."""

import json
import shutil
from pathlib import Path

import pico
import pytest

USAGE, GATE, INPUT = 2, 3, 4


@pytest.fixture(scope="module")
def report(convert_pico):
    return convert_pico("llama", eval="none", kv_ratio=0.5)


def test_report_card_page_and_recipe(report):
    content = json.loads((report.out / "report.json").read_text())
    assert content["evaluation"]["skipped"] is True and content["evaluation"]["ratio"] is None
    assert report.perplexity_ratio is None and content["settings"]["eval"] == "none"
    card = (report.out / "README.md").read_text()
    assert (
        "perplexity not evaluated" in card and "--eval none" in card and "×" not in card and "model-index" not in card
    )
    assert "Not evaluated" in (report.out / "report.html").read_text()
    assert "eval: none" in (report.out / "recipe.yaml").read_text()


def test_commands_on_such_a_folder(report, cli, tmp_path):
    folder = Path(shutil.copytree(report.out, tmp_path / "converted"))
    code, out, err = cli("inspect", folder)
    assert code == 0 and "not evaluated" in out and not err
    assert cli("report", folder)[0] == 0
    code, out, err = cli("gate", folder, "--from-report", "--max-ppl-ratio", 9)
    assert code == GATE and "--eval none" in err and len(err.splitlines()) == 1
    assert cli("gate", folder, "--from-report", "--min-kv-saving", "30%")[0] == 0, "the cache needs no evaluation"
    assert cli("gate", folder, "--from-report", "--baseline", folder)[0] == GATE


def test_it_runs_again_from_its_recipe(report, cli, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(pico.text())
    code, out, err = cli(
        "--recipe", report.out / "recipe.yaml", sources("llama"), "--device", "cpu", "--out", "again", "-q"
    )
    assert code == 0 and "not evaluated" in out, err


@pytest.mark.parametrize("options", [("--held-out", "calib"), ("--heal-tokens", "4k")])
def test_options_that_need_an_evaluation(options, cli, sources, tmp_path):
    code, out, err = cli(sources("llama"), "--eval", "none", *options, "--out", tmp_path / "out")
    assert code == USAGE and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("sweep",), ("eval",)])
def test_commands_that_are_evaluations(command, cli, sources, report):
    model = report.out if command == ("eval",) else sources("llama")
    code, out, err = cli(*command, model, "--eval", "none")
    assert code == USAGE and len(err.splitlines()) == 1 and not out


WRONG = [("evaluation.after.value", {}), ("cache.bytes_per_token.before", None), ("calibration.protocol", 0),
         ("layers.0.plane_frequencies", [float("inf")]), ("layers.0.plane_frequencies", [10**9]), ("source.name", ["x"]),
         ("source.head_dim", 10**9), ("evaluation", []), ("cache.share_saved", "half"), ("seconds", None), ("layers", {}),
         ("versions.mla_convert", 5), ("evaluation.ratio", True), ("source.revision", 7)]  # fmt: skip


@pytest.mark.parametrize("path, value", WRONG)
@pytest.mark.parametrize("command", ["inspect", "report", "gate"])
def test_wrong_types_in_a_report(command, path, value, cli, convert_pico, tmp_path):
    folder = Path(shutil.copytree(convert_pico("llama", rank=10, rope_dim=6).out, tmp_path / "converted"))
    content = json.loads((folder / "report.json").read_text())
    *outer, last = path.split(".")
    holder = content
    for key in outer:
        holder = holder[int(key) if key.isdigit() else key]
    holder[last] = value
    (folder / "report.json").write_text(json.dumps(content))
    more = ("--from-report", "--max-ppl", "1e9", "--min-kv-saving", "1%") if command == "gate" else ()
    code, _, err = cli(command, folder, *more)
    assert code in (0, GATE, INPUT) and len(err.splitlines()) == (code != 0), err

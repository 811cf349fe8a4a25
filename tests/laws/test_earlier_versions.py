"""A folder that version 0.1.0 wrote (tests/data) keeps its meaning, and the import paths of 0.1 keep working."""

import importlib
import importlib.util
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mla_convert.core.progress import Progress
from mla_convert.core.report_file import read_report
from mla_convert.evaluate.quality.evaluation import evaluate_model
from mla_convert.heal import HealConfig, heal
from mla_convert.moved import _new_name
from mla_convert.pipeline.refresh import refresh
from mla_convert.publish.engines.export import export
from mla_convert.write.verify import verify

DATA = Path(__file__).parents[1] / "data"
IDS = torch.arange(4, 36)[None]
# Of version 0.1.0 itself: logits of the first six tokens after IDS, and the greedy continuation, float32.
LOGITS = [0.0, 1.3612, -2.4323, 0.0245, -0.7650, -1.8699]
CONTINUATION = [69, 39, 55, 178, 41, 90, 243, 92]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DATA / "converted-0.1.0", tmp_path / "converted")


@pytest.fixture
def source(tmp_path):
    """The folder's original, made again from its seed."""
    spec = importlib.util.spec_from_file_location("source_model", DATA / "source_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.save(tmp_path / "source")


@torch.no_grad()
def check_answers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    torch.testing.assert_close(model(IDS).logits[0, -1, :6], torch.tensor(LOGITS), rtol=1e-3, atol=1e-3)
    assert model.generate(IDS, max_new_tokens=8, do_sample=False)[0, 32:].tolist() == CONTINUATION


def test_it_loads(folder):
    assert read_report(folder)["versions"]["mla_convert"] == "0.1.0"
    check_answers(folder)


def test_it_verifies(folder):
    verified = verify(folder)
    assert verified.shards == 4 and "0.1.0" in verified.note


def test_it_refreshes(folder):
    written = refresh(folder).written
    assert {"modeling_mla.py", "report.json", "report.html", "README.md", "SHA256SUMS"} <= set(written)
    assert not any(name.endswith(".safetensors") for name in written)
    assert verify(folder).note is None
    check_answers(folder)
    assert refresh(folder).written == []


def test_it_evaluates(folder, source):
    text = str(source.parent / "text.txt")
    evaluation = evaluate_model(
        str(folder), str(source), text=text, windows=2, length=48, dtype="float32", device="cpu", suite_windows=0,
        progress=Progress(quiet=True),
    )  # fmt: skip
    stated = read_report(folder)["evaluation"]
    # the weights were rounded to bfloat16 after that measurement
    assert evaluation.after.value == pytest.approx(stated["after"]["value"], rel=0.02)
    assert evaluation.before.value == pytest.approx(stated["before"]["value"], rel=1e-3)


def test_it_heals_and_exports(folder, source, tmp_path):
    content = heal(
        HealConfig(
            folder=folder, teacher=str(source), data=str(source.parent / "text.txt"), device="cpu", tokens=8 * 512,
            length="64", step_tokens=512, micro_tokens=256, evaluations=2, lr=0.01, eval_windows=2, eval_length=48,
            eval="package:mla_demo/calibration.txt.gz", self_share=0, noise=0, out=tmp_path / "healed",
        ),
        Progress(quiet=True),
    )  # fmt: skip
    curve = content["heal"]["curve"]
    assert curve[-1]["kl"] < curve[0]["kl"] and content["versions"]["mla_convert"] == "0.1.0"
    assert verify(tmp_path / "healed").shards == 4
    export(folder, tmp_path / "exported", dtype="float32", progress=Progress(quiet=True))
    check_answers(tmp_path / "exported")


# Every name in docs/api.md of version 0.1, and its present one.
MOVED = {
    "pipeline.convert": "pipeline.convert.convert",
    "config.ConvertConfig": "core.settings.ConvertConfig",
    "config.Settings": "core.settings.Settings",
    "config.build_config": "core.recipes.build_config",
    "report.Report": "report.report.Report",
    "heal.run.heal": "heal.run.heal",
    "heal.settings.HealConfig": "heal.settings.HealConfig",
    "engines.export.export": "publish.engines.export.export",
    "engines.export.Export": "publish.engines.export.Export",
    "engines.serve_check.serve_check": "publish.engines.serve_check.serve_check",
    "engines.serve_check.Asking": "publish.engines.serve_check.EngineRequest",
    "engines.serve_check.Verdict": "publish.engines.serve_check.Verdict",
    "planning.plan_conversion": "pipeline.dry_run.plan_conversion",
    "inspection.inspect_checkpoint": "pipeline.inspect.inspect_checkpoint",
    "sweep.sweep": "pipeline.sweep.sweep",
    "sweep.Grid": "pipeline.sweep.Grid",
    "evaluate.evaluate_model": "evaluate.quality.evaluation.evaluate_model",
    "evaluate.Evaluation": "evaluate.quality.evaluation.Evaluation",
    "probes.Probes": "evaluate.quality.probes.ProbeSettings",
    "beyond.write_into_report": "report.update.write_into_report",
    "gate.check": "evaluate.gate.check",
    "gate.Limits": "evaluate.gate.Limits",
    "gate.GateResult": "evaluate.gate.GateResult",
    "gate.run_gate": "evaluate.gate.run_gate",
    "verify.verify": "write.verify.verify",
    "page.write_page": "report.html.page.write_page",
    "hub.push": "publish.hub.push",
    "hub.Push": "publish.hub.Push",
    "errors.MlaConvertError": "core.errors.MlaConvertError",
    "errors.InputError": "core.errors.InputError",
    "errors.UsageError": "core.errors.UsageError",
    "errors.ResourceError": "core.errors.ResourceError",
}


@pytest.mark.parametrize("old, new", MOVED.items())
def test_old_names_give_the_same_object_and_warn(monkeypatch, old, new):
    (old_module, old_name), (new_module, new_name) = (f"mla_convert.{name}".rsplit(".", 1) for name in (old, new))
    expected = getattr(importlib.import_module(new_module), new_name)
    for module in [name for name in sys.modules if _new_name(name)]:
        monkeypatch.delitem(sys.modules, module)  # a module that moved warns at its first import
    space = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"from {old_module} import {old_name} as given", space)
    if old == "pipeline.convert":
        assert space["given"].convert is expected
        with pytest.deprecated_call(match="convert"), pytest.raises(TypeError):
            space["given"]()
        return
    assert space["given"] is expected
    said = [str(w.message) for w in caught if issubclass(w.category, DeprecationWarning) and "0.4" in str(w.message)]
    assert bool(said) == (old != new), said


def test_a_wrong_old_name_is_an_import_error():
    with pytest.raises(ImportError):
        importlib.import_module("mla_convert.gates")
    with pytest.raises(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec("from mla_convert.gate import no_such_name")

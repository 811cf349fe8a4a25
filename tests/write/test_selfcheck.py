"""The self-check before a folder gets its name: it detects a broken cache, and then nothing is written."""

import json
import shutil

import pytest
import torch
from transformers import Cache

from mla_convert.core.errors import ResourceError
from mla_convert.modeling import attention_mla, configuration_mla
from mla_convert.write import selfcheck
from mla_convert.write.selfcheck import SelfCheckFailed, own_code, self_check


@pytest.fixture(scope="module")
def folder(convert_pico):
    return convert_pico("llama", rank=20, rope_dim=8).out


@pytest.fixture(scope="module")
def quantised(convert_pico):
    return convert_pico("llama", rank=20, rope_dim=8, cache_dtype="int4").out


def with_package_code(folder, copy):
    """A copy of a folder whose files differ from ours, so that the package's classes, which a test can change, run."""
    shutil.copytree(folder, copy)
    (copy / "decode_mla.py").write_text((copy / "decode_mla.py").read_text() + "\n")
    return copy


def test_report_and_card_say_what_was_tried(convert_pico):
    report = convert_pico("llama", rank=20, rope_dim=8)
    found = json.loads((report.out / "report.json").read_text())["self_check"]
    assert found["passed"] and found["layers"] == found["of_layers"] == 3 and found["tokens"] == selfcheck.NEW
    assert found["largest_difference"] < 1e-4 and found["versions"]["transformers"]
    card = (report.out / "README.md").read_text()
    assert f"Tried with transformers {found['versions']['transformers']} and torch {found['versions']['torch']}" in card


def test_runs_the_files_of_the_folder_if_they_are_ours(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert own_code(copy)
    self_check(copy)
    modeling = copy / "modeling_mla.py"
    modeling.write_text(modeling.read_text() + "\nraise SystemExit('this code must not run')\n")
    assert not own_code(copy)
    assert self_check(copy)["passed"]  # by this package's classes
    assert not list(copy.rglob("__pycache__"))


def test_the_configuration_is_another_import_as_transformers_makes_it(folder):
    config, model = selfcheck._classes(folder)
    assert type(config).__name__ == model.config_class.__name__ and type(config) is not model.config_class


def lost(given, names):
    """A cache that is ignored, as if the attention did not know its argument's name."""
    for name in names:
        given.pop(name, None)


@pytest.mark.parametrize(
    ("converted", "name", "broken"),
    [("folder", "take_cache", lost), ("quantised", "take_cache", lost),
     ("folder", "rotate_planes", lambda planes, cos, sin: planes * cos.repeat(1, 1, 1, 2))],
)  # fmt: skip
def test_a_fault_in_cached_attention_is_found(request, tmp_path, monkeypatch, converted, name, broken):
    copy = with_package_code(request.getfixturevalue(converted), tmp_path / "copy")
    original = getattr(attention_mla, name)

    def sometimes(*arguments):
        cached = any(isinstance(value, Cache) for value in (arguments[0].values() if name == "take_cache" else ()))
        wrong = (name == "take_cache" and cached) or (name == "rotate_planes" and arguments[0].shape[2] == 1)
        return (broken if wrong else original)(*arguments)

    monkeypatch.setattr(attention_mla, name, sometimes)
    with pytest.raises(SelfCheckFailed, match=r"self-check: .*cache.*transformers \d.*torch \d"):
        self_check(copy)


def test_codes_at_a_tie_may_fall_either_way(quantised, folder, tmp_path, monkeypatch):
    """Products of other shapes round otherwise, and so a code of the cache may be one step off."""
    copy, plain = with_package_code(quantised, tmp_path / "copy"), attention_mla.write_packed
    settled = self_check(copy)["largest_difference"]

    def one_step_off(fmt, cache, layer_idx, latent, *more):
        query, rows, keys = plain(fmt, cache, layer_idx, latent, *more)
        if latent.shape[2] == 1:  # a decode
            rows = rows.clone()
            code = rows[:, :, -1, fmt.codes4_at] & 15
            rows[:, :, -1, fmt.codes4_at] += torch.where(code < 15, 1, -1).to(torch.uint8)
        return query, rows, keys

    monkeypatch.setattr(attention_mla, "write_packed", one_step_off)
    found = self_check(copy)["largest_difference"]
    assert settled < selfcheck.TOLERANCE[torch.float32] < found < selfcheck.MOST_ROUNDING


@pytest.mark.parametrize(
    ("steps", "dtypes", "passes"),
    [
        ((3,), {torch.bfloat16}, True),
        ((1, 3, 5), {torch.bfloat16}, False),
        ((3,), {torch.bfloat16, torch.float32}, False),
    ],
)
def test_half_precision_may_carry_its_rounding_far_at_single_tokens(convert_pico, monkeypatch, steps, dtypes, passes):
    folder, plain = convert_pico("llama", rank=20, rope_dim=8, dtype="bfloat16").out, selfcheck._generate
    monkeypatch.setattr(selfcheck, "WIDENED", 0)

    def chaotic(model, prompt, use_cache, **options):
        found, cache = plain(model, prompt, use_cache=use_cache, **options)
        if use_cache and model.dtype in dtypes:
            for step in steps:
                found[step] = (found[step][0], found[step][1] + found[step][1].std())
        return found, cache

    monkeypatch.setattr(selfcheck, "_generate", chaotic)
    if passes:
        found = self_check(folder)
        assert found["dtype"] == "bfloat16" and found["float32_difference"] < 1e-3 < 0.05 < found["largest_difference"]
    else:
        with pytest.raises(SelfCheckFailed, match="logits differ by"):
            self_check(folder)


def test_a_failure_leaves_nothing_behind(sources, cli, tmp_path, monkeypatch):
    source = sources("llama")
    monkeypatch.setattr(
        selfcheck, "_check_held", lambda *_: (_ for _ in ()).throw(SelfCheckFailed("self-check: holds nothing"))
    )
    out, text = tmp_path / "out", source.parent / "text.txt"
    code, _, err = cli(
        source, "--rank", 20, "--rope-dim", 8, "--calib", text, "--eval", text, "--calib-samples", 4, "--calib-length", 32,
        "--eval-windows", 1, "--eval-length", 32, "--refine-steps", 0, "--device", "cpu", "--out", out, "-q",
    )  # fmt: skip
    assert code == 1 and err.splitlines() == ["mla-convert: self-check: holds nothing"]
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_a_failure(folder, monkeypatch):
    monkeypatch.setattr(
        attention_mla.MlaAttention, "_attend", lambda self, hidden, *_: (torch.full_like(hidden, torch.nan), None)
    )
    monkeypatch.setattr(selfcheck, "own_code", lambda _: ())
    with pytest.raises(SelfCheckFailed, match="not finite"):
        self_check(folder)


def test_a_model_larger_than_memory_is_tried_in_part(convert_pico, monkeypatch):
    report = convert_pico("llama", rank=20, rope_dim=8)
    size = sum(path.stat().st_size for path in report.out.glob("*.safetensors"))
    monkeypatch.setattr(
        selfcheck.psutil, "virtual_memory", lambda: type("", (), {"available": size / selfcheck.SHARE * 0.7})()
    )
    found = self_check(report.out)
    assert found["passed"] and found["layers"] == 2 and found["of_layers"] == 3
    monkeypatch.setattr(selfcheck.psutil, "virtual_memory", lambda: type("", (), {"available": size * 0.1})())
    with pytest.raises(ResourceError, match="GB are free"):
        self_check(report.out)


def test_a_newer_transformers_than_any_tested_is_said_once(cli, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "99.0.0")
    code, _, err = cli(
        "demo", "--rank", 56, "--rope-dim", 72, "--calib-samples", 2, "--calib-length", 32, "--eval-windows", 1, "--eval-length",
        32, "--refine-steps", 0, "--uniform", "--device", "cpu", "--out", tmp_path / "out", "-q",
    )  # fmt: skip
    (line,) = err.splitlines()
    assert code == 0 and "transformers 99.0.0 is newer than" in line
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("99.0.0" in note for note in report["notes"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mla_transformers"] == "99.0.0"


def test_code_on_a_newer_transformers_than_it_was_tried_with_warns(folder, tmp_path, monkeypatch, recwarn):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder)
    assert not [w for w in recwarn if "was tried with" in str(w.message)]
    monkeypatch.setattr(configuration_mla.transformers, "__version__", "99.0.0")
    with pytest.warns(UserWarning, match="tried with transformers up to .*99.0.0 is installed.*refresh"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_supported_versions_are_said_where_people_look():
    from pathlib import Path

    from mla_convert.version import OLDEST_TRANSFORMERS, TRIED_TRANSFORMERS

    root = Path(__file__).parents[2]
    pinned = f'"transformers>={OLDEST_TRANSFORMERS.removesuffix(".0")}"'
    assert pinned in (root / "pyproject.toml").read_text()
    for page in ("README.md", "docs/faq.md", "docs/start/install.md"):
        text = (root / page).read_text()
        assert f"{OLDEST_TRANSFORMERS} to {TRIED_TRANSFORMERS}" in text, page


def test_verify_run_repeats_it_on_any_folder(folder, cli, tmp_path, monkeypatch):
    code, out, err = cli("verify", folder, "--run")
    assert code == 0 and "generates the same with a dynamic and a static cache as without" in out, err
    code, out, _ = cli("verify", folder, "--run", "--json")
    assert code == 0 and json.loads(out)["self_check"]["passed"] and json.loads(out)["self_check"]["own_code"]

    def fails(*_):
        raise SelfCheckFailed("self-check: it says something else")

    monkeypatch.setattr(selfcheck, "_compare", fails)
    code, _, err = cli("verify", folder, "--run")
    assert code == 1 and err.splitlines() == ["mla-convert: self-check: it says something else"]


def test_exports_are_tried_too(convert_pico, cli, tmp_path):
    source = convert_pico("llama", rank=10, rope_dim=8, rope_selection="engine_table").out
    for profile in ("portable", "hf-code", "engine"):
        out = tmp_path / profile
        code, _, err = cli("export", source, "--profile", profile, "--out", out, "-q")
        assert code == 0, err
        assert json.loads((out / "export.json").read_text()).get("self_check", {}).get("passed") == (
            profile != "engine" or None
        )
        code, _, err = cli("verify", out, "--run")
        assert code == (2 if profile == "engine" else 0), err


def test_nobody_is_asked_about_code_that_is_not_ours(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "modeling_mla.py").write_text("raise SystemExit('this code must not run')\n")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "model_type": "llama", "architectures": ["MlaLlamaForCausalLM"]})
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(SelfCheckFailed):
        self_check(copy)

"""SGLang's plugin: what runs without SGLang, and (marked `engine`) folders served by SGLang on a CPU."""

import importlib
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mla_convert.publish.engines.ask_engine import sglang_options, sglang_setting
from mla_convert.publish.engines.served.prefill import PREFILL_TOKENS, make_prefill
from mla_convert.publish.engines.sglang_plugin import entry, options, pool

ROOT = Path(__file__).parents[2]
SGLANG = os.environ.get("MLA_CONVERT_SGLANG_PYTHON")
needs_sglang = pytest.mark.skipif(
    not SGLANG, reason="MLA_CONVERT_SGLANG_PYTHON names no interpreter that has SGLang and mla_convert"
)


@pytest.fixture
def hooks(monkeypatch):
    """Stands in for SGLang: the hooks that the plugin registered."""
    found = {}
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["sglang"].__version__ = "0.5.17"
    module = sys.modules["sglang.srt.plugins.hook_registry"]
    module.HookRegistry = SimpleNamespace(register=lambda target, hook, kind: found.update({target: (hook, kind)}))
    module.HookType = SimpleNamespace(BEFORE="before", AROUND="around")
    monkeypatch.delenv(entry.VARIABLE, raising=False)
    return found


def settings(config, **changes):
    """Stands in for SGLang's ServerArgs, at their defaults."""
    model = SimpleNamespace(hf_config=config, context_len=256, dtype=torch.float32)
    fields = {"attention_backend": None, "prefill_attention_backend": None, "decode_attention_backend": None, "page_size": None,
              "kv_cache_dtype": "auto", "cuda_graph_backend_prefill": None, "tp_size": 1}  # fmt: skip
    return SimpleNamespace(get_model_config=lambda: model, **fields | changes)


def test_entry_point_is_declared():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["sglang.srt.plugins"]
    module, _, name = points["mla_convert"].partition(":")
    assert getattr(importlib.import_module(module), name) is entry.register


def test_classes_are_named_and_hooks_registered(hooks, caplog):
    entry.register()
    entry.register()
    assert os.environ.pop(entry.VARIABLE) == entry.MODELS and not caplog.records
    assert {target.rpartition(".")[2]: kind for target, (_, kind) in hooks.items()} == {
        "_handle_cuda_graph_config": "before", "_build_token_to_kv_pool": "around", "_compute_cell_size": "around",
    }  # fmt: skip


def test_another_version_is_one_clear_line(hooks, caplog):
    sys.modules["sglang"].__version__ = "0.5.23"
    with caplog.at_level(logging.WARNING):
        entry.register()
    (record,) = caplog.records
    assert "SGLang 0.5.17, and 0.5.23 is installed" in record.message and "mla-convert export" in record.message
    # The classes are named all the same: SGLang's fallback must not take them.
    assert os.environ.pop(entry.VARIABLE) == entry.MODELS and not hooks
    assert entry.serves("0.5.17.post1") and not entry.serves("0.5.170") and not entry.serves("0.5.18")


def test_another_package_of_classes_is_one_clear_line(hooks, caplog, monkeypatch):
    monkeypatch.setenv(entry.VARIABLE, "theirs")
    with caplog.at_level(logging.WARNING):
        entry.register()
    (record,) = caplog.records
    assert "(theirs)" in record.message and not hooks


def test_settings_of_a_converted_model_are_chosen(convert_pico):
    config = AutoConfig.from_pretrained(convert_pico("llama", rank=10, rope_dim=8).out)
    chosen = settings(config)
    options.prepare(chosen)
    assert (chosen.attention_backend, chosen.page_size, chosen.cuda_graph_backend_prefill) == (
        options.BACKEND,
        64,
        "disabled",
    )
    kept = settings(config, page_size=16)
    options.prepare(kept)
    assert kept.page_size == 16
    stock = settings(SimpleNamespace(model_type="llama"))
    options.prepare(stock)
    assert stock.attention_backend is None and stock.cuda_graph_backend_prefill is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_backend": "triton"}, "leave out --attention-backend triton"),
        ({"page_size": 1}, "leave out --page-size 1"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "leave out --kv-cache-dtype fp8_e4m3"),
        ({"kv_cache_dtype": "bfloat16"}, "leave out --kv-cache-dtype bfloat16"),  # of a model in float32
        ({"cuda_graph_backend_prefill": "full"}, "leave out --cuda-graph-backend-prefill"),
        ({"speculative_algorithm": "EAGLE"}, "leave out --speculative-algorithm"),
        ({"pp_size": 2}, "leave out --pp-size"),
        ({"tp_size": 4}, "6 heads cannot be split over 4 devices"),
    ],
)
def test_settings_that_are_not_served_are_refused(convert_pico, changes, words):
    config = AutoConfig.from_pretrained(convert_pico("llama", rank=10, rope_dim=8).out)
    with pytest.raises(ValueError, match=words) as error:
        options.prepare(settings(config, **changes))
    assert "\n" not in str(error.value) and str(error.value).startswith("converted model: ")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("phi", {}, "the plugin serves llama"),
        ("llama-dynamic", {}, "RoPE of type dynamic"),
        ("llama", {"latent_cache": {"kind": "int4"}}, "quantised as int4"),
        ("llama", {"mla_of_tomorrow": True}, "mla_of_tomorrow in config.json"),
    ],
)
def test_models_that_are_not_served_are_refused(convert_pico, name, changes, words):
    config = AutoConfig.from_pretrained(convert_pico(name, rank=10, rope_dim=8).out)
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=words):
        options.prepare(settings(config))


def test_the_cache_has_a_width_for_each_layer(convert_pico):
    config = AutoConfig.from_pretrained(convert_pico("llama", kv_ratio=0.6, uniform=False).out)
    ranks = [config.layer_rank(layer) for layer in range(3)]
    assert len(set(ranks)) > 1
    rows = pool.widths(config, range(3))
    assert all(
        row % 16 == 0 and row >= rank + config.layer_rope_dim(layer)
        for layer, (row, rank) in enumerate(zip(rows, ranks, strict=True))
    )
    runner = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config), kv_cache_dtype=torch.bfloat16,
        layer_info=SimpleNamespace(start_layer=1, end_layer=3),
    )  # fmt: skip
    assert pool.token_bytes(None, None, runner, 2) == 2 * sum(rows[1:])
    runner.model_config.hf_config = SimpleNamespace(model_type="llama")
    assert pool.token_bytes(lambda *_: 7, None, runner, 2) == 7


def test_prompts_are_read_in_groups_of_neighbours():
    table = torch.arange(4 * PREFILL_TOKENS).view(4, -1)
    lens = [PREFILL_TOKENS - 5, 3, 9, 4]
    made = make_prefill(2, [7, 3, 0, 1], lens, lambda request, position: table[request, position], torch.device("cpu"))
    assert made.first == 2 and [(g.first, g.stop, g.query_lens, g.key_lens) for g in made.groups] == [
        (0, 10, [7, 3], lens[:2]), (10, 11, [1], [4])
    ]  # fmt: skip
    rows = made.groups[0].rows
    assert torch.equal(rows, torch.cat([table[0, : lens[0]], table[1, :3]]))
    assert made.groups[0].query_starts.tolist() == [0, 7, 10] and made.groups[0].key_starts.tolist() == [
        0,
        lens[0],
        lens[0] + 3,
    ]
    assert torch.equal(made.groups[1].rows, table[3, :4])


def test_what_sglang_is_asked_for(tmp_path):
    asked = {"prompts": [[1] * 64, [2] * 3], "tokens": 16, "dtype": "float32", "trust_remote_code": False, "chunk": 40,
             "prefix_caching": True, "eager": False}  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "mla_llama"}')
    found = sglang_options(str(tmp_path), asked, cuda=True)
    assert (found["page_size"], found["chunked_prefill_size"], found["disable_radix_cache"]) == (16, 48, False)
    assert found["context_length"] > 80 and "disable_cuda_graph" not in found and "device" not in found
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    found = sglang_options(str(tmp_path), asked | {"prefix_caching": False, "eager": True, "memory": 0.2}, cuda=False)
    assert "page_size" not in found and found["chunked_prefill_size"] == 40 and found["disable_radix_cache"]
    assert found["disable_cuda_graph"] and found["device"] == "cpu" and found["attention_backend"] == "triton"
    assert found["mem_fraction_static"] == 0.2


def test_what_sglang_answered_with():
    info = {"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "auto", "attention_backend": "fa3",
            "prefill_attention_backend": None, "decode_attention_backend": "triton", "disable_radix_cache": True,
            "chunked_prefill_size": 8192, "cuda_graph_config": {"decode": {"backend": "full"}}}  # fmt: skip
    assert sglang_setting(info) == {"backend": "fa3, triton", "cache_dtype": "bfloat16", "cache_widths": [],
                                    "prefix_caching": False, "chunk": 8192, "graphs": "full"}  # fmt: skip
    found = sglang_setting(info | {"device": "cpu", "kv_cache_dtype": "fp8_e5m2"})
    assert (found["graphs"], found["cache_dtype"]) == ("none", "fp8_e5m2")


def test_stand_ins_take_what_sglang_asks_of_them(tmp_path):
    subprocess.run([sys.executable, ROOT / "benchmarks/sglang_gpu/stand_ins.py", tmp_path, "stood_for"], check=True)
    code = "import stood_for.a.b; from stood_for.c import D; D.e(1, f=2); stood_for.g(); print(hasattr(D, '__len__'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# SGLang itself: .ci/engines installs it and runs these


@pytest.mark.engine
@needs_sglang
@pytest.mark.parametrize(
    "name",
    ["llama", "llama-linear", "llama-yarn", "llama3-rope", "llama-mha-tied", "llama-bias-wide-heads", "mistral",
     "mistral-window", "qwen2", "qwen3", "arcee", "cohere", "glm4", "granite", "phi3", "stablelm"],
)  # fmt: skip
def test_sglang_serves_layers_of_different_sizes(cli, convert_pico, name):
    folder = convert_pico(name, kv_ratio=0.6, uniform=False).out
    code, out, err = cli("serve-check", folder, "--engine", "sglang", "--python", SGLANG)
    assert code == 0, out + err
    assert "backend mla_convert" in out and "the same continuation for 4 of 4" in out and "chunks of 48" in out


@pytest.mark.engine
@needs_sglang
def test_sglang_serves_an_export(cli, convert_pico, tmp_path):
    converted = convert_pico("llama", rank=16, rope_dim=8, rope_selection="engine_table").out
    out = tmp_path / "export"
    code, _, err = cli("export", converted, "--profile", "portable", "--pad", "512", "--out", out)
    assert code == 0, err
    code, words, err = cli("serve-check", out, "--engine", "sglang", "--python", SGLANG, "--against", converted)
    assert code == 0, words + err
    assert "backend triton" in words and "the same continuation for 4 of 4" in words


@pytest.mark.engine
@needs_sglang
@pytest.mark.parametrize(
    ("name", "words"), [("phi", "the plugin serves llama"), ("llama-dynamic", "RoPE of type dynamic")]
)
def test_sglang_refuses_in_one_line(cli, convert_pico, name, words):
    folder = convert_pico(name, rank=10, rope_dim=8).out
    code, _, err = cli("serve-check", folder, "--engine", "sglang", "--python", SGLANG)
    assert code == 5 and words in err and err.count("\n") == 1


@pytest.mark.engine
@needs_sglang
def test_sglang_refuses_a_checkpoint_with_a_tensor_missing(cli, convert_pico, tmp_path):
    folder = shutil.copytree(convert_pico("llama", rank=10, rope_dim=8).out, tmp_path / "model")
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if tensors.pop("model.layers.1.self_attn.rope_freq_index", None) is not None:
            save_file(tensors, file, {"format": "pt"})
    code, _, err = cli("serve-check", folder, "--engine", "sglang", "--python", SGLANG)
    assert code == 5 and "rope_freq_index is missing from the checkpoint" in err

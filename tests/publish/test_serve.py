"""Conversions for an engine, the commands export and serve-check, and (marked `engine`) real engines."""

import json
import os
import re
import subprocess
import sys

import pytest

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.settings import ConvertConfig
from mla_convert.publish.engines.target_engine import apply_constraints
from mla_convert.source.source import open_source

VLLM, MODEL = os.environ.get("MLA_CONVERT_VLLM_PYTHON"), os.environ.get("MLA_CONVERT_MODEL")
LLAMA_SERVER, LLAMA_CONVERTER = (
    os.environ.get("MLA_CONVERT_LLAMA_SERVER"),
    os.environ.get("MLA_CONVERT_LLAMA_CONVERTER"),
)


@pytest.fixture(scope="module")
def tabled(convert_pico):
    return convert_pico("llama", rank=10, rope_dim=8, rope_selection="engine_table").out


@pytest.fixture
def exported(cli, tabled, tmp_path):
    def run(*options, folder=tabled):
        code, out, err = cli("export", folder, "--out", tmp_path / "out", *options)
        assert code == 0, err  # a slow machine says how far it is
        return tmp_path / "out", out

    return run


class Like:
    """The attributes of a source that `apply_constraints` reads."""

    def __init__(self, kv_heads, head_dim, hidden=4096, model_type="llama", rope="default", bias=False, normed=False):
        from types import SimpleNamespace

        from mla_convert.source.shape import AttentionShape

        self.name, self._bias = "model", bias
        self.family = SimpleNamespace(model_type=model_type)
        self.config = SimpleNamespace(rope_parameters={"rope_type": rope}, hidden_act="silu")
        self.shape = AttentionShape(32, hidden, 32, kv_heads, head_dim, normed=normed)

    def has_bias(self, letter):
        return self._bias


def settings(source, **options):
    found = apply_constraints(ConvertConfig(source="model", **options), source)
    return found.rank, found.rope_dim, found.rope_selection, found.uniform


def test_towards_chooses_what_vllm_has_kernels_for():
    assert settings(Like(8, 128), engine="vllm") == (512, 64, "engine_table", True)  # Llama-3-8B
    assert settings(Like(8, 128), engine="vllm", kv_ratio=0.2) == (256, 64, "engine_table", True)
    assert settings(Like(8, 64), engine="vllm") == (512, 64, "engine_table", True)  # Llama-3.2-1B
    assert settings(Like(3, 64, 576), engine="vllm") == (256, 64, "engine_table", True)  # SmolLM2-135M: 83%
    assert settings(Like(4, 128, bias=True, model_type="qwen2"), engine="vllm") == (512, 64, "by_loss", True)
    assert settings(Like(8, 128, model_type="qwen3", normed=True), engine="vllm") == (512, 64, "by_loss", True)
    assert settings(Like(8, 128, rope="llama3"), engine="vllm") == (512, 64, "by_loss", True)
    assert settings(Like(8, 128, rope="llama3"), engine="vllm", rope_selection="engine_table")[2] == "engine_table"
    assert settings(Like(3, 64, 576), engine="llama.cpp", kv_ratio=0.34) == (64, 64, "engine_table", True)


def test_towards_without_an_engine_changes_nothing():
    config = ConvertConfig(source="model", kv_ratio=0.3)
    assert apply_constraints(config, Like(8, 128)) is config


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        (Like(2, 64), {"engine": "vllm"}, InputError, r"least that vLLM has kernels for is 320 \(125%\)"),
        (Like(8, 128), {"engine": "vllm", "kv_ratio": 0.1}, InputError, "least that vLLM"),
        (Like(8, 128), {"engine": "vllm", "rank": 300}, UsageError, "give 256, 448 or 512"),
        (Like(8, 128), {"engine": "vllm", "rank": "full"}, UsageError, "give 256, 448 or 512"),
        (Like(8, 128), {"engine": "vllm", "rope_dim": 96}, UsageError, "at most 64"),
        (Like(8, 128), {"engine": "vllm", "rope_selection": "evenly_spaced"}, UsageError, "--rope-selection evenly"),
        (Like(8, 128), {"engine": "sglang", "rope_selection": "by_loss"}, UsageError, "--rope-selection by_loss"),
        (
            Like(8, 128, rope="llama3"),
            {"engine": "sglang"},
            InputError,
            "RoPE of type llama3, .* and sglang runs no code",
        ),
        (Like(8, 128, bias=True), {"engine": "llama.cpp"}, InputError, "biases"),
        (Like(8, 128, model_type="qwen3", normed=True), {"engine": "sglang"}, InputError, "norms on queries and keys"),
        (Like(8, 128, rope="longrope"), {"engine": "vllm"}, InputError, "RoPE of type longrope"),
        (Like(8, 128, model_type="gemma2"), {"engine": "vllm"}, InputError, "family gemma2"),
    ],
)
def test_towards_refuses(source, options, error, words):
    with pytest.raises(error, match=words):
        settings(source, **options)


def test_real_sources_have_what_towards_asks(sources):
    with pytest.raises(InputError, match=r"biases in its attention, .* and sglang"):
        settings(open_source(str(sources("qwen2"))), engine="sglang")


@pytest.mark.parametrize(
    ("name", "options", "code", "words"),
    [
        ("llama", ("--export", "other"), 2, "none of portable, engine, hf-code"),
        (
            "llama",
            ("--export", "portable", "--rank", 12),
            2,
            "--export needs one size for all layers: add --for ENGINE",
        ),
        (
            "llama",
            ("--export", "portable", "--rank", 12, "--uniform"),
            2,
            "needs planes of one table: add --for ENGINE",
        ),
        (
            "llama",
            ("--export", "portable", "--for", "llama.cpp", "--rank", 12, "--dtype", "float16"),
            4,
            "float16 cannot",
        ),
        (
            "qwen2",
            ("--export", "portable", "--uniform", "--rope-selection", "engine_table"),
            4,
            "biases .*--profile hf-code",
        ),
        ("mistral-window", ("--export", "hf-code", "--uniform"), 4, "sliding window of 12"),
        ("mistral-window", ("--for", "vllm"), 4, "sliding window of 12"),
        ("gemma3", ("--export", "hf-code", "--uniform"), 4, "family gemma3"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_the_conversion(cli, sources, tmp_path, name, options, code, words):
    text = sources(name).parent / "text.txt"
    found, out, err = cli("convert", sources(name), *options, "--calib", text, "--eval", text, "--out", tmp_path / "out",
                          "--device", "cpu")  # fmt: skip
    assert found == code and re.search(words, err) and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())


def test_convert_for_an_engine_and_export(cli, sources, tmp_path):
    source = sources("llama")
    text = source.parent / "text.txt"
    code, _, err = cli("convert", source, "--for", "llama.cpp", "--rank", 12, "--export", "portable", "--out", tmp_path / "mla",
                       "--calib", text, "--calib-samples", 8, "--calib-length", 32, "--refine-steps", 0, "--eval", text,
                       "--eval-windows", 2, "--eval-length", 32, "--device", "cpu")  # fmt: skip
    assert code == 0 and "profile portable" in err, err
    report = json.loads((tmp_path / "mla" / "report.json").read_text())
    assert report["settings"]["uniform"] and report["settings"]["rope_selection"] == "engine_table"
    assert all(layer["plane_frequencies"] == [0, 1, 2, 3] for layer in report["layers"])
    code, out, err = cli("serve-check", tmp_path / "mla-portable", "--engine", "transformers", "--json", "--quiet")
    found = json.loads(out)
    assert code == 0 and not err and found["ok"]
    assert found["max_difference"] < 1e-4 and found["greedy_same"] == found["prompts"]
    assert (
        0 < found["own_rounding"] < 1e-4
    )  # the reference is float64, so the converted model's own float32 differs too


def test_export_json(exported):
    folder, out = exported("--json", "--pad", "512", "--quiet")
    found = json.loads(out)
    assert found["kv_lora_rank"] == 512 and found["cache_numbers"] == 576 and found["profile"] == "portable"
    facts = json.loads((folder / "export.json").read_text())
    assert len(facts["checksums"]) == 5 and facts["latent_norm_distortion"] < 1e-5
    assert (folder / "tokenizer.json").is_file() and "vllm serve" in (folder / "README.md").read_text()


def test_eval_measures_an_export_or_says_why_not(cli, exported, tabled, sources):
    text = ("--eval", sources("llama").parent / "text.txt", "--eval-windows", 2, "--eval-length", 48, "--device", "cpu")
    code, out, _ = cli("eval", exported()[0], *text, "--json")
    assert code == 0
    _, own, _ = cli("eval", tabled, *text, "--json")
    found, expected = (json.loads(words)["evaluation"]["after"]["value"] for words in (out, own))
    assert found == pytest.approx(expected, rel=1e-4)
    for profile in ("engine", "hf-code"):
        code, _, err = cli("eval", exported("--profile", profile, "--overwrite")[0], *text)
        assert code == 4 and f"(profile {profile})" in err and "would misread" in err


def test_export_keeps_what_is_there(cli, exported, tabled):
    folder, _ = exported()
    code, _, err = cli("export", tabled, "--out", folder)
    assert code == 4 and "--overwrite" in err
    assert cli("export", tabled, "--out", folder, "--overwrite")[0] == 0
    code, _, err = cli("export", tabled, "--out", tabled)
    assert code == 4 and "is or contains the source" in err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [(("--profile", "other"), 2, "none of portable, engine, hf-code"), (("--pad", "100"), 2, "none of auto, none, 256"),
     (("--dtype", "int8"), 2, "none of auto"), (("--dtype", "float16"), 4, "float16")],
)  # fmt: skip
def test_export_refuses_in_one_line(cli, tabled, tmp_path, options, code, words):
    found, out, err = cli("export", tabled, "--out", tmp_path / "out", *options)
    assert found == code and words in err and err.count("\n") == 1 and not out and not (tmp_path / "out").exists()


def test_serve_check_finds_another_model(cli, exported, convert_pico):
    folder, _ = exported()
    other = convert_pico("llama", rank=6, rope_dim=4).out
    code, out, err = cli("serve-check", folder, "--engine", "transformers", "--against", other)
    assert code == 3 and "WRONG" in out and "answers other than the converted model" in err


def test_serve_check_in_bfloat16_allows_rounding_only(cli, exported, tabled):
    folder, _ = exported("--dtype", "bfloat16")
    code, out, _ = cli("serve-check", folder, "--engine", "transformers", "--against", tabled, "--json")
    found = json.loads(out)
    assert (
        code == 0 and found["dtype"] == "bfloat16" and 0 < found["mean_difference"] <= 2 * found["own_rounding"] + 1e-4
    )
    assert cli("serve-check", folder, "--engine", "transformers", "--against", tabled, "--limit", "1e-9")[0] == 3


def test_serve_check_judges_by_the_mean_where_float32_itself_decides_nothing(cli, exported, tabled, monkeypatch):
    folder, _ = exported()
    check = ("serve-check", folder, "--engine", "transformers", "--against", tabled)
    found = json.loads(cli(*check, "--json")[1])
    assert found["ok"] and not found["by_mean"] and found["limit"] == pytest.approx(1e-4)
    monkeypatch.setattr("mla_convert.publish.engines.serve_check.DECIDED", 0)  # as quantised rows cost in a deep model
    code, out, _ = cli(*check)
    assert code == 0 and "mean difference at most" in out and "float32 costs our own model" in out


@pytest.mark.parametrize(
    ("profile", "options", "code", "words"),
    [
        ("portable", ("--engine", "tgi"), 2, "none of vllm, sglang, transformers, llama.cpp"),
        ("engine", ("--engine", "transformers"), 2, "profile engine is not for transformers"),
        ("engine", ("--engine", "vllm", "--model-impl", "transformers"), 2, "profile engine is not for transformers"),
        ("engine", ("--engine", "llama.cpp"), 2, "give it as --gguf"),
        ("engine", ("--engine", "llama.cpp", "--gguf", "none.gguf"), 4, "none.gguf not found"),
        ("hf-code", ("--engine", "sglang"), 2, "whose code sglang does not run"),
        ("hf-code", ("--engine", "vllm"), 2, "read it, then give --trust-remote-code"),
        ("portable", ("--engine", "transformers", "--dtype", "float16"), 2, "underflow"),
        ("portable", ("--engine", "sglang"), 5, "sglang could not be asked: ModuleNotFoundError"),
        ("portable", ("--engine", "vllm", "--python", "no-such-python"), 5, "no-such-python is no interpreter"),
    ],
)
def test_serve_check_refuses_in_one_line(cli, exported, tabled, profile, options, code, words):
    folder, _ = exported("--profile", profile)
    found, out, err = cli("serve-check", folder, "--against", tabled, *options)
    assert found == code and words in err and err.count("\n") == 1 and not out


def test_serve_check_of_a_folder_that_is_no_export(cli, tabled):
    code, _, err = cli("serve-check", tabled.parent, "--engine", "transformers")
    assert code == 4 and "export.json" in err


def test_serve_check_of_code(cli, exported, convert_pico):
    converted = convert_pico("qwen2", rank=12, rope_dim=6).out
    folder, _ = exported("--profile", "hf-code", folder=converted)
    code, out, err = cli(
        "serve-check", folder, "--engine", "transformers", "--against", converted, "--trust-remote-code"
    )
    assert code == 0 and "MlaServedForCausalLM" in out, err


def test_sglang_is_asked_as_it_is_called(tmp_path, monkeypatch):
    """Answers in the form of sglang.Engine (return_logprob), from a stub; the second ones from its radix cache."""
    from mla_convert.publish.engines import ask_engine

    class Engine:
        def __init__(self, **options):
            assert options["model_path"] == str(tmp_path) and options["skip_tokenizer_init"]

        def generate(self, input_ids, sampling_params, return_logprob=False, logprob_start_len=-1, top_logprobs_num=0):
            assert (
                sampling_params["temperature"] == 0 and (logprob_start_len == 0 and top_logprobs_num) == return_logprob
            )
            return [self.answer(ids, sampling_params["max_new_tokens"], return_logprob) for ids in input_ids]

        def answer(self, ids, tokens, scored):
            own = [(None, ids[0], None), *((-1.0, token if token != 9 else 0, None) for token in ids[1:])]
            top = [None, *([(-0.5, 7, None)] for _ in ids[1:])]
            meta = {"input_token_logprobs": own, "input_top_logprobs": top} if scored else {"cached_tokens": 2}
            return {"meta_info": meta, "output_ids": [3] * tokens}

        def get_server_info(self):
            return {"device": "cpu", "dtype": "float32", "kv_cache_dtype": "auto", "attention_backend": "triton",
                    "prefill_attention_backend": None, "decode_attention_backend": None, "disable_radix_cache": False,
                    "chunked_prefill_size": 48, "cuda_graph_config": {"decode": {"backend": "full"}}}  # fmt: skip

        def shutdown(self):
            pass

    module = type(sys)("sglang")
    module.Engine, module.__version__ = Engine, "0"
    monkeypatch.setitem(sys.modules, "sglang", module)
    for variable in ("SGLANG_USE_CPU_ENGINE", "TRITON_INTERPRET"):  # what ask_sglang sets is taken back
        monkeypatch.setenv(variable, "1")
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    asked = {"prompts": [[4, 5, 6], [8, 9]], "tokens": 2, "top": 1, "dtype": "float32", "trust_remote_code": False,
             "prefix_caching": True}  # fmt: skip
    found = ask_engine.ask_sglang(str(tmp_path), asked)
    assert [entry["logprobs"] for entry in found["prompts"]] == [
        [{7: -0.5, 5: -1.0}, {7: -0.5, 6: -1.0}],
        [{7: -0.5, 9: -1.0}],
    ]
    assert all(entry["greedy"] == entry["greedy_from_cache"] == [3, 3] for entry in found["prompts"])
    assert all(entry["cached_tokens"] == 2 for entry in found["prompts"]) and found["setting"]["graphs"] == "none"


# real engines: .ci/engines installs them and runs these


needs_vllm = pytest.mark.skipif(not VLLM, reason="MLA_CONVERT_VLLM_PYTHON names no interpreter that has vLLM")
needs_model = pytest.mark.skipif(not MODEL, reason="MLA_CONVERT_MODEL names no real model")
needs_llama = pytest.mark.skipif(
    not (LLAMA_SERVER and LLAMA_CONVERTER),
    reason="MLA_CONVERT_LLAMA_SERVER and MLA_CONVERT_LLAMA_CONVERTER are not both set",
)


def check(cli, folder, against, engine, *options):
    code, out, err = cli("serve-check", folder, "--engine", engine, "--against", against, *options)
    print(out)
    return code, out + err


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize(
    ("name", "settings", "profile", "options", "path"),
    [
        (
            "llama",
            {"rank": 10, "rope_dim": 8, "rope_selection": "engine_table"},
            "portable",
            (),
            "DeepseekV3ForCausalLM",
        ),
        (
            "llama",
            {"rank": 10, "rope_dim": 8, "rope_selection": "engine_table"},
            "portable",
            ("--model-impl", "transformers"),
            "Transformers",
        ),
        ("llama", {"rank": 12, "rope_dim": 6}, "hf-code", ("--trust-remote-code",), "Transformers"),
        ("qwen2", {"rank": 12, "rope_dim": 6}, "hf-code", ("--trust-remote-code",), "Transformers"),
        ("qwen3", {"rank": 12, "rope_dim": 6}, "hf-code", ("--trust-remote-code",), "Transformers"),
        ("llama3-rope", {"rank": 12, "rope_dim": 6}, "hf-code", ("--trust-remote-code",), "Transformers"),
    ],
)
def test_vllm(cli, exported, convert_pico, name, settings, profile, options, path):
    converted = convert_pico(name, **settings).out
    folder, _ = exported("--profile", profile, "--pad", "512", folder=converted)
    code, words = check(cli, folder, converted, "vllm", "--python", VLLM, *options)
    assert code == 0 and path in words, words


@pytest.mark.engine
@needs_vllm
def test_vllm_with_profile_engine(cli, exported, tabled):
    folder, _ = exported("--profile", "engine", "--pad", "512")
    code, words = check(cli, folder, tabled, "vllm", "--python", VLLM)
    assert code == 0, words


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real model in sizes that vLLM supports, in closed form with little text: only its serving is compared."""
    from mla_convert import convert
    from mla_convert.core.progress import Progress

    config = ConvertConfig(source=MODEL, engine="vllm", refine_steps=0, calib_samples=8,
                           calib_length=128, eval_windows=1, eval_length=128, dtype="float32", device="cpu",
                           calib="package:mla_demo/calibration.txt.gz", eval="package:mla_demo/evaluation.txt.gz",
                           out=tmp_path_factory.mktemp("real") / "mla")  # fmt: skip
    return convert(config, Progress(quiet=True)).out


@pytest.mark.engine
@needs_vllm
@needs_model
@pytest.mark.parametrize(
    ("profile", "dtype", "options"),
    [("portable", "float32", ()), ("portable", "float32", ("--model-impl", "transformers")), ("portable", "bfloat16", ()),
     ("engine", "float32", ()), ("hf-code", "float32", ("--trust-remote-code",))],
)  # fmt: skip
def test_vllm_with_a_real_model(cli, exported, real, profile, dtype, options):
    folder, _ = exported("--profile", profile, "--dtype", dtype, "--pad", "512", folder=real)
    code, words = check(cli, folder, real, "vllm", "--python", VLLM, *options)
    assert code == 0, words


@pytest.mark.engine
@needs_llama
@needs_model
def test_llama_cpp_with_a_real_model(cli, exported, real, tmp_path):
    """Differences grow with the file's type: float32, bfloat16, eight bits."""
    folder, _ = exported("--profile", "engine", "--gguf", "--pad", "none", folder=real)
    means = []
    for kind, limit in (("f32", 5e-3), ("bf16", 5e-2), ("q8_0", 0.3)):
        file = tmp_path / f"model-{kind}.gguf"
        subprocess.run([sys.executable, LLAMA_CONVERTER, folder, "--outtype", kind, "--outfile", file], check=True)
        code, words = check(
            cli, folder, real, "llama.cpp", "--gguf", file, "--server", LLAMA_SERVER, "--limit", limit, "--json"
        )
        assert code == 0, words
        means.append(json.loads(words)["mean_difference"])
    assert means == sorted(means)

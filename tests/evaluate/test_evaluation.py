"""`eval` measures what `convert` measures, and how far a model is from its original."""

import gc
import json
import math
import re
import shutil
import subprocess
import sys
import weakref

import pico
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MambaConfig

from mla_convert.core.errors import InputError
from mla_convert.core.progress import Progress
from mla_convert.evaluate.quality import evaluation as evaluate
from mla_convert.evaluate.quality import perplexity as measures
from mla_convert.modeling.shipped_code import CODE
from mla_convert.source import load_model as loading
from mla_convert.source import texts

USAGE, INPUT, RESOURCE = 2, 4, 5
RANK, ROPE_DIM = 10, 6
QUIET = Progress(quiet=True)
WINDOWS = {"windows": 4, "length": 48, "device": "cpu", "progress": QUIET}


@pytest.fixture
def measure(sources):
    """Evaluate on the text that the pico conversions are evaluated on."""

    def run(model, against=None, **options):
        text = str(sources("llama").parent / "text.txt")
        return evaluate.evaluate_model(str(model), against and str(against), **{"text": text, **WINDOWS, **options})

    return run


@pytest.fixture
def small(sources):
    """Options of a quick evaluation from the command line."""
    text = sources("llama").parent / "text.txt"
    return "--eval", text, "--eval-windows", 4, "--eval-length", 48, "--device", "cpu"


def windows(folder):
    return texts.evaluation_windows(pico.text(), AutoTokenizer.from_pretrained(folder), 4, 48, "text")


@pytest.mark.parametrize("name", ["llama3-rope", "llama-mha-tied", "mistral-window", "qwen2"])
def test_perplexity_is_that_of_the_conversion(convert_pico, sources, measure, name):
    report = convert_pico(name, rank=RANK, rope_dim=ROPE_DIM)
    found = measure(report.out, sources(name))
    for ours, key in ((found.before, "before"), (found.after, "after")):
        expected = report.evaluation[key]
        assert ours.value == pytest.approx(expected["value"], rel=1e-4)
        assert ours.log_error == pytest.approx(expected["log_error"], rel=1e-3)
        assert (ours.windows, ours.length) == (expected["windows"], expected["length"]) == (4, 48)
    assert found.ratio.value == pytest.approx(report.perplexity_ratio, rel=1e-4)
    assert 0 < found.ratio.error < found.after.log_error + found.before.log_error
    assert found.kl.value > 0 and 0 < found.agreement.value < 1
    assert found.text == "text.txt" and found.protocol == report.evaluation["protocol"]
    assert found.dtype == "float32" and found.converted and found.against == "source"


@pytest.mark.parametrize("name", ["llama-yarn", "llama-bias-wide-heads", "mistral-window", "qwen2"])
def test_exact_conversion_is_the_original(convert_pico, sources, measure, name):
    found = measure(convert_pico(name, rank="full", rope_dim="full").out, sources(name))
    assert found.ratio.value == pytest.approx(1, abs=1e-5)
    assert abs(found.kl.value) < 1e-7 and found.kl.error < 1e-7
    assert found.agreement == evaluate.Mean(value=1.0, error=0.0)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2"])
def test_cache_bytes(convert_pico, sources, measure, name, dtype):
    folder = convert_pico(name, rank=RANK, rope_dim=ROPE_DIM).out
    config, itemsize = pico.config(name), 4 if dtype in ("auto", "float32") else 2
    alone = measure(folder, windows=1, dtype=dtype)
    assert alone.bytes_after == config.num_hidden_layers * (RANK + ROPE_DIM) * itemsize
    assert alone.bytes_before == config.num_hidden_layers * 32 * itemsize and not alone.before_is_measured
    both = measure(folder, sources(name), windows=1, dtype=dtype)
    assert (both.bytes_after, both.bytes_before) == (alone.bytes_after, alone.bytes_before) and both.before_is_measured
    assert alone.share_saved == both.share_saved == 0.5


def test_figures_by_hand(convert_pico, sources, measure, monkeypatch):
    """Against the whole logits of both models, in chunks of a few tokens and in one."""
    folder = convert_pico("llama", rank=RANK, rope_dim=ROPE_DIM).out
    ids = windows(folder)
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(ids).logits[:, :-1].double().log_softmax(-1)
                        for path in (folder, sources("llama")))  # fmt: skip
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean(1)
    change = (theirs - ours).gather(-1, ids[:, 1:, None])[..., 0].mean(1)
    for logits in (measures.LOGITS, 7 * pico.VOCAB, 1):
        monkeypatch.setattr(measures, "LOGITS", logits)
        found = measure(folder, sources("llama"))
        assert found.kl.value == pytest.approx(float(kl.mean()), rel=1e-4)
        assert found.kl.error == pytest.approx(float(kl.std()) / 2, rel=1e-3)
        assert found.agreement.value == pytest.approx(float(agreement.mean()))
        assert found.agreement.error == pytest.approx(float(agreement.std()) / 2, rel=1e-4)
        assert found.ratio.value == pytest.approx(math.exp(float(change.mean())), rel=1e-5)
        assert found.ratio.error == pytest.approx(float(change.std()) / 2, rel=1e-3)


def test_logits_are_float32_of_half_precision_models(convert_pico):
    model = AutoModelForCausalLM.from_pretrained(convert_pico("llama-mha-tied", kv_ratio=0.5).out, dtype=torch.bfloat16)
    ids = windows(model.config.name_or_path)
    readout = evaluate.Readout(model, ids)
    logits = readout.logits(0, 3, 9)
    assert logits.dtype == torch.float32 and logits.shape == (6, pico.VOCAB)
    with torch.no_grad():
        hidden = model.model(ids[:1]).last_hidden_state[0, 3:9].float()
        assert torch.equal(logits, hidden @ model.lm_head.weight.float().T)
        again = model(ids[:1])  # the model is as it was
    assert again.logits.dtype == model.dtype and model.lm_head.weight is model.model.embed_tokens.weight


def test_the_decoder_can_go(convert_pico):
    """A readout keeps the head alone, so that the original fits where the model was."""
    model = AutoModelForCausalLM.from_pretrained(convert_pico("llama", kv_ratio=0.5).out)
    ids, decoder = windows(model.config.name_or_path), weakref.ref(model.model)
    readout, expected = evaluate.Readout(model, ids), pico.losses(model, ids)
    del model
    gc.collect()
    assert decoder() is None
    assert torch.equal(evaluate.score(readout, ids).losses, expected)


def test_no_cache_to_measure(measure, tmp_path):
    config = MambaConfig(vocab_size=pico.VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pico.tokenizer().save_pretrained(tmp_path)
    refused("KV cache", lambda: measure(tmp_path))


def test_a_model_that_is_not_converted(sources, measure):
    found = measure(sources("qwen2"))
    assert not found.converted and found.bytes_after == 3 * 32 * 4
    assert found.bytes_before is found.share_saved is found.ratio is found.before is None
    same = measure(sources("qwen2"), sources("qwen2"))
    assert same.ratio == evaluate.Mean(value=1.0, error=0.0) and same.share_saved == 0 and same.agreement.value == 1


def test_another_architecture(measure, tmp_path):
    """No family of ours: positions in the embedding, another name for the decoder."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=pico.VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    pico.tokenizer().save_pretrained(tmp_path)
    ids = windows(tmp_path)
    with torch.no_grad():
        expected = math.exp(model(ids, labels=ids).loss)
    found = measure(tmp_path)
    assert found.after.value == pytest.approx(expected, rel=1e-5)
    assert found.bytes_after == 2 * 2 * 16 * 4


def test_gguf_original(convert_folder, measure, tmp_path):
    (tmp_path / "text.txt").write_text(pico.text())
    source = pico.save_gguf(tmp_path / "tiny.gguf")
    report = convert_folder(source, kv_ratio=0.5, dtype="float32")
    found = measure(report.out, source)
    assert found.against == "tiny.gguf" and found.ratio.value == pytest.approx(report.perplexity_ratio, rel=1e-4)
    assert measure(source).after == found.before


def test_single_window_has_no_error(convert_pico, measure):
    content = measure(convert_pico("llama", kv_ratio=0.5).out, windows=1).as_dict()
    assert content["evaluation"]["after"]["log_error"] is None
    assert content["evaluation"]["after"]["windows"] == 1


def test_windows_are_the_conversions_unless_told(convert_pico, measure):
    report = convert_pico("llama", kv_ratio=0.5)
    found = measure(report.out, text=None, windows=None, length=None)
    assert found.protocol == report.evaluation["protocol"]
    assert len(found.notes) == 1 and "text.txt" in found.notes[0] and found.text in found.notes[0]
    shipped = {"settings": {"eval": "mla_demo/evaluation.txt.gz", "eval_windows": 3, "eval_length": 32}}
    ids, label, _ = evaluate.load_eval_windows(None, pico.tokenizer(), None, None, texts.Reach(256), shipped)
    assert ids.shape == (3, 32) and label == "mla_demo/evaluation.txt.gz"
    ids, _, _ = evaluate.load_eval_windows(None, pico.tokenizer(), None, None, texts.Reach(256), {})
    assert ids.shape == (40, 256)
    ids, _, _ = evaluate.load_eval_windows(None, pico.tokenizer(), None, None, texts.Reach(), {"settings": {}})
    assert ids.shape[1] == 2048


def test_original_that_a_report_names(convert_pico, sources, monkeypatch, tmp_path):
    report = convert_pico("llama", kv_ratio=0.5).as_dict()
    assert report["source"]["name"] == "source" and loading.find_original(report) is None
    monkeypatch.chdir(sources("llama").parent)
    assert loading.find_original(report).folder.resolve() == sources("llama")
    monkeypatch.chdir(sources("qwen2").parent)  # of that name, and another model
    assert loading.find_original(report) is None
    packaged = {"source": {"name": "mla_demo", "revision": None, "model_type": "llama"}}
    assert loading.find_original(packaged).label == "mla_demo"
    away = {"source": {"name": "owner/name", "revision": "0" * 40, "model_type": "llama"}}
    for content in ({}, {"source": {"name": None}}, {"source": 5}, away):
        assert loading.find_original(content) is None


# ---- what cannot be measured


def refused(culprit, call):
    with pytest.raises(InputError) as caught:
        call()
    assert culprit in str(caught.value)


@pytest.fixture
def folder(convert_pico, tmp_path):
    return shutil.copytree(convert_pico("llama", kv_ratio=0.5).out, tmp_path / "converted")


def test_missing_tensor_is_not_made_up(folder, measure):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.1.self_attn.o_proj.weight"
    content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    from safetensors.torch import load_file, save_file

    shard = folder / "model-00003-of-00005.safetensors"
    tensors = load_file(shard)
    tensors.pop(name)
    save_file(tensors, shard, {"format": "pt"})
    refused(name, lambda: measure(folder))


def test_damaged_weights(folder, measure):
    shard = folder / "model-00003-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused("converted", lambda: measure(folder))
    shard.unlink()
    refused("converted", lambda: measure(folder))


def test_shapes_that_config_does_not_mean(folder, measure):
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "kv_lora_rank": 8}))
    refused("converted", lambda: measure(folder))


def test_remote_code_is_never_run(folder, measure, tmp_path):
    for name in CODE:
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert measure(folder).converted
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mla_unheard_of"}))
    refused("converted", lambda: measure(folder))
    assert not (tmp_path / "ran").exists()


def test_pickles_are_not_read(folder, measure):
    torch.save({}, folder / "pytorch_model.bin")
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    refused("converted", lambda: measure(folder))


def test_not_the_original(convert_pico, sources, measure, tmp_path):
    folder = convert_pico("llama", kv_ratio=0.5).out
    other = shutil.copytree(sources("llama"), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("tokenizer", lambda: measure(folder, other))
    torch.manual_seed(0)
    for size, culprit in ((60, "vocabulary"), (300, "vocabulary")):
        path = tmp_path / str(size)
        config = pico.config("llama")
        config.vocab_size = size
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        pico.tokenizer().save_pretrained(path)
        refused(culprit, lambda path=path: measure(folder, path))


def test_nan_is_no_number(folder, measure):
    from safetensors.torch import load_file, save_file

    shard = folder / "model-00003-of-00005.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.input_layernorm.weight"].fill_(torch.nan)
    save_file(tensors, shard, {"format": "pt"})
    found = measure(folder)
    assert math.isnan(found.after.value)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["evaluation"]["after"]["value"] is None


# ---- the command


def test_command(cli, convert_pico, sources, small):
    report = convert_pico("llama", rank=RANK, rope_dim=ROPE_DIM)
    code, out, err = cli("eval", report.out, "--against", sources("llama"), *small)
    assert code == 0 and "loading" in err
    # another order of sums than the conversion's: the last digit shown may turn
    shown = [float(number) for number in re.findall(r"\d+\.\d{3}\b", out)]
    assert pytest.approx(report.evaluation["after"]["value"], abs=1.5e-3) in shown
    assert float(re.search(r"×(\d\.\d{4})\b", out)[1]) == pytest.approx(report.perplexity_ratio, abs=1.5e-4)
    assert "-50.0%" in out
    code, out, err = cli("eval", report.out, *small, "--quiet")
    assert code == 0 and not err and "KL" not in out and "config.json" in out


def test_json_is_all_there_is_on_stdout(cli, convert_pico, sources, small):
    report = convert_pico("llama", rank=RANK, rope_dim=ROPE_DIM)
    code, out, err = cli("eval", report.out, "--against", sources("llama"), *small, "--json")
    assert code == 0 and "loading" in err
    found = json.loads(out)
    assert found["evaluation"]["ratio"] == pytest.approx(report.perplexity_ratio, rel=1e-4)
    assert found["cache"]["bytes_per_token"] == report.cache.bytes_per_token.as_dict()
    assert found["cache"]["share_saved"] == report.cache["share_saved"]
    assert found["evaluation"]["kl"].keys() == found["evaluation"]["agreement"].keys() == {"value", "error"}
    alone = json.loads(cli("eval", report.out, *small, "--json", "-q")[1])
    assert alone["against"] is alone["evaluation"]["ratio"] is alone["evaluation"]["kl"] is None
    assert str(report.out.parent) not in out


@pytest.mark.parametrize(
    "code, culprit, options",
    [
        (USAGE, "dtype", ("--dtype", "int8")),
        (USAGE, "--eval-windows", ("--eval-windows", "0")),
        (USAGE, "--eval-length", ("--eval-length", "1")),
        (USAGE, "tpu", ("--device", "tpu")),
        (RESOURCE, "cuda:9", ("--device", "cuda:9")),
        (INPUT, "no-text.txt", ("--eval", "no-text.txt")),
        (INPUT, "fewer than one window", ("--eval-length", "99999")),
        (INPUT, "nowhere", ("--against", "./nowhere")),
        (RESOURCE, "owner/name", ("--against", "owner/name")),
    ],
)
def test_refused(cli, convert_pico, small, code, culprit, options):
    found, out, err = cli("eval", convert_pico("llama", kv_ratio=0.5).out, *small, *options)
    assert found == code and not out
    (line,) = err.splitlines()
    assert line.startswith("mla-convert: ") and culprit in line


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "folder"])
def test_no_model(cli, small, name, tmp_path):
    found, out, err = cli("eval", tmp_path if name == "folder" else name, *small)
    assert found == INPUT and not out and len(err.splitlines()) == 1


def test_out_of_memory(cli, convert_pico, small, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "Readout", full)
    code, out, err = cli("eval", convert_pico("llama", kv_ratio=0.5).out, *small, "-q")
    assert code == RESOURCE and not out and "--eval-length" in err


def test_help_needs_no_torch():
    code = """
import sys
sys.argv = ["mla-convert", sys.argv[1], "--help"]
from mla_convert.cli.main import main
try:
    main()
finally:
    assert not {"torch", "transformers"} & sys.modules.keys()
"""
    for name in ("eval", "gate", "verify"):
        run = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "Example: mla-convert" in run.stdout and "3 a gate failed" in " ".join(run.stdout.split())

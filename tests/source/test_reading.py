"""Ambiguous checkpoints: the weights that transformers loads are converted, or the folder is refused with the reason."""

import json
import shutil
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from mla_convert.core.errors import InputError
from mla_convert.source.load_model import find_model, load_model
from mla_convert.source.source import open_source
from mla_convert.source.tokens import first_tokens
from mla_convert.source.windows import evaluation_windows

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(sources, tmp_path):
    return Path(shutil.copytree(sources("llama"), tmp_path / "source"))


@pytest.fixture
def tied(sources, tmp_path):
    return Path(shutil.copytree(sources("llama-mha-tied"), tmp_path / "source"))


@pytest.fixture
def sharded(tmp_path):
    return pico.save("llama", tmp_path / "source", max_shard_size="60KB")


def change(path, drop=(), **fields):
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


def store(folder, tensors, file=WEIGHTS):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def same_as_transformers(folder):
    """Check that the source reads every parameter as transformers loads it; returns the source."""
    source = open_source(str(folder))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = source.reader.read(source.reader.names())
    for name, parameter in stock.named_parameters():
        assert torch.equal(found[name], parameter), name
    return source


def refused(folder, *words, weights=True):
    with pytest.raises(InputError) as error:
        open_source(str(folder), weights=weights)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


# ---- which files


def test_a_single_file_counts_more_than_an_index(sharded):
    newer = {name: tensor + 1 for name, tensor in pico.model("llama").state_dict().items()}
    store(sharded, newer)
    same_as_transformers(sharded)


def test_a_tensor_in_two_shards_is_the_last_ones(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    last, name = max(weight_map.values()), EMBEDDING
    assert weight_map[name] != last
    shard = load_file(sharded / last)
    store(sharded, {**shard, name: torch.ones(pico.VOCAB, 48)}, last)
    notes = same_as_transformers(sharded).notes
    assert any(name in note and last in note for note in notes)


def test_an_index_need_not_name_every_tensor(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(name for name, file in weight_map.items() if list(weight_map.values()).count(file) > 1)
    del weight_map[name]
    change(sharded / INDEX, weight_map=weight_map)
    same_as_transformers(sharded)


def test_an_index_without_metadata_is_read(sharded):
    """transformers refuses such an index, although the weights are unambiguous without its metadata."""
    change(sharded / INDEX, drop=("metadata",))
    found = open_source(str(sharded)).reader.read([EMBEDDING])[EMBEDDING]
    assert torch.equal(found, pico.model("llama").state_dict()[EMBEDDING])


def test_a_file_that_the_configuration_names(source):
    store(source, {name: tensor + 1 for name, tensor in load_file(source / WEIGHTS).items()}, "other.safetensors")
    change(source / CONFIG, transformers_weights="other.safetensors")
    same_as_transformers(source)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "model.pt", 5])
def test_the_configuration_names_something_else(source, name):
    change(source / CONFIG, transformers_weights=name)
    refused(source, "transformers_weights")
    with pytest.raises(InputError, match="transformers_weights"):
        load_model(find_model(str(source)), "auto", torch.device("cpu"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "x.ckpt", "../x.safetensors"])
@pytest.mark.parametrize("command", [(), ("inspect",), ("eval",)])
def test_an_index_that_names_a_pickle_is_never_followed(cli, source, tmp_path, monkeypatch, file, command):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    names = dict.fromkeys(pico.model("llama").state_dict(), file)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    code, out, err = cli(*command, source)
    (line,) = err.splitlines()
    assert code == 4 and INDEX in line and file in line and not out


def test_a_distributed_checkpoint_is_refused(source):
    shutil.copy(source / WEIGHTS, source / "shard-00000-model-00001-of-00001.safetensors")
    refused(source, "distributed checkpoint")


# ---- tied weights


def test_a_tied_model_may_store_only_its_head(tied):
    tensors = load_file(tied / WEIGHTS)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    store(tied, tensors)
    source = same_as_transformers(tied)
    assert source.config.tie_word_embeddings and HEAD not in source.names


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_tied_weights_that_differ_are_not_tied(tied, shift):
    tensors = load_file(tied / WEIGHTS)
    tensors[HEAD] = tensors[EMBEDDING] + shift
    store(tied, tensors)
    source = same_as_transformers(tied)
    assert source.config.tie_word_embeddings == (not shift) and (HEAD in source.names) == bool(shift)
    assert any("not tied" in note for note in source.notes) == bool(shift)


def test_tied_weights_of_two_shapes(tied):
    store(tied, {**load_file(tied / WEIGHTS), HEAD: torch.ones(5, 48)})
    refused(tied, HEAD, EMBEDDING)


@torch.no_grad()
def test_what_was_not_tied_is_converted_so(tied, convert_folder):
    tensors = load_file(tied / WEIGHTS)
    store(tied, {**tensors, HEAD: tensors[EMBEDDING].flip(0)})
    (tied.parent / "text.txt").write_text(pico.text())
    report = convert_folder(tied, rank="full", rope_dim="full")
    stock, converted = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tied, report.out))
    ids = torch.arange(3, 43)[None]
    expected, found = (model.eval()(ids, use_cache=False).logits for model in (stock, converted))
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


# ---- which tensors


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_of_a_wrapper(cli, source, prefix):
    store(source, {prefix + name: tensor for name, tensor in load_file(source / WEIGHTS).items()})
    for command in ((), ("inspect",), ("plan",)):
        code, _, err = cli(*command, source)
        (line,) = err.splitlines()
        assert code == 4 and prefix in line


def test_an_adapters_tensors_are_no_part_of_the_model(source):
    name = "model.layers.0.self_attn.q_proj"
    store(source, {**load_file(source / WEIGHTS), f"{name}.lora_A.default.weight": torch.ones(4, 48)})
    refused(source, "lora_A", "merge")


def test_two_tensors_for_one_parameter(source):
    tensors = load_file(source / WEIGHTS)
    store(source, {**tensors, "norm.weight": torch.ones(48)})
    refused(source, "norm.weight", "model.norm.weight")


def test_a_tensor_without_a_place_is_noted(source):
    tensors = load_file(source / WEIGHTS)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    store(source, {**tensors, **buffers})
    assert not open_source(str(source)).notes
    store(source, {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(48)})
    (note,) = open_source(str(source)).notes
    assert "q_proj.bias" in note


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
def test_packed_numbers_that_nothing_explains(cli, source, stored, options):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / WEIGHTS)
    store(source, {**tensors, name: tensors[name].to(stored), f"{name}_scale_inv": torch.ones(1, 1)})
    code, _, err = cli(source, *options, "--out", source.parent / "out")
    assert code == 4 and name in err.splitlines()[-1] and not (source.parent / "out").exists()


# ---- another kind of model


def test_a_classifier(source):
    torch.manual_seed(0)
    LlamaForSequenceClassification(pico.config("llama-mha-tied")).save_pretrained(source)
    refused(source, "LlamaForSequenceClassification")
    change(source / CONFIG, architectures=None)
    refused(source, "score.weight")


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering", "MultipleChoice", "RewardModel"])
def test_heads_by_the_name_of_the_class(source, kind):
    change(source / CONFIG, architectures=[f"LlamaFor{kind}"])
    refused(source, f"LlamaFor{kind}", weights=False)


def test_classes_that_are_read_as_another(source):
    for names in (["LlamaForCausalLM"], ["LLaMAForCausalLM"], None, [], ["A", "LlamaForCausalLM"]):
        change(source / CONFIG, architectures=names)
        assert not open_source(str(source)).notes
    for name in ("LlamaModel", "MistralForCausalLM"):
        change(source / CONFIG, architectures=[name])
        (note,) = open_source(str(source)).notes
        assert name in note and "LlamaForCausalLM" in note


def test_code_of_its_own_is_not_run_and_not_passed_over(source):
    (source / "modeling_own.py").write_text("raise SystemExit('ran')")
    change(source / CONFIG, auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"})
    (note,) = open_source(str(source)).notes
    assert "auto_map" in note and "modeling_own" in note
    change(source / CONFIG, architectures=["OwnForCausalLM"])
    refused(source, "OwnForCausalLM", "auto_map")


def test_code_that_a_setting_names_is_not_fetched(source):
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        change(source / CONFIG, **{key: "someone/kernel"})
    assert open_source(str(source)).config._attn_implementation != "someone/kernel"
    load_model(find_model(str(source)), "auto", torch.device("cpu"))


@pytest.mark.parametrize("command", [(), ("inspect",), ("plan",), ("eval",)])
def test_an_adapter_beside_the_weights(cli, source, command):
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    code, _, err = cli(*command, source)
    (line,) = err.splitlines()
    assert code == 4 and "adapter_config.json" in line


def test_an_adapter_alone(source):
    (source / CONFIG).rename(source / "adapter_config.json")
    refused(source, "PEFT adapter", "base model")


@pytest.mark.parametrize(
    "kind, part", [("voxtral", "audio_config"), ("granite_speech", "encoder_config"), ("omniasr", "audio_config")]
)
def test_audio_models(source, kind, part):
    text = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps({"model_type": kind, "text_config": text, part: {"hidden_size": 8}}))
    refused(source, "audio", kind, weights=False)


# ---- config.json


@pytest.mark.parametrize("model_type", ["phi3", "gpt2", "opt", "gpt_neox", "qwen3", "gemma2"])
@pytest.mark.parametrize("command", [(), ("inspect",), ("plan",)])
def test_a_configuration_of_another_family(cli, source, model_type, command):
    change(source / CONFIG, model_type=model_type, architectures=None)
    code, out, err = cli(*command, source)
    (line,) = err.splitlines()
    assert code == 4 and "tensor" in line and not out


NAN = float("nan")


@pytest.mark.parametrize(
    "fields",
    [{"partial_rotary_factor": "x"}, {"partial_rotary_factor": NAN}, {"dtype": "x"}, {"dtype": [1]}, {"dtype": NAN},
     {"dtype": {}}, {"rope_parameters": 5}, {"rope_parameters": {"rope_type": "x"}}, {"rope_theta": "x"}, {"head_dim": 0.5},
     {"layer_types": 3}, {"sliding_window": "x"}, {"tie_word_embeddings": "x"}, {"num_hidden_layers": 1_000_000},
     {"num_attention_heads": 0}, {"num_attention_heads": -2}, {"vocab_size": -1}, {"hidden_size": 1e400},
     {"quantization_config": 5}, {"quantization_config": {"quant_method": []}}, {"architectures": 5}, {"auto_map": 5},
     {"text_config": {"model_type": []}}, {"rms_norm_eps": "x"}, {"max_position_embeddings": "x"}],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_bad_input(cli, source, fields):
    """Refused in one line, or without effect."""
    change(source / CONFIG, **fields)
    for command in ("plan", "inspect"):
        code, _, err = cli(command, source)
        assert code in (0, 4) and len(err.splitlines()) == (code == 4), err


@pytest.mark.parametrize(
    "fields, word",
    [({"num_attention_heads": 0}, "num_attention_heads = 0"), ({"vocab_size": 0}, "vocab_size = 0"),
     ({"hidden_size": -4}, "hidden_size = -4"), ({"model_type": "mla_x"}, "'mla_x' is not supported")],
    ids=str,
)  # fmt: skip
def test_sizes_and_types_that_no_model_has_are_named(cli, source, fields, word):
    change(source / CONFIG, **fields)
    code, out, err = cli("plan", source)
    assert code == 4 and word in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    "fields, word",
    [({"is_causal": False}, "is_causal"), ({"is_encoder_decoder": True}, "is_encoder_decoder"),
     ({"return_dict": False}, "return_dict"), ({"output_attentions": True}, "output_attentions"),
     ({"sliding_window": 9}, "sliding_window"), ({"layer_types": ["full_attention"] * 3}, "layer_types"),
     ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
     ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}}, "rotary")],
    ids=str,
)  # fmt: skip
def test_settings_that_the_class_does_not_heed_or_cannot_run_with(source, fields, word):
    change(source / CONFIG, **fields)
    refused(source, word, weights=False)


def test_embeddings_of_another_width(tmp_path, sources):
    folder = Path(shutil.copytree(sources("opt"), tmp_path / "source"))
    change(folder / CONFIG, word_embed_proj_dim=24)
    refused(folder, "embeddings of 24", weights=False)


@pytest.mark.parametrize("rope_type", ["default", "proportional"])
@torch.no_grad()
def test_dims_that_turn_are_those_of_the_class(source, convert_folder, rope_type):
    """Llama's class ignores `partial_rotary_factor` and rotates whole heads, or gives some dims no frequency."""
    change(source / CONFIG, rope_parameters={"rope_type": rope_type, "rope_theta": 500.0, "partial_rotary_factor": 0.5})
    try:
        stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except KeyError:
        pytest.skip(f"this version of transformers has no {rope_type} RoPE")
    (source.parent / "text.txt").write_text(pico.text())
    report = convert_folder(source, rank="full", rope_dim="full")
    converted = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    expected, found = (model.eval()(ids, use_cache=False).logits for model in (stock, converted))
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"a":', '{"a":' + "[" * 100_000, '{"cache_implementation": "x"}', "\ufeff{}"]
)
def test_generation_settings_that_cannot_be_read(source, content):
    (source / "generation_config.json").write_text(content)
    refused(source, "generation_config.json", weights=False)


def test_a_tokenizer_that_opens_and_cannot_be_used(source):
    change(source / "tokenizer_config.json", model_max_length="many")
    with pytest.raises(InputError, match="no readable tokenizer"):
        open_source(str(source)).tokenizer()


def test_sampling_settings_in_the_configuration_are_carried_over(source, convert_folder):
    (source / "generation_config.json").unlink(missing_ok=True)
    (source.parent / "text.txt").write_text(pico.text())
    settings = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    for do_sample in (True, False):  # transformers loads the second one, but does not save it
        change(source / CONFIG, do_sample=do_sample, **settings)
        expected = AutoModelForCausalLM.from_pretrained(source).generation_config.to_dict()
        found = json.loads((convert_folder(source).out / "generation_config.json").read_text())
        assert {key: found[key] for key in settings} == settings == {key: expected[key] for key in settings}
        assert found.get("do_sample", False) == do_sample


# ---- first tokens


@pytest.mark.parametrize(
    "template, first", [("$A </s>", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A", []), ("<pad> <s> $A", [0, 1])]
)
def test_first_tokens_are_those_before_a_text(template, first):
    tokenizer = pico.tokenizer()
    special = [(token, index) for index, token in enumerate(pico.SPECIAL)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    assert first_tokens(tokenizer) == first
    text = "some text, of forty characters and more."
    windows = evaluation_windows(text, tokenizer, 1, len(first) + len(text), "text")
    assert windows[0].tolist()[: len(first)] == first and 2 not in windows


def test_first_tokens_of_a_saved_tokenizer(source):
    assert first_tokens(AutoTokenizer.from_pretrained(source)) == []

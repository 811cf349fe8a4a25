"""GGUF files: every metadata key is applied or refused by name, and no missing tensor is accepted."""

from math import log

import gguf
import numpy as np
import pico
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from mla_convert.core.errors import InputError
from mla_convert.source.load_model import find_model, load_model, model_config
from mla_convert.source.source import open_source

GEMMA = {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
         "post_attention_layernorm": "post_attention_norm"}  # fmt: skip
OTHERS = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
TYPES = gguf.RopeScalingType
IDS = torch.randint(4, pico.VOCAB, (1, 150), generator=torch.Generator().manual_seed(1))


def build(model_type="llama", **own):
    """A random model of that type, with random biases and norms."""
    kind = CONFIG_MAPPING[model_type]
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    common = {key: value for key, value in pico.COMMON.items() if key in known} | {"num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**common, **own}), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def stored(model, arch):
    """The model's tensors with llama.cpp's names and layout."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if arch.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = half.contiguous().numpy()
            continue
        if "shared_expert_gate" in name:
            tensor = tensor[0]
        for table in (GEMMA if arch.startswith("gemma") else {}, OTHERS, pico.GGUF_NAMES):
            for ours, theirs in table.items():
                name = name.replace(ours, theirs)
        tensors[name] = tensor.numpy()
    return tensors


def settings(config, arch):
    """Metadata that every file has."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": pico.VOCAB,
    }
    for name in ("rms_norm_eps", "norm_epsilon", "layer_norm_eps"):
        if hasattr(config, name):
            key = "rms_epsilon" if "rms" in name else "epsilon"
            found[f"attention.layer_norm_{key}"] = getattr(config, name)
    return {f"{arch}.{key}": value for key, value in found.items()}


def write(path, model, arch=None, tensors=None, drop=(), split=None, **metadata):
    """The model as a GGUF file. `metadata`: keys with double underscores for dots, None to omit one; `tensors`: additional."""
    arch = arch or model.config.model_type
    writer = gguf.GGUFWriter(path, arch)
    own = {
        f"{arch}.{key.replace('__', '.')}": value for key, value in metadata.items() if not key.startswith("general")
    }
    general = {key.replace("__", "."): value for key, value in metadata.items() if key.startswith("general")}
    number, count, names = split or (0, 1, None)
    if split:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(stored(model, arch)))
    for key, value in {**settings(model.config, arch), **own, **general}.items() if not number else ():
        if value is not None:
            add(writer, key, value)
    if not number:
        vocabulary(writer)
    for name, tensor in {**stored(model, arch), **(tensors or {})}.items():
        if name not in drop and (names is None or name in names):
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def vocabulary(writer):
    vocab = pico.tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=vocab.get), "Ġt", "Ġa"]
    tokens += [f"<extra {index}>" for index in range(pico.VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t", "Ġ a"])
    writer.add_token_types([3 if token in pico.SPECIAL else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@torch.no_grad()
def assert_same(model, path):
    """Check that the source at `path` computes the same as `model`, beyond all windows; returns the source."""
    source = open_source(str(path))
    loaded = load_model(find_model(str(path)), "auto", torch.device("cpu"))
    if source.family.softcap:
        model.set_attn_implementation("eager")
        loaded.set_attn_implementation("eager")
    for ids in (IDS, IDS[:, :7]):
        expected, found = (m(ids, use_cache=False).logits for m in (model, loaded))
        assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    for name, parameter in loaded.named_parameters():
        assert name not in source.names or torch.equal(source.reader.read([name])[name], parameter)
    assert loaded.config.to_diff_dict().get("rope_parameters") == source.config.to_diff_dict().get("rope_parameters")
    return source


def refused(path, *words):
    for weights in (False, True):
        with pytest.raises(InputError) as error:
            open_source(str(path), weights=weights)
        line = str(error.value)
        assert "\n" not in line and all(word in line for word in words), line


def rope(kind="default", theta=10000.0, **own):
    return {"rope_type": kind, "rope_theta": theta, **own}


# ---- RoPE


LINEAR = {"rope__scaling__type": TYPES.LINEAR.value, "rope__scaling__factor": 4.0}
YARN = {
    "rope__scaling__type": TYPES.YARN.value,
    "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": 64,
}
OWN_YARN = {
    **YARN,
    "rope__scaling__yarn_beta_fast": 16.0,
    "rope__scaling__yarn_beta_slow": 2.0,
    "rope__scaling__attn_factor": 0.5,
}
YARNED = {"factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "model_type, parameters, metadata",
    [
        ("llama", rope(), {}),
        ("llama", rope(theta=5e5), {}),
        ("llama", rope("linear", factor=4.0), LINEAR),
        ("llama", rope("linear", factor=4.0), {"rope__scale_linear": 4.0}),
        ("llama", rope("linear", factor=4.0), {"rope__scaling__factor": 4.0}),
        ("llama", rope(), {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}),
        ("llama", rope(), {"rope__scaling__type": "linear", "rope__scaling__factor": 1.0, "rope__scaling__attn_factor": 1.0}),
        ("qwen2", rope("yarn", theta=1e6, **YARNED), YARN),
        ("qwen2", rope("linear", factor=4.0), LINEAR),
        ("qwen3", rope("yarn", **YARNED, beta_fast=16.0, beta_slow=2.0, attention_factor=0.5 * (1 + 0.1 * log(4))), OWN_YARN),
        ("stablelm", rope(theta=5e4, partial_rotary_factor=0.5), {}),
        ("stablelm", rope(partial_rotary_factor=1.0), {}),
        ("phi3", rope(partial_rotary_factor=0.75), {}),
        ("starcoder2", rope(theta=999999.0), {}),
    ],
    ids=str,
)  # fmt: skip
def test_rope_is_that_of_the_file(tmp_path, model_type, parameters, metadata):
    sizes = {"hidden_size": 96, "num_attention_heads": 6} if model_type in ("stablelm", "phi3") else {}
    sizes |= {"head_dim": 8} if model_type in ("llama", "qwen3") else {}
    model = build(model_type, rope_parameters=parameters, **sizes)
    assert_same(model, write(tmp_path / "tiny.gguf", model, **metadata))


def llama31(original):
    return rope(
        "llama3",
        theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )


@pytest.mark.parametrize("original", [32, 8192])
def test_rope_of_llama_3_is_a_tensor(tmp_path, original):
    model = build(head_dim=16, rope_parameters=llama31(original), max_position_embeddings=16384)
    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2).float() / 16)
    factors = {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}
    source = assert_same(model, write(tmp_path / "tiny.gguf", model, tensors=factors))
    assert source.config.rope_parameters["rope_type"] == ("llama3" if original == 8192 else "longrope")


@pytest.mark.parametrize("attention", [None, 1.5])
def test_longrope_of_phi_3(tmp_path, attention):
    short, long = [1.0, 1.1, 1.2, 1.4], [1.0, 2.0, 3.0, 8.0]
    own = {} if attention is None else {"attention_factor": attention}
    parameters = rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=64, **own)
    model = build("phi3", rope_parameters=parameters, original_max_position_embeddings=64)
    tensors = {
        f"rope_factors_{name}.weight": np.array(value, np.float32) for name, value in (("long", long), ("short", short))
    }
    metadata = {"rope__scaling__original_context_length": 64, "rope__scaling__attn_factor": attention}
    assert_same(model, write(tmp_path / "tiny.gguf", model, tensors=tensors, **metadata))
    refused(
        write(tmp_path / "half.gguf", model, tensors=dict([*tensors.items()][:1]), **metadata), "rope_factors_short"
    )
    refused(write(tmp_path / "no.gguf", model, tensors=tensors), "original_context_length")


# ---- windows, caps and scales


@pytest.mark.parametrize("model_type", ["phi3", "starcoder2"])
@pytest.mark.parametrize("window", [0, 9])
def test_windows(tmp_path, model_type, window):
    model = build(model_type, sliding_window=window or None)
    assert_same(model, write(tmp_path / "tiny.gguf", model, attention__sliding_window=window))


def test_soft_caps_and_scale_of_gemma_2(tmp_path):
    own = {
        "head_dim": 8,
        "sliding_window": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 25,
    }
    said = {
        "attention__sliding_window": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "attention__scale": 0.2,
    }
    model = build("gemma2", **own)
    assert not assert_same(model, write(tmp_path / "tiny.gguf", model, **said)).notes
    (note,) = open_source(str(write(tmp_path / "x.gguf", model, **{**said, "attention__scale": None}))).notes
    assert "attention.scale" in note


def test_a_context_that_the_file_does_not_say_is_said(tmp_path):
    source = open_source(str(write(tmp_path / "tiny.gguf", build("llama"), context_length=None)), weights=False)
    (note,) = source.notes
    assert "llama.context_length" in note and f"taken as {source.config.max_position_embeddings} tokens" in note


@pytest.mark.parametrize("layers", [46, 2])
def test_scale_of_gemma_2_27b_is_that_of_its_width(tmp_path, layers):
    model = build("gemma2", head_dim=8, sliding_window=12, num_hidden_layers=layers)
    source = open_source(str(write(tmp_path / "tiny.gguf", model, attention__sliding_window=12)), weights=False)
    assert source.config.query_pre_attn_scalar == (48 // 6 if layers == 46 else 256)


@pytest.mark.parametrize("pattern", [None, 3, [True, False, False]])
def test_gemma_3(tmp_path, pattern):
    main, local = rope("linear", theta=1e6, factor=8.0), rope(theta=500.0)
    types = {None: ["sliding_attention"] * 3, 3: ["sliding_attention"] * 2 + ["full_attention"]}
    own = {"head_dim": 8, "sliding_window": 12, "num_hidden_layers": 3, "query_pre_attn_scalar": 8}
    kinds = types.get(
        pattern if not isinstance(pattern, list) else 0, ["sliding_attention", "full_attention", "full_attention"]
    )
    model = build(
        "gemma3_text", rope_parameters={"full_attention": main, "sliding_attention": local}, layer_types=kinds, **own
    )
    said = {
        "rope__scaling__type": "linear",
        "rope__scaling__factor": 8.0,
        "rope__freq_base_swa": 500.0,
        "attention__scale": 8**-0.5,
    }
    path = tmp_path / "tiny.gguf"
    write(path, model, "gemma3", attention__sliding_window=12, attention__sliding_window_pattern=pattern, **said)
    assert_same(model, path)
    write(path, model, "gemma3", **said)
    refused(path, "gemma3.attention.sliding_window")


UNKNOWN = {
    "attention.clamp_kqv": 8.0, "attention.max_alibi_bias": 8.0, "attention.scale": 0.1, "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0, "logit_scale": 0.1, "residual_scale": 0.1, "expert_count": 8, "attention.causal": False,
    "attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False], "rope.dimension_count": 4,
    "attention.value_length": 16, "rope.scaling.yarn_log_multiplier": 0.1, "rope.scaling.attn_factor": 1.2,
    "rope.scaling.type": "su", "rope.freq_base_swa": 10.0, "something.new": 1,
}  # fmt: skip


@pytest.mark.parametrize("key, value", UNKNOWN.items(), ids=UNKNOWN)
def test_what_no_setting_has_is_refused_by_name(tmp_path, key, value):
    said = {key.replace(".", "__"): value}
    refused(write(tmp_path / "tiny.gguf", build(head_dim=8), **said), f"llama.{key}")


@pytest.mark.parametrize("key, value", [("expert_count", 0), ("attention.clamp_kqv", 0.0), ("attention.sliding_window", 0),
                                        ("attention.scale", 8**-0.5), ("tensor_data_layout", "Meta AI original pth")])  # fmt: skip
def test_what_changes_nothing_is_not(tmp_path, key, value):
    model = build(head_dim=8)
    assert_same(model, write(tmp_path / "tiny.gguf", model, **{key.replace(".", "__"): value}))


COUNTED = ["block_count", "attention.head_count", "attention.head_count_kv", "embedding_length", "rope.freq_base",
           "context_length", "attention.key_length", "vocab_size", "attention.layer_norm_rms_epsilon"]  # fmt: skip


@pytest.mark.parametrize("key", COUNTED)
@pytest.mark.parametrize("value", ["x", -1.0, [1, 2], True, 0])
def test_metadata_of_a_wrong_type(tmp_path, key, value):
    refused(write(tmp_path / "tiny.gguf", build(head_dim=8), **{key.replace(".", "__"): value}), "tiny.gguf")


@pytest.mark.parametrize("name", ["mmproj", "adapter"])
def test_files_that_hold_no_model(tmp_path, name):
    refused(write(tmp_path / "tiny.gguf", build(head_dim=8), general__type=name), "general.type")


def test_recommended_sampling_is_carried_over(tmp_path):
    model = build(head_dim=8)
    said = {"temp": 0.75, "top_k": 20, "min_p": 0.0625}
    path = write(tmp_path / "tiny.gguf", model, **{f"general__sampling__{key}": value for key, value in said.items()})
    found = open_source(str(path), weights=False).generation_config()
    assert (found.temperature, found.top_k, found.min_p, found.do_sample) == (0.75, 20, 0.0625, True)
    path = write(tmp_path / "tiny.gguf", model, general__sampling__temp="hot")
    with pytest.raises(InputError, match=r"general\.sampling\.temp"):
        open_source(str(path), weights=False)
    for said in ({}, {"general__sampling__temp": 0.0}):
        found = open_source(str(write(tmp_path / "tiny.gguf", model, **said)), weights=False).generation_config()
        assert not found.do_sample and found.temperature in (None, 1.0)


# ---- tensors


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_up.weight", "blk.0.attn_k.weight", "output_norm.weight", "token_embd.weight"]
)
def test_a_tensor_that_is_missing_is_not_made_up(tmp_path, name):
    path = write(tmp_path / "tiny.gguf", build(head_dim=8), drop=(name,))
    refused(path, name)
    with pytest.raises(InputError, match=name):
        load_model(find_model(str(path)), "auto", torch.device("cpu"))


def test_a_tensor_without_a_place(tmp_path):
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}
    refused(write(tmp_path / "tiny.gguf", build(head_dim=8), tensors=extra), "blk.0.attn_q_norm.weight")


def test_biases_are_those_in_the_file(tmp_path):
    for own in ({"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}):
        model = build(head_dim=8, **own)
        assert_same(model, write(tmp_path / "tiny.gguf", model))


@pytest.mark.parametrize("model_type, own", [("qwen3_moe", {"head_dim": 8, "norm_topk_prob": True}),
                                             ("qwen2_moe", {"shared_expert_intermediate_size": 40})])  # fmt: skip
def test_experts(tmp_path, model_type, own):
    model = build(model_type, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **own)
    said = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": own.get("shared_expert_intermediate_size")}  # fmt: skip
    assert_same(model, write(tmp_path / "tiny.gguf", model, model_type.replace("_moe", "moe"), **said))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_tokenizer_is_the_one_that_transformers_finds(tmp_path, model_type):
    path = write(tmp_path / "model.gguf", build(model_type))
    plain, own = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name), open_source(str(path)).tokenizer()
    assert type(own) is type(plain) and own.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert (own.special_tokens_map, own.chat_template) == (plain.special_tokens_map, plain.chat_template)


@pytest.mark.parametrize("vocabulary_size", [200, 300])
def test_vocabulary_unlike_the_embedding(tmp_path, vocabulary_size):
    path = write(tmp_path / "tiny.gguf", build(head_dim=8), vocab_size=vocabulary_size)
    refused(path, "token_embd.weight", "264", str(vocabulary_size))


def test_names_of_files(tmp_path):
    model = build(head_dim=8)
    assert_same(model, write(tmp_path / "TINY.GGUF", model))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    refused(tmp_path / "TINY.GGUF", "adapter_config.json")


# ---- several parts


@pytest.fixture
def parts(tmp_path):
    """A tied model in three parts, each with some of its tensors."""
    model = build(head_dim=8, tie_word_embeddings=False)
    names = [*stored(model, "llama")]
    for number, own in enumerate((names[:5], names[5:12], names[12:])):
        write(tmp_path / f"tiny-{number + 1:05d}-of-00003.gguf", model, split=(number, 3, own))
    return model, [tmp_path / f"tiny-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]


def test_all_parts_are_read(cli, parts):
    model, (first, *_) = parts
    source = assert_same(model, first)
    assert not source.config.tie_word_embeddings and len(source.fingerprint()[2]) == 3
    assert not model_config(find_model(str(first))).tie_word_embeddings
    for command in ("plan", "inspect"):
        assert cli(command, first)[0] == 0


def test_a_whole_file_may_have_the_name_of_a_part(tmp_path):
    model = build(head_dim=8)
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write(path, model)
    assert [name for name, *_ in assert_same(model, path).fingerprint()[2]] == [path.name]


def test_a_part_is_missing_or_named_alone(parts):
    _, (first, second, third) = parts
    refused(second, "part 2", "00001-of-00003")
    moved = third.rename(third.with_name("aside.gguf"))
    refused(first, third.name, "missing")
    refused(moved, "part 3")
    second.write_bytes(moved.read_bytes())
    moved.rename(third)
    refused(first, second.name, "not part 2")
    second.unlink()
    refused(first.rename(first.with_name("one.gguf")), "part 1", "3 parts")

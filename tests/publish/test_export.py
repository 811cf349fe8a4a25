"""Exported folders: they give the converted model's logits, and models that a profile does not support are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from mla_convert.core.errors import InputError, UsageError
from mla_convert.publish.engines import ask_engine
from mla_convert.publish.engines.export import export
from mla_convert.publish.engines.latent_attention import DISTORTION, Attention, LatentNorm
from mla_convert.publish.engines.padding import padded
from mla_convert.publish.engines.rope_table import share_table

IDS = torch.randint(4, 260, (2, 60), generator=torch.Generator().manual_seed(0))
CODE = ["qwen3", "qwen2", "llama3-rope", "llama-yarn", "llama-linear", "llama-bias-wide-heads"]


@torch.no_grad()
def logits(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)(IDS).logits.float()


def distance(one, other):
    return float((one - other).abs().max() / (other.max() - other.min()))


@pytest.fixture(scope="module")
def tabled(convert_pico):
    """A conversion that engines can express: one plane for each frequency."""
    return lambda name: convert_pico(name, rank=10, rope_dim=8, rope_selection="engine_table").out


@pytest.fixture
def changed(tabled, tmp_path):
    """A copy of a conversion with changed settings in config.json, or changed tensors."""

    def make(name="llama", tensors=lambda found: found, **config):
        source, folder = tabled(name), tmp_path / "changed"
        folder.mkdir()
        for file in source.iterdir():
            if file.suffix == ".safetensors":
                save_file(tensors(load_file(file)), folder / file.name, {"format": "pt"})
            elif file.name not in ("report.json", "SHA256SUMS"):  # as transformers would have saved it
                (folder / file.name).write_bytes(file.read_bytes())
        content = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(content))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"] = {key: file.name for file in folder.glob("*.safetensors") for key in load_file(file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.mark.parametrize("pad", ["auto", 512, "none"])
@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "mistral"])
def test_portable_is_the_converted_model_in_stock_transformers(tabled, tmp_path, name, pad):
    found = export(tabled(name), tmp_path / "out", pad=pad)
    assert distance(logits(tmp_path / "out"), logits(tabled(name))) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and not config["tie_word_embeddings"]
    assert config["kv_lora_rank"] == found.sizes.rank == {"auto": 256, 512: 512, "none": 10}[pad]
    assert not list((tmp_path / "out").glob("*.py"))


def test_portable_needs_no_mla_convert(tabled, tmp_path):
    export(tabled("llama"), tmp_path / "out")
    code = (
        "import sys; sys.modules['mla_convert'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "torch.save((type(model).__name__, model(torch.load(sys.argv[2])).logits.detach()), sys.argv[3])\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", code, tmp_path / "out", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, found = torch.load(tmp_path / "logits.pt")
    assert name == "DeepseekV3ForCausalLM" and distance(found, logits(tabled("llama"))) < 1e-5


def test_portable_with_another_epsilon_in_the_source(convert_folder, tmp_path):
    built = pico.model("llama")
    built.config.rms_norm_eps = 1e-3
    built.save_pretrained(tmp_path / "source")
    pico.tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(pico.text())
    converted = convert_folder(tmp_path / "source", rank=10, rope_dim=8, rope_selection="engine_table").out
    export(converted, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6
    assert distance(logits(tmp_path / "out"), logits(converted)) < 1e-5


def test_portable_in_bfloat16_costs_no_more_than_bfloat16(tabled, tmp_path):
    export(tabled("llama"), tmp_path / "out", dtype="bfloat16")
    exact = logits(tabled("llama"))
    rounding = (logits(tabled("llama"), torch.bfloat16) - exact).square().mean().sqrt()
    assert (logits(tmp_path / "out", torch.bfloat16) - exact).square().mean().sqrt() < 1.5 * rounding
    stored = load_file(next((tmp_path / "out").glob("model-00002*")))
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())


@pytest.mark.parametrize("name", CODE)
def test_code_is_the_converted_model(convert_pico, tmp_path, name):
    converted = convert_pico(name, rank=12, rope_dim=6).out
    export(converted, tmp_path / "out", "hf-code")
    assert distance(logits(tmp_path / "out", trust_remote_code=True), logits(converted)) < 1e-5


def test_code_keeps_every_layers_own_planes_and_sizes(convert_pico, tmp_path):
    """Layers of different sizes, as by default, are padded to the largest."""
    converted = convert_pico("llama", rank=12, rope_dim=6, uniform=False).out
    with pytest.raises(InputError, match=r"layers have ranks from .* --pad RANK"):
        export(converted, tmp_path / "out", "hf-code")
    export(converted, tmp_path / "out", "hf-code", pad=256)
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["mla_inv_freq"]) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    assert distance(model(IDS).logits.detach(), logits(converted)) < 1e-5
    cache = model.generate(IDS[:1], max_new_tokens=4, return_dict_in_generate=True).past_key_values
    assert [tuple(part.shape) for part in (cache.layers[0].keys, cache.layers[0].values)] == [
        (1, 1, 63, 256),
        (1, 1, 63, 64),
    ]


def test_code_of_a_model_with_layers_without_rope(convert_pico, tmp_path):
    converted = convert_pico("smollm3", rank=12, rope_dim=6).out
    export(converted, tmp_path / "out", "hf-code", pad=256)
    assert distance(logits(tmp_path / "out", trust_remote_code=True), logits(converted)) < 1e-5


@pytest.mark.parametrize(
    "name, profile, planes",
    [("llama", "portable", "engine_table"), ("qwen3", "hf-code", "by_loss"), ("qwen2", "hf-code", "by_loss")],
)
def test_heads_with_fewer_content_dims(convert_pico, tmp_path, name, profile, planes):
    converted = convert_pico(name, rank=10, rope_dim=6, rope_selection=planes, nope_dim=3).out
    export(converted, tmp_path / "out", profile, pad="none")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["qk_nope_head_dim"] == 3
    code = {"trust_remote_code": True} if profile == "hf-code" else {}
    assert distance(logits(tmp_path / "out", **code), logits(converted)) < 1e-5


@torch.no_grad()
def test_engine_is_right_where_the_latent_norm_reads_the_configuration(tabled, tmp_path):
    """The form for vLLM, SGLang and llama.cpp; transformers' class, which would misread it, refuses to build it."""
    export(tabled("llama"), tmp_path / "out", "engine")
    with pytest.raises(AssertionError, match="Padding_idx"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 0}))
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wrong = distance(model(IDS).logits, logits(tabled("llama")))
    for layer in model.model.layers:
        assert layer.self_attn.kv_a_layernorm.weight.log2().frac().abs().max() == 0
        layer.self_attn.kv_a_layernorm.variance_epsilon = model.config.rms_norm_eps
    assert distance(model(IDS).logits, logits(tabled("llama"))) < 1e-4 < 0.05 < wrong


def test_engine_leaves_rows_as_large_as_quantised_formats_want_them(tabled, tmp_path):
    export(tabled("llama"), tmp_path / "out", "engine", pad="none")
    own = load_file(next((tmp_path / "out").glob("model-00002*")))
    kv_a = own["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].abs().amax(1)
    assert kv_a[:10].min() > 1e-3 * kv_a[10:].max()  # a block's scale in float16 reaches down to 6e-8
    assert max(float(tensor.abs().max()) for tensor in own.values()) < 65504


def test_code_without_trust_is_refused_by_stock_transformers(convert_pico, tmp_path):
    export(convert_pico("qwen2", rank=12, rope_dim=6).out, tmp_path / "out", "hf-code")
    with pytest.raises(AssertionError, match="Padding_idx"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


# refusals


@pytest.mark.parametrize("profile", ["portable", "engine"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("qwen2", "biases .*--profile hf-code"), ("llama-bias-wide-heads", "biases .*--profile hf-code"),
     ("qwen3", "norms on queries and keys.*--profile hf-code"),
     ("llama3-rope", "RoPE of type llama3.*--profile hf-code"), ("llama-yarn", "RoPE of type yarn")],
)  # fmt: skip
def test_what_needs_code_is_led_to_it(convert_pico, tmp_path, profile, name, words):
    with pytest.raises(InputError, match=words):
        export(convert_pico(name, rank=12, rope_dim=6).out, tmp_path / "out", profile)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("profile", ["portable", "hf-code"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("gemma3", "family gemma3"), ("gemma2", "family gemma2"), ("mistral-window", "sliding window of 12"),
     ("llama-dynamic", "depend on the length")],
)  # fmt: skip
def test_what_no_profile_can_say_is_refused(convert_pico, tmp_path, profile, name, words):
    with pytest.raises(InputError, match=words):
        export(convert_pico(name, rank=12, rope_dim=6).out, tmp_path / "out", profile)


def test_planes_that_no_table_has_are_refused(convert_pico, tmp_path):
    with pytest.raises(InputError, match=r"keeps 2 planes at frequency .*--for vllm.*hf-code"):
        export(convert_pico("llama", rank=8, rope_dim=12).out, tmp_path / "out")


def test_float16_is_refused(changed, tabled, tmp_path):
    with pytest.raises(InputError, match="float16 cannot hold"):
        export(tabled("llama"), tmp_path / "out", dtype="float16")
    halved = changed(tensors=lambda found: {k: t.half() if t.is_floating_point() else t for k, t in found.items()})
    with pytest.raises(InputError, match=r"float16 cannot hold.*--dtype bfloat16"):
        export(halved, tmp_path / "out")


def test_another_activation_is_refused(changed, tmp_path):
    with pytest.raises(InputError, match="activation gelu"):
        export(changed(hidden_act="gelu"), tmp_path / "out")


def test_a_tensor_that_has_no_place_is_refused(changed, tmp_path):
    def add(found):
        own = {f"{key.removesuffix('weight')}bias": t[:, 0].clone() for key, t in found.items() if "up_proj" in key}
        return found | own

    with pytest.raises(InputError, match=r"up_proj[.]bias of changed has no place"):
        export(changed(tensors=add), tmp_path / "out")


def test_a_latent_too_large_for_the_norm_is_refused(changed, tmp_path):
    def grow(found):
        return {key: t * 5e17 if "kv_a_proj" in key else t for key, t in found.items()}

    folder = changed(tensors=grow)
    for profile in ("portable", "engine", "hf-code"):
        with pytest.raises(InputError, match=r"latent of layer 0 can reach .* cannot be exported"):
            export(folder, tmp_path / "out", profile)


def test_a_source_that_is_not_converted_is_refused(sources, tmp_path):
    with pytest.raises(InputError, match="no converted model"):
        export(sources("llama"), tmp_path / "out")


@pytest.mark.parametrize(
    ("ranks", "rope", "nope", "v", "pad", "words"),
    [([513], 64, 64, 64, "auto", "rank 513 is above 512"), ([300], 64, 64, 64, 256, "rank 300 is above 256"),
     ([64], 66, 64, 64, "auto", "66 rotary dims"), ([64], 64, 256, 256, "auto", "heads of 256"),
     ([64, 80], 64, 64, 64, "none", "ranks from 64 to 80")],
)  # fmt: skip
def test_sizes_that_engines_refuse(ranks, rope, nope, v, pad, words):
    with pytest.raises(InputError, match=words):
        padded(ranks, rope, nope, v, pad)


def test_sizes_are_those_of_vllms_kernels():
    assert vars(padded([96], 32, 64, 64, "auto")) == {"rank": 256, "rope_dim": 64, "nope_dim": 64, "v_dim": 128}
    assert vars(padded([512], 64, 128, 128, "auto")) == {"rank": 512, "rope_dim": 64, "nope_dim": 128, "v_dim": 128}
    assert vars(padded([96, 80], 64, 80, 80, 448)) == {"rank": 448, "rope_dim": 64, "nope_dim": 128, "v_dim": 128}


def test_gguf_is_for_profile_engine(tabled, tmp_path):
    with pytest.raises(UsageError, match="--gguf is for --profile engine"):
        export(tabled("llama"), tmp_path / "out", gguf=True)
    export(tabled("llama"), tmp_path / "out", "engine", gguf=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["q_lora_rank"] == 0


# its parts


def test_one_table_for_all_layers():
    theta, inv_freq = 5e5, [5e5 ** (-f / 64) for f in range(64)]
    table = share_table([[0, 2, 62], [4, 6]], inv_freq, theta)
    assert (table.theta, table.size, table.slots) == (theta, 32, [[0, 1, 31], [2, 3]])
    table = share_table([[0, 3]], inv_freq, theta, None)  # two frequencies in steps of three
    assert (table.size, table.slots) == (2, [[0, 1]])
    assert table.theta ** (-1 / table.size) == pytest.approx(inv_freq[3])
    with pytest.raises(InputError, match="up to 63 in steps of 1"):
        share_table([[0, 1], [63]], inv_freq, theta)
    with pytest.raises(InputError, match="no powers of one number"):
        share_table([[0]], [1.0, 0.5, 0.1], theta)


def test_latent_norm_is_linear_within_its_bound():
    torch.manual_seed(0)
    latent = 3 * torch.randn(100, 32, dtype=torch.float64)
    size = float(latent.square().mean(-1).max())
    norm = LatentNorm.linear(1e-6, size, 2.0**-8, 2.0**-60)
    scaled = latent * norm.alpha
    normed = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + norm.eps) * norm.gain * norm.remainder
    error = ((normed - latent).norm(dim=-1) / latent.norm(dim=-1)).max()
    assert 0 < error <= norm.distortion(size) <= DISTORTION
    assert 0.7 < norm.remainder < 1.42 and LatentNorm.linear(1e-6, 1e40, 1.0, 2.0**-60) is None


def test_bound_of_the_latent_holds_for_the_worst_input():
    torch.manual_seed(0)
    heads, hidden, rank = 2, 24, 8
    attention = Attention(
        q=torch.randn(heads, 6, hidden),
        q_bias=None,
        kv_a=torch.randn(rank + 2, hidden).double(),
        kv_a_bias=torch.randn(rank + 2).double(),
        kv_b=torch.randn(heads, 8, rank),
        o=torch.randn(hidden, heads, 4),
        o_bias=None,
        planes=1,
        v_dim=4,
    )
    weight = torch.rand(hidden) + 0.5
    bound = attention.largest_mean_square(weight, rank)
    rows = attention.kv_a[:rank] * weight
    worst = torch.linalg.svd(rows).Vh[0] * hidden**0.5
    inputs = torch.cat([torch.randn(500, hidden, dtype=torch.float64), torch.stack([worst, -worst])])
    inputs = inputs / inputs.square().mean(-1, keepdim=True).sqrt()
    latents = inputs @ rows.T + attention.kv_a_bias[:rank]
    largest = float(latents.square().mean(-1).max())
    assert 0.3 * bound < largest <= bound


def test_asking_needs_nothing_of_ours():
    assert (
        "import mla_convert" not in (text := Path(ask_engine.__file__).read_text()) and "from mla_convert" not in text
    )

"""vLLM's plugin: what runs without vLLM, and (marked `engine`) converted folders served by a CPU build of it."""

import importlib.metadata
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mla_convert.modeling.decode_mla import rotate_planes
from mla_convert.modeling.latent_format_mla import LatentFormat, kernel_format, key_basis
from mla_convert.modeling.quantised_latent_mla import dequantise_rows, quantise_rows
from mla_convert.publish.engines.served.checks import foreign_fields
from mla_convert.publish.engines.served.kernels import Shape, attend, decode, has_kernel, write
from mla_convert.publish.engines.served.rotary import LatentRotary, Reference
from mla_convert.publish.engines.vllm_plugin import entry
from mla_convert.source.families import FAMILIES, is_installed

VLLM = os.environ.get("MLA_CONVERT_VLLM_PLUGIN_PYTHON")
needs_vllm = pytest.mark.skipif(
    not VLLM, reason="MLA_CONVERT_VLLM_PLUGIN_PYTHON names no interpreter that has vLLM and mla_convert"
)


@pytest.fixture
def registry(monkeypatch):
    """Stands in for vLLM: the classes that the plugin registered."""
    found = {}
    module = type(sys)("vllm")
    module.__version__ = "0.26.0"
    module.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return found


def test_entry_point_is_declared():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert [point.load() for point in points if point.name == "mla_convert"] == [entry.register]


def test_every_family_is_registered(registry, caplog):
    entry.register()
    entry.register()
    assert len(registry) == len({*filter(is_installed, FAMILIES)})
    assert registry["MlaLlamaForCausalLM"] == f"{entry.MODULE}:MlaLlamaForCausalLM" and not caplog.records


def test_another_version_is_one_clear_line(registry, caplog):
    sys.modules["vllm"].__version__ = "0.33.1"
    with caplog.at_level(logging.WARNING):
        entry.register()
    (record,) = caplog.records
    assert "vLLM 0.26, and 0.33.1 is installed" in record.message and "mla-convert export" in record.message
    assert entry.serves("0.26.3+cu130") and not entry.serves("0.25.9") and not entry.serves("0.260.0")


def test_fields_that_the_plugin_does_not_read_are_found(convert_pico):
    config = AutoConfig.from_pretrained(convert_pico("llama", rank=10, rope_dim=8).out)
    assert foreign_fields(config) == []
    config.mla_format, config.latent_more, config.mla_of_tomorrow = 2, {"kind": "int4"}, True
    assert foreign_fields(config) == ["latent_more", "mla_format", "mla_of_tomorrow"]


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "llama-yarn", "cohere", "phi", "gpt-neox-sequential"])
def test_rotary_tables_are_those_of_the_model(convert_pico, name):
    folder = convert_pico(name, rank=10, rope_dim=8).out
    config = AutoConfig.from_pretrained(folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attentions = [getattr(layer, config.mla_attention) for layer in model.get_submodule(config.mla_layers)]
    reference = Reference(config, 256)
    assert reference.softmax_scales == [attention.scaling for attention in attentions]
    rotary = LatentRotary(reference, config.model_type.removeprefix("mla_"), [8] * len(attentions))
    rotary.place([attention.rope_freq_index.tolist() for attention in attentions])
    positions = torch.tensor([0, 1, 77, 201])
    rotary.prepare(positions)
    decoder = model.get_submodule(config.mla_layers.rpartition(".")[0])
    tables = decoder.rotary_emb(torch.zeros(1), positions[None])
    for index, attention in enumerate(attentions):
        expected = [table[0][:, attention.rope_freq_index] for table in tables]
        cos, sin = rotary.of_layer(index, 3)
        torch.testing.assert_close(cos[:, :4], expected[0][:3])
        torch.testing.assert_close(sin[:, :4], expected[1][:3])
        torch.testing.assert_close(cos[:, 4:], torch.full((3, 4), reference.scaling))  # planes that pad do not turn


def test_layers_with_the_same_planes_share_their_table(convert_pico):
    config = AutoConfig.from_pretrained(convert_pico("llama", rank=10, rope_dim=8).out)
    rotary = LatentRotary(Reference(config, 256), "llama", [4, 4, 2])
    rotary.place([[0, 2, 1, 3], [0, 2, 1, 3], [3, 0]])
    assert rotary.places == [0, 0, 4] and len(rotary.frequencies) == 6


@pytest.mark.parametrize(
    ("name", "length", "words"), [("llama-dynamic", 64, "dynamic"), ("llama-longrope", 256, "--max-")]
)
def test_rope_that_depends_on_the_length_is_refused(convert_pico, name, length, words):
    config = AutoConfig.from_pretrained(convert_pico(name, rank=10, rope_dim=8).out)
    with pytest.raises(ValueError, match=words):
        Reference(config, length)


@pytest.mark.parametrize(("softcap", "window"), [(0.0, None), (2.0, None), (0.0, 5), (2.0, 5)])
@pytest.mark.parametrize("rank", [32, 30])  # with a kernel's interface, and without
def test_decode_and_prefill_agree(rank, softcap, window):
    """Chunks of two requests: expanded attention on the cache's rows, and absorbed attention token by token."""
    torch.manual_seed(0)
    heads, nope, rope, page, lengths, before = 3, 8, 16, 16, [21, 40], [0, 33]
    up_key, up_value = torch.randn(heads, nope, rank), torch.randn(heads, 6, rank)
    cache = torch.full((9, page, rank + rope), torch.nan)
    table = torch.tensor([[7, 1, 0], [2, 5, 3]], dtype=torch.int32)
    rows = [table[b, torch.arange(n) // page].long() * page + torch.arange(n) % page for b, n in enumerate(lengths)]
    total = sum(lengths)
    cos, sin = torch.randn(total, rope // 2), torch.randn(total, rope // 2)
    q = write(torch.randn(total, rank), torch.randn(total, rope), torch.randn(total, heads, rope), cos, sin, cache,
              torch.cat(rows))  # fmt: skip
    q_nope = torch.randn(total, heads, nope)
    cached = cache.view(-1, rank + rope)[torch.cat(rows)]
    key = torch.cat(
        [torch.einsum("sr,hdr->shd", cached[:, :rank], up_key), cached[:, None, rank:].expand(-1, heads, -1)], -1
    )
    value = torch.einsum("sr,hvr->shv", cached[:, :rank], up_value)
    chosen = torch.cat([torch.arange(start, n) + off for start, n, off in zip(before, lengths, (0, 21), strict=True)])
    queries = [n - start for start, n in zip(before, lengths, strict=True)]
    prefill = attend(torch.cat([q_nope, q], -1)[chosen], key, value, None, None, queries, lengths, 0.3, softcap, window)
    for at, token in enumerate(chosen.tolist()):
        request, length = (0, token + 1) if token < 21 else (1, token - 20)
        q_latent = torch.einsum("hd,hdr->hr", q_nope[token], up_key)[None, None]
        seen = torch.tensor([length], dtype=torch.int32)
        found = decode(q_latent, q[token][None, None], cache, seen, table[request : request + 1], 0.3, softcap, window)
        torch.testing.assert_close(torch.einsum("hr,hvr->hv", found[0, 0], up_value), prefill[at], rtol=2e-4, atol=2e-4)
    assert has_kernel(rank, rope, heads) == (rank == 32)


@pytest.mark.parametrize(("rank", "rope", "wide"), [(40, 24, 0), (48, 16, 16)])
@pytest.mark.parametrize("drafts", [1, 3])
def test_rows_with_the_key_in_the_latent_decode_as_they_prefill(rank, rope, wide, drafts):
    """Queries are one buffer that the launch and the product of absorption fill; a prefill reads keys as they are cached."""
    torch.manual_seed(0)
    fmt = LatentFormat("mixed", rank, rope, 32, wide, "int4")
    shape = Shape(8, rank, rope, 3, 0.3, 0.0, None, kernel_format(fmt), fmt.spreads)
    assert shape.row == fmt.row_bytes and shape.decoded == (64, 0)
    up_key, up_value, length = torch.randn(3, 8, rank), torch.randn(3, 6, rank), 21
    cache = torch.full((4, 16, shape.row), 255, dtype=torch.uint8)
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    slots = table[0, torch.arange(length) // 16].long() * 16 + torch.arange(length) % 16
    q_nope, angles = torch.randn(length, 3, 8), torch.rand(length, rope // 2) * 6
    latent, key, q_rope = torch.randn(length, rank), torch.randn(length, rope), torch.randn(length, 3, rope)
    basis = key_basis(fmt, latent)
    query = write(latent, key, q_rope, angles.cos(), angles.sin(), cache, slots, shape.form, basis, rank)
    rows = cache.view(-1, shape.row)[slots]
    turned = rotate_planes(key, angles.cos(), angles.sin())
    assert torch.equal(rows, quantise_rows(fmt, latent, turned))
    torch.bmm(q_nope.transpose(0, 1), up_key, out=query[..., :rank].transpose(0, 1))
    cached, keys = dequantise_rows(fmt, rows)
    expanded = torch.cat([torch.einsum("sr,hdr->shd", cached, up_key), keys[:, None].expand(-1, 3, -1)], -1)
    value = torch.einsum("sr,hvr->shv", cached, up_value)
    whole = torch.cat([q_nope, query[..., rank:]], -1)
    prefill = attend(whole, expanded, value, None, None, [length], [length], 0.3, 0.0, None)
    last = query[length - drafts :][None]
    seen = torch.tensor([length], dtype=torch.int32)
    found = decode(last, last[..., :0], cache, seen, table, 0.3, 0.0, None, shape.form)[0, ..., :rank]
    torch.testing.assert_close(
        torch.einsum("thr,hvr->thv", found, up_value), prefill[length - drafts :], rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize(
    ("tokens", "heads", "nope", "rank", "rope"), [(1, 4, 24, 48, 16), (16, 2, 16, 128, 0), (7, 9, 20, 272, 16)]
)
def test_one_launch_absorbs_rotates_and_writes(tokens, heads, nope, rank, rope):
    pytest.importorskip("triton")
    from mla_convert.publish.engines.served.kernels import absorb_and_write

    torch.manual_seed(0)
    fused = torch.randn(tokens, heads * (nope + rope) + rank + rope)  # as one product gives them
    query, latent, key = fused.split([heads * (nope + rope), rank, rope], dim=-1)
    query = query.unflatten(1, (heads, nope + rope))
    up_key = torch.randn(heads, nope + rope, rank + rope)[:, :nope, :rank]
    cos, sin = torch.randn(tokens, rope + 3).split([rope // 2, rope // 2 + 3], dim=-1)
    sin = sin[:, : rope // 2]
    cache, expected = torch.zeros(2, 4, 16, rank + rope)
    slots = torch.randperm(64)[:tokens]
    slots[tokens // 2 :: 5] = -1
    q_latent, q_rope = absorb_and_write(query, up_key, latent, key, cos, sin, cache, slots)
    rotated = write(latent, key, query[..., nope:], cos, sin, expected, slots)
    torch.testing.assert_close(q_latent, torch.einsum("thd,hdr->thr", query[..., :nope], up_key), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q_rope, rotated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, expected, rtol=1e-5, atol=1e-5)


def test_only_plugins_serve_a_converted_folder(cli, convert_pico):
    folder = convert_pico("llama", rank=10, rope_dim=8).out
    code, _, err = cli("serve-check", folder, "--engine", "transformers")
    assert code == 2 and "only vLLM and SGLang have a plugin" in err and err.count("\n") == 1


def test_the_verdict_says_how_it_was_served(cli, convert_pico, monkeypatch):
    """The answers of the converted model itself, as vLLM would give them."""
    from mla_convert.publish.engines import serve_check

    folder = convert_pico("llama", rank=10, rope_dim=8).out
    setting = {"backend": "MLA_CONVERT", "cache_dtype": "float32", "cache_widths": [16, 32], "prefix_caching": True,
               "chunk": 48, "graphs": "FULL"}  # fmt: skip
    changed = [0]

    def answers(place, how, prompts, dtype):
        assert (how.eager, how.prefix_caching, how.chunk) == (False, True, 48)
        logprobs, greedy = serve_check._own_answers(serve_check.find_model(str(place)), prompts, torch.float64)
        lines = serve_check._as_entries(logprobs)
        entries = [
            {
                "logprobs": line,
                "greedy": tokens,
                "greedy_from_cache": [t + changed[0] for t in tokens],
                "cached_tokens": 16,
            }
            for line, tokens in zip(lines, greedy, strict=True)
        ]
        return {"version": "0.26.0", "path": "MlaLlamaForCausalLM", "prompts": entries, "setting": setting}

    monkeypatch.setattr(serve_check, "_ask", answers)
    code, out, err = cli("serve-check", folder, "--engine", "vllm")
    assert code == 0, err
    for words in (
        "profile plugin",
        "MLA_CONVERT",
        "float32 of 16, 32",
        "64 tokens read",
        "4 of 4",
        "48",
        "graphs FULL",
    ):
        assert words in out
    changed[0] = 1  # other tokens from cached prefixes
    assert cli("serve-check", folder, "--engine", "vllm")[0] == 3


# a real engine: .ci/engines installs it and runs these


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize(
    "name",
    ["llama", "llama-linear", "llama-yarn", "llama3-rope", "llama-mha-tied", "llama-bias-wide-heads", "mistral-window",
     "qwen2", "qwen3", "arcee", "cohere", "exaone4", "exaone4-no-rope", "gemma", "gemma2", "glm", "glm4", "granite", "phi3",
     "seed_oss", "stablelm"],
)  # fmt: skip
def test_vllm_serves_layers_of_different_sizes(cli, convert_pico, name):
    folder = convert_pico(name, kv_ratio=0.6, uniform=False).out
    code, out, err = cli("serve-check", folder, "--engine", "vllm", "--python", VLLM)
    assert code == 0, out + err
    assert "backend MLA_CONVERT" in out and "the same continuation for 4 of 4" in out


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize(
    ("name", "kind", "rope", "sizes"),
    [
        ("llama", "auto", "int4", (24, 8)),
        ("qwen3", "int4", "int4", (24, 8)),
        ("gemma2", "int4", "int4", (24, 8)),
        ("llama", "auto", "fp8", (16, 16)),
    ],
)
def test_vllm_serves_packed_rows(cli, convert_pico, name, kind, rope, sizes):
    """Of a rotary key in 4 bits, which is part of the latent, and of one beside it."""
    folder = convert_pico(name, rank=sizes[0], rope_dim=sizes[1], cache_dtype=kind, cache_rope=rope).out
    code, out, err = cli("serve-check", folder, "--engine", "vllm", "--python", VLLM)
    assert code == 0, out + err
    assert "backend MLA_CONVERT" in out and "the same continuation for 4 of 4" in out


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_vllm_serves_heads_with_fewer_content_dims(cli, convert_pico, name):
    folder = convert_pico(name, kv_ratio=0.6, uniform=False, nope_dim=3).out
    code, out, err = cli("serve-check", folder, "--engine", "vllm", "--python", VLLM)
    assert code == 0, out + err
    assert "the same continuation for 4 of 4" in out


@pytest.mark.engine
@needs_vllm
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phi", "the plugin serves llama"),
        ("llama-dynamic", "RoPE of type dynamic"),
        ("gpt-oss", "the plugin serves llama"),
    ],
)
def test_vllm_refuses_in_one_line(cli, convert_pico, name, words):
    folder = convert_pico(name, rank=10, rope_dim=8).out
    code, _, err = cli("serve-check", folder, "--engine", "vllm", "--python", VLLM)
    assert code == 5 and words in err and err.count("\n") == 1


@pytest.mark.engine
@needs_vllm
def test_vllm_refuses_rows_without_a_kernel_in_one_line(cli, convert_pico):
    folder = convert_pico("llama", rank=22, rope_dim=8, cache_dtype="int4", cache_rope="int4").out
    code, _, err = cli("serve-check", folder, "--engine", "vllm", "--python", VLLM)
    assert code == 5 and "rows of 22 + 8 numbers in int4 and int4" in err and err.count("\n") == 1


@pytest.mark.engine
@needs_vllm
def test_vllm_refuses_a_checkpoint_with_a_tensor_missing(cli, convert_pico, tmp_path):
    folder = shutil.copytree(convert_pico("llama", rank=10, rope_dim=8).out, tmp_path / "model")
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if tensors.pop("model.layers.1.self_attn.rope_freq_index", None) is not None:
            save_file(tensors, file, {"format": "pt"})
    code, _, err = cli("serve-check", folder, "--engine", "vllm", "--python", VLLM)
    assert code == 5 and "rope_freq_index is missing from the checkpoint" in err

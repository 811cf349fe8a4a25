"""The choice between the kernels and the library's attention. On the CPU the operators compute their reference."""

from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, StaticCache

import mla_attention
from mla_convert.modeling import configuration_mla, decode_mla, modeling_mla
from mla_convert.modeling.decode_mla import rotate_planes
from mla_convert.modeling.latent_format_mla import LatentFormat
from mla_convert.modeling.quantised_latent_mla import dequantise_rows, write_packed


@pytest.fixture
def on_any_device(monkeypatch):
    """Let the kernels serve tensors on the CPU."""
    refusal = decode_mla.kernel_refusal

    def lenient(*arguments):
        reason = refusal(*arguments)
        return None if reason and "CUDA" in reason else reason

    monkeypatch.setattr(decode_mla, "mla_attention", mla_attention)
    monkeypatch.setattr(decode_mla, "kernel_refusal", lenient)


def inputs(batch=2, heads=3, tokens=1, length=9, rank=32, rope_dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, tokens, rank), (heads, tokens, rope_dim), (1, length, rank), (1, length, rope_dim))
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def causal(tokens, length, seen):
    """Mask of a static cache of which `seen` tokens are written, the last of them the queries' own."""
    return torch.arange(length) <= torch.arange(seen - tokens, seen)[:, None]


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [(1, None), (1, causal(1, 9, 9)), (1, causal(1, 9, 4)), (3, causal(3, 9, 9)), (3, causal(3, 9, 5))],
)
@pytest.mark.parametrize("batch_of_mask", [1, 2])
def test_same_as_the_library(on_any_device, monkeypatch, tokens, mask, batch_of_mask):
    calls = []
    decode = mla_attention.mla_decode
    monkeypatch.setattr(mla_attention, "mla_decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    mask = None if mask is None else mask.expand(batch_of_mask, 1, -1, -1)
    arguments = (*inputs(tokens=tokens), mask, 0.3)
    attended, _ = decode_mla.absorbed_attention(*arguments, kernel="kernels")
    assert len(calls) == 1
    expected, _ = decode_mla.absorbed_attention(*arguments, kernel="sdpa")
    torch.testing.assert_close(attended, expected)


def padded(tokens=1, gap=False):
    """Two sequences of 9 tokens in a cache of 11: the first has two tokens of padding, the second optionally a gap."""
    mask = causal(tokens, 11, 9).expand(2, 1, -1, -1).clone()
    mask[0, ..., :2] = False
    if gap:
        mask[1, ..., 4] = False
    return mask


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize(
    ("compiled", "softcap", "sinks"),
    [(False, None, None), (True, None, None), (False, 2.0, None), (True, 2.0, torch.tensor([0.5, -1.0, 2.0]))],
)
def test_padding_and_gaps(on_any_device, tokens, gap, compiled, softcap, sinks):
    arguments = (*inputs(tokens=tokens, length=11), padded(tokens, gap), 0.3)
    attend = decode_mla.kernel_attention
    if compiled:
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
    attended = attend(*arguments, "auto", softcap, sinks)
    expected, _ = decode_mla.absorbed_attention(*arguments, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(attended, expected)


def test_bounds_of_a_changed_mask_are_computed_again(on_any_device):
    mask = padded()
    for _ in range(2):
        arguments = (*inputs(length=11), mask, 0.3)
        attended = decode_mla.kernel_attention(*arguments, "kernels")
        torch.testing.assert_close(attended, decode_mla.absorbed_attention(*arguments)[0])
        mask[0, ..., 2:5] = False
    with torch.inference_mode():
        mask = padded()
        for _ in range(2):
            arguments = (*inputs(length=11), mask, 0.3)
            attended = decode_mla.kernel_attention(*arguments, "kernels")
            torch.testing.assert_close(attended, decode_mla.absorbed_attention(*arguments)[0])
            mask[0, ..., 2:5] = False


def test_refusals(monkeypatch):
    arguments = (*inputs(), None, 0.3)
    monkeypatch.setattr(decode_mla, "mla_attention", mla_attention)
    assert decode_mla.kernel_attention(*arguments, "auto") is None
    with pytest.raises(ValueError, match="the cache is on cpu"):
        decode_mla.kernel_attention(*arguments, "kernels")
    monkeypatch.setattr(decode_mla, "mla_attention", None)
    with pytest.raises(ValueError, match="mla_attention is not installed"):
        decode_mla.kernel_attention(*arguments, "kernels")
    monkeypatch.setattr(decode_mla, "mla_attention", SimpleNamespace(mask_extent=None))
    with pytest.raises(ValueError, match="mla_attention is older than this code"):
        decode_mla.kernel_attention(*arguments, "kernels")


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rank": 24}, "rank 24"), ({"tokens": 2}, "several query tokens"), ({"heads": 129}, "129 heads")],
)
def test_shapes_that_the_kernels_do_not_serve(on_any_device, changed, message):
    with pytest.raises(ValueError, match=message):
        decode_mla.kernel_attention(*inputs(**changed), None, 0.3, "kernels")


def test_gradients_and_masks_that_the_kernels_do_not_serve(on_any_device):
    tensors = inputs()
    with pytest.raises(ValueError, match="gradients are required"):
        decode_mla.kernel_attention(tensors[0].requires_grad_(), *tensors[1:], None, 0.3, "kernels")
    with pytest.raises(ValueError, match=r"mask is torch\.float32"), torch.no_grad():
        decode_mla.kernel_attention(*tensors, torch.zeros(2, 1, 1, 9), 0.3, "kernels")


def test_environment_overrides_configuration(monkeypatch):
    config = SimpleNamespace(mla_kernel="kernels")
    monkeypatch.delenv("MLA_CONVERT_KERNEL", raising=False)
    assert configuration_mla.kernel_choice(config) == "kernels"
    monkeypatch.setenv("MLA_CONVERT_KERNEL", "sdpa")
    assert configuration_mla.kernel_choice(config) == "sdpa"
    monkeypatch.setenv("MLA_CONVERT_KERNEL", "cuda")
    with pytest.raises(ValueError, match="'cuda', expected one of"):
        configuration_mla.kernel_choice(config)


PACKED = {"version": 1, "kind": "int4", "group": 32, "rope": "fp8"}


JOINT = PACKED | {"rope": "int4"}  # the kernels see one latent of 48 channels


@pytest.mark.parametrize("latent_cache", [None, PACKED, JOINT], ids=["numbers", "packed", "rotary key in the latent"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_same(on_any_device, monkeypatch, cache, latent_cache):
    config = configuration_mla.MlaLlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, qk_head_dim=32,
        latent_cache=latent_cache,
    )  # fmt: skip
    torch.manual_seed(0)
    model = modeling_mla.MlaLlamaForCausalLM(config).eval()
    calls = []
    decode = mla_attention.mla_decode
    monkeypatch.setattr(mla_attention, "mla_decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    writes = []
    write = mla_attention.mla_write
    monkeypatch.setattr(mla_attention, "mla_write", wraps(write)(lambda *a, **k: writes.append(a) or write(*a, **k)))
    outputs = []
    for choice in ("sdpa", "kernels"):
        for layer in model.model.layers:
            layer.self_attn.kernel = choice
        prompt = torch.arange(2 * 5).view(2, 5)
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        if cache == "static":
            options |= {"cache_implementation": "static", "disable_compile": True}
        outputs.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options))
        assert len(calls) == (0 if choice == "sdpa" else 2 * 5)
        written = choice == "kernels" and cache == "static"
        assert len(writes) == (2 * 6 if written else 0)  # the prompt as well
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@pytest.mark.parametrize(("rank", "rope_dim"), [(32, 16), (40, 24)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_with_the_key_in_the_latent_are_written_in_one_launch(
    on_any_device, monkeypatch, rank, rope_dim, weighted
):
    """The launch leaves the rows and the queries of PyTorch's operations; factors of queries come before the spreading."""
    fmt = LatentFormat("int4", rank, rope_dim, 48, rope="int4")
    generator = torch.Generator().manual_seed(1)
    latent, key, query, angles = (
        torch.randn(2, *shape, generator=generator)
        for shape in ((1, 3, rank), (1, 3, rope_dim), (4, 3, rope_dim), (3, rope_dim // 2))
    )
    weight = torch.rand(rope_dim, generator=generator) if weighted else None
    calls = []
    write = mla_attention.mla_write
    monkeypatch.setattr(mla_attention, "mla_write", wraps(write)(lambda *a, **k: calls.append(a) or write(*a, **k)))
    found = []
    for kernels in (False, True):
        cache = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=9)
        arguments = (fmt, cache, 0, latent, key, query, angles.cos(), angles.sin(), weight, kernels)
        q_rope, rows, _ = write_packed(*arguments)
        found.append((q_rope, rows.clone(), dequantise_rows(fmt, rows)[0]))
    assert len(calls) == (0 if weighted else 1)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    expected = rotate_planes(query, angles.cos()[:, None], angles.sin()[:, None]) * (1 if weight is None else weight)
    torch.testing.assert_close(found[1][0], fmt.spread(expected))


def test_an_older_mla_attention_does_not_write_the_key_into_the_latent(on_any_device, monkeypatch):
    """Its `mla_write` has no basis: PyTorch packs the rows."""
    fmt = LatentFormat("int4", 32, 16, 48, rope="int4")
    monkeypatch.setattr(mla_attention, "mla_write", lambda latent, k_rope, row_format=None: pytest.fail("was called"))
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=9)
    tables = torch.rand(2, 1, 3, 8)
    _, rows, _ = write_packed(
        fmt, cache, 0, torch.ones(1, 1, 3, 32), torch.ones(1, 1, 3, 16), torch.ones(1, 2, 3, 16), *tables, None, True
    )  # fmt: skip
    assert rows[:, :, :3].any() and not rows[:, :, 3:].any()

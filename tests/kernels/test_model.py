"""The switch between the kernels and the library's attention. On the CPU the operators compute their reference."""

from types import SimpleNamespace

import pytest
import torch

import mla_attention
from mla_convert.modeling import configuration_mla, modeling_mla


@pytest.fixture
def on_any_device(monkeypatch):
    """Let the kernels serve tensors on the CPU."""
    refusal = modeling_mla.kernel_refusal

    def lenient(*arguments):
        reason = refusal(*arguments)
        return None if reason and "CUDA" in reason else reason

    monkeypatch.setattr(modeling_mla, "mla_attention", mla_attention)
    monkeypatch.setattr(modeling_mla, "kernel_refusal", lenient)


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
    mine, _ = modeling_mla.absorbed_attention(*arguments, kernel="triton")
    assert len(calls) == 1
    theirs, _ = modeling_mla.absorbed_attention(*arguments, kernel="sdpa")
    torch.testing.assert_close(mine, theirs)


def test_left_padding_is_left_to_the_library(on_any_device):
    mask = causal(1, 9, 9).expand(2, 1, -1, -1).clone()
    mask[0, 0, 0, :2] = False
    arguments = (*inputs(), mask, 0.3)
    assert modeling_mla.kernel_attention(*arguments, "auto") is None
    with pytest.raises(ValueError, match="hides more than the future"):
        modeling_mla.kernel_attention(*arguments, "triton")
    mine, _ = modeling_mla.absorbed_attention(*arguments, kernel="auto")
    torch.testing.assert_close(mine, modeling_mla.absorbed_attention(*arguments)[0])


def test_compiled_masks_are_never_silently_wrong(on_any_device):
    padded = causal(1, 9, 9).expand(2, 1, -1, -1).clone()
    padded[0, 0, 0, :2] = False
    compiled = torch.compile(modeling_mla.kernel_attention, backend="aot_eager", fullgraph=True)
    assert compiled(*inputs(), padded, 0.3, "auto") is None
    assert compiled(*inputs(), padded, 0.3, "triton").isnan().all()
    mask = causal(1, 9, 5).expand(2, 1, -1, -1)
    want = modeling_mla.kernel_attention(*inputs(), mask, 0.3, "triton")
    torch.testing.assert_close(compiled(*inputs(), mask, 0.3, "triton"), want)


def test_refusals(monkeypatch):
    arguments = (*inputs(), None, 0.3)
    monkeypatch.setattr(modeling_mla, "mla_attention", mla_attention)
    assert modeling_mla.kernel_attention(*arguments, "auto") is None
    with pytest.raises(ValueError, match="the cache is on cpu"):
        modeling_mla.kernel_attention(*arguments, "triton")
    monkeypatch.setattr(modeling_mla, "mla_attention", None)
    with pytest.raises(ValueError, match="mla_attention is not installed"):
        modeling_mla.kernel_attention(*arguments, "triton")


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"rank": 24}, "rank 24"), ({"tokens": 2}, "several query tokens"), ({"heads": 129}, "129 heads")],
)
def test_shapes_that_the_kernels_do_not_serve(on_any_device, changed, message):
    with pytest.raises(ValueError, match=message):
        modeling_mla.kernel_attention(*inputs(**changed), None, 0.3, "triton")


def test_gradients_and_masks_that_the_kernels_do_not_serve(on_any_device):
    tensors = inputs()
    with pytest.raises(ValueError, match="gradients are asked for"):
        modeling_mla.kernel_attention(tensors[0].requires_grad_(), *tensors[1:], None, 0.3, "triton")
    with pytest.raises(ValueError, match=r"mask is torch\.float32"), torch.no_grad():
        modeling_mla.kernel_attention(*tensors, torch.zeros(2, 1, 1, 9), 0.3, "triton")


def test_environment_goes_before_configuration(monkeypatch):
    config = SimpleNamespace(mla_kernel="triton")
    monkeypatch.delenv("MLA_CONVERT_KERNEL", raising=False)
    assert modeling_mla.kernel_choice(config) == "triton"
    monkeypatch.setenv("MLA_CONVERT_KERNEL", "sdpa")
    assert modeling_mla.kernel_choice(config) == "sdpa"
    monkeypatch.setenv("MLA_CONVERT_KERNEL", "cuda")
    with pytest.raises(ValueError, match="'cuda', expected one of"):
        modeling_mla.kernel_choice(config)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_same(on_any_device, monkeypatch, cache):
    config = configuration_mla.MlaLlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, qk_head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = modeling_mla.MlaLlamaForCausalLM(config).eval()
    calls = []
    decode = mla_attention.mla_decode
    monkeypatch.setattr(mla_attention, "mla_decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    outputs = []
    for choice in ("sdpa", "triton"):
        for layer in model.model.layers:
            layer.self_attn.kernel = choice
        prompt = torch.arange(2 * 5).view(2, 5)
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        if cache == "static":
            options |= {"cache_implementation": "static", "disable_compile": True}
        outputs.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options))
        assert len(calls) == (0 if choice == "sdpa" else 2 * 5)
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)

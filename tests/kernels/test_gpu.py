"""On a card: generation, and the operator in eager, compiled and captured form. The whole grid: benchmarks/kernels_gpu.

TRITON_INTERPRET=0 pytest -m gpu tests/kernels/test_gpu.py
"""

import pytest
import torch
from cases import disagreement, make_case, pack_case

from mla_attention import RowFormat, mla_decode
from mla_convert.modeling import configuration_mla, modeling_mla

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(
    scope="module", params=[None, {"version": 1, "kind": "fp8", "group": 0, "rope": "fp8"}], ids=["numbers", "packed"]
)
def model(request):
    config = configuration_mla.MlaLlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, qk_head_dim=64,
        latent_cache=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    return modeling_mla.MlaLlamaForCausalLM(config).eval().to("cuda", torch.float32)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True},
                                   {"cache_implementation": "static"}])  # fmt: skip
@pytest.mark.parametrize("padding", [0, 3])
def test_generation_is_the_same(model, cache, padding):
    outputs = []
    prompt = torch.arange(2, 2 + 2 * 20, device="cuda").view(2, 20)
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    for choice in ("sdpa", "kernels"):
        for layer in model.model.layers:
            layer.self_attn.kernel = choice
        options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        outputs.append(model.generate(prompt, attention_mask=mask, pad_token_id=0, **options, **cache))
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("hopper", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("hidden", ["padding", "window", "gap"])
@pytest.mark.parametrize("form", [None, RowFormat(64, 1), RowFormat(0, 0, 64, 1)], ids=str)
@pytest.mark.parametrize(("rank", "rope_dim"), [(512, 64), (96, 32), (192, 64)])
def test_hidden_rows_may_be_nan(rank, rope_dim, form, hidden, tokens, dtype, hopper, monkeypatch):
    """NaN in hidden rows of a tile that also has visible rows: neither the CUDA kernels nor Triton's read them."""
    monkeypatch.setenv("MLA_ATTENTION_HOPPER", hopper)
    case = make_case(2, tokens, 32, rank, rope_dim, [700, 641], dtype, device="cuda")
    capacity = case["latent_cache"].shape[1]
    limit = torch.tensor([700, 641], device="cuda")[:, None] - tokens + 1 + torch.arange(tokens, device="cuda")
    mask = torch.arange(capacity, device="cuda") < limit[..., None]
    rows = {"padding": slice(0, 5), "window": slice(0, 700 - tokens - 108), "gap": slice(300, 333)}[hidden]
    mask[0, :, rows] = False
    visible = {"mask": mask}
    if hidden == "window":
        visible = {"window": 109}
    else:
        del case["cache_seqlens"]
    for name in ("latent_cache", "rope_cache"):
        case[name][0, rows] = torch.nan
    case = case if form is None else pack_case(case, form)
    arguments = {"cache_seqlens": None, **case}
    out, lse = mla_decode(**arguments, **visible, return_lse=True)
    assert out.isfinite().all() and disagreement(out, lse, case, **visible) is None


@pytest.mark.parametrize("form", [None, RowFormat(32, 0, 32)], ids=str)
@pytest.mark.parametrize(("rank", "rope_dim"), [(512, 64), (96, 32)])
def test_compiled_and_captured(rank, rope_dim, form):
    """torch.compile has one graph; a CUDA graph is replayed on other inputs than it was captured with."""
    lengths = [1000, 4096, 0, 17], [900, 4000, 3, 0]
    first, second = (
        make_case(4, 1, 32, rank, rope_dim, some, torch.bfloat16, device="cuda", seed=seed, spare=5000 - max(some))
        for seed, some in enumerate(lengths)
    )
    if form is not None:
        first, second = pack_case(first, form), pack_case(second, form)
    scale, form = first.pop("softmax_scale"), first.pop("row_format", None)

    def twice(inputs):
        return mla_decode(**inputs, softmax_scale=scale, row_format=form) * 2

    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(twice, fullgraph=True, mode=mode)
        for _ in range(3):
            assert torch.equal(compiled(first).clone(), twice(first))
    static = {name: value if value is None else value.clone() for name, value in first.items()}
    graph = torch.cuda.CUDAGraph()
    mla_decode(**static, softmax_scale=scale, row_format=form)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(**static, softmax_scale=scale, row_format=form, return_lse=True)
    for name, value in static.items():
        if value is not None:
            value.copy_(second[name])
    for _ in range(3):
        graph.replay()
    assert disagreement(out, lse, second) is None

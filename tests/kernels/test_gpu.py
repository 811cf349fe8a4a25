"""On a card: generation, captured and not. Numbers and the whole grid: benchmarks/kernels_gpu.

TRITON_INTERPRET=0 pytest -m gpu tests/kernels/test_gpu.py
"""

import pytest
import torch

from mla_convert.modeling import configuration_mla, modeling_mla

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    config = configuration_mla.MlaLlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, qk_head_dim=64,
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

"""The first law: at full rank with every plane kept, a converted model equals its original to rounding."""

import pytest
import torch
from pico import CONFIGS, VOCAB, model
from transformers import AutoModelForCausalLM

import mla_convert  # noqa: F401  (registers the converted classes)

LENGTH = 40
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def pair(request, convert_pico):
    """(original, converted) at full rank with all planes rotary, both float32."""
    report = convert_pico(request.param, rank="full", rope_dim="full")
    return model(request.param), AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[2, :1] = 0
    return ids, mask


def assert_equal(converted, original, mask):
    difference = (converted - original).abs()[mask.bool()].max()
    span = original.max() - original.min()
    assert difference <= TOLERANCE * span, f"logits differ by {difference / span:.1e} of their range"


@torch.no_grad()
def test_prefill_with_left_padding(pair, batch):
    original, converted = pair
    ids, mask = batch
    assert_equal(converted(ids, attention_mask=mask).logits, original(ids, attention_mask=mask).logits, mask)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[LENGTH - 6, 1, 1, 1, 1, 1, 1], [9, 18, 13], [20, 5, 8, 7]])
def test_cached_decode_and_chunked_prefill(pair, batch, chunks):
    original, converted = pair
    ids, mask = batch
    expected = original(ids, attention_mask=mask).logits
    cache, start, parts = None, 0, []
    for size in chunks:
        stop = start + size
        output = converted(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, stop
        parts.append(output.logits)
    assert_equal(torch.cat(parts, dim=1), expected, mask)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation(pair, batch, cache):
    original, converted = pair
    ids, mask = batch
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    expected = original.generate(ids, **options)
    assert torch.equal(converted.generate(ids, cache_implementation=cache, **options), expected)
    assert torch.equal(converted.generate(ids, use_cache=False, **options), expected)


@torch.no_grad()
def test_eager_equals_sdpa_and_gives_weights(pair, batch):
    _, converted = pair
    ids, mask = batch
    expected = converted(ids, attention_mask=mask).logits
    converted.set_attn_implementation("eager")
    try:
        output = converted(ids, attention_mask=mask, output_attentions=True)
        step = converted.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    finally:
        converted.set_attn_implementation("sdpa")
    assert_equal(output.logits, expected, mask)
    assert output.attentions[0].shape == (3, converted.config.num_attention_heads, LENGTH, LENGTH)
    assert torch.equal(step, converted.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_report_sees_no_loss(convert_pico, name):
    report = convert_pico(name, rank="full", rope_dim="full")
    assert report.ratio == pytest.approx(1.0, abs=1e-5)

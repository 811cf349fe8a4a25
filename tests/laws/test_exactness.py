"""The first law: at full rank with all rotary frequencies, a converted model equals its original to rounding."""

import re
from pathlib import Path

import pytest
import torch
from pico import VARIANTS, VOCAB, model
from transformers import AutoModelForCausalLM

import mla_convert  # noqa: F401  (registers the converted classes)
from mla_convert.source.source import open_source

LENGTH = 40
TOLERANCE = 1e-4
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "add-a-family.md"


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def pair(request, convert_pico):
    """(original, converted) at full rank with all rotary frequencies, both float32."""
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
    assert difference <= TOLERANCE * span, f"logits differ by {difference / span:.1e} of their range. {usual_reasons()}"


def usual_reasons():
    """The guide's list of mistakes in a family's description that make this test fail."""
    listed = re.search(r"^If the exactness test fails.*?(?=\n\n[^1-9])", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    return listed[0].replace("\n\n", "\n")


def test_a_failure_names_the_usual_reasons():
    reasons = usual_reasons().splitlines()
    assert len(reasons) == 5 and [line[:2] for line in reasons[1:]] == ["1.", "2.", "3.", "4."]
    logits = torch.zeros(1, 1, 2)
    with pytest.raises(AssertionError, match=r"qk_norm_shape"):
        assert_equal(logits, logits + torch.tensor([0.0, 1.0]), torch.ones(1, 1))


def run(model, ids, **options):
    """Model output. Dynamic RoPE keeps the frequencies of the longest text so far; one short text resets them."""
    model(ids[:, :1])
    return model(ids, **options)


def generate(model, ids, **options):
    model(ids[:, :1])
    return model.generate(ids, max_new_tokens=8, do_sample=False, **options)


def in_chunks(model, ids, mask, chunks):
    """Logits (B, T, vocabulary) of the same tokens, given to a cache in chunks of these sizes."""
    model(ids[:, :1])
    cache, start, parts = None, 0, []
    for size in chunks:
        stop = start + size
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, stop
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_prefill_with_left_padding(pair, batch):
    original, converted = pair
    ids, mask = batch
    assert_equal(run(converted, ids, attention_mask=mask).logits, run(original, ids, attention_mask=mask).logits, mask)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[LENGTH - 6, 1, 1, 1, 1, 1, 1], [9, 18, 13], [20, 5, 8, 7]])
def test_cached_decode_and_chunked_prefill(pair, batch, chunks):
    original, converted = pair
    assert_equal(in_chunks(converted, *batch, chunks), in_chunks(original, *batch, chunks), batch[1])


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation(pair, batch, cache):
    original, converted = pair
    ids, mask = batch
    expected = generate(original, ids, attention_mask=mask, cache_implementation=cache)
    assert torch.equal(generate(converted, ids, attention_mask=mask, cache_implementation=cache), expected)


@torch.no_grad()
def test_generation_without_a_cache(pair, batch):
    original, converted = pair
    ids, mask = batch
    expected = generate(original, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(generate(converted, ids, attention_mask=mask, use_cache=False), expected)


@torch.no_grad()
def test_eager_equals_sdpa_and_gives_weights(pair, batch):
    _, converted = pair
    ids, mask = batch
    given = converted.config._attn_implementation
    expected = run(converted, ids, attention_mask=mask).logits
    tokens = generate(converted, ids, attention_mask=mask)
    converted.set_attn_implementation("eager")
    try:
        output = run(converted, ids, attention_mask=mask, output_attentions=True)
        assert torch.equal(generate(converted, ids, attention_mask=mask), tokens)
    finally:
        converted.set_attn_implementation(given)
    assert_equal(output.logits, expected, mask)
    assert output.attentions[0].shape == (3, converted.config.num_attention_heads, LENGTH, LENGTH)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_report_sees_no_loss(convert_pico, name):
    report = convert_pico(name, rank="full", rope_dim="full")
    assert report.perplexity_ratio == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi", "glm4"])
def test_as_many_content_dims_as_rope_leaves_still_are_exact(convert_pico, sources, batch, name):
    original, shape = model(name), open_source(str(sources(name))).shape
    still = shape.head_dim - shape.rotary_dim
    report = convert_pico(name, rank="full", rope_dim="full", nope_dim=still)
    converted = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval()
    assert converted.config.qk_nope_head_dim == still < shape.head_dim
    ids, mask = batch
    assert_equal(run(converted, ids, attention_mask=mask).logits, run(original, ids, attention_mask=mask).logits, mask)
    assert_equal(in_chunks(converted, ids, mask, [20, 5, 8, 7]), in_chunks(original, ids, mask, [20, 5, 8, 7]), mask)

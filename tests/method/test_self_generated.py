"""Self-generated text: sampled from the stored model, reproducible by its seed, in the right windows."""

import pico
import pytest
import torch

from mla_convert.core.cuda_graph import CaptureError
from mla_convert.core.processes import alone
from mla_convert.core.report_schema import CalibrationSection
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.calibrate import self_generated
from mla_convert.modeling.attention_backends import sdpa_grouped_query
from mla_convert.report.format import calibration_text
from mla_convert.source.source import open_source

CPU = torch.device("cpu")


@pytest.fixture
def opened(sources):
    return lambda name: open_source(str(sources(name)))


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "mixtral", "gemma2", "phi3", "gpt2", "qwen2", "pythia",
                                  "falcon-h1", "nemotron-h-moe", "qwen3.5"])  # fmt: skip
def test_the_whole_original_is_loaded(opened, name):
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        found, expected = (
            m(ids, use_cache=False).logits for m in (self_generated.load_whole(opened(name), CPU), pico.model(name))
        )
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_sampled_from_the_models_own_distribution(opened):
    model = self_generated.load_whole(opened("llama"), CPU)
    texts = self_generated.write(model, 400, 2, first=1, seed=0)
    assert texts.shape == (400, 2) and torch.equal(texts, self_generated.write(model, 400, 2, first=1, seed=0))
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
        follow = model(torch.cat([torch.ones(400, 1, dtype=torch.long), texts[:, :1]], 1)).logits[:, -1].softmax(-1)
    drawn = torch.bincount(texts[:, 0], minlength=len(expected)) / 400
    assert float((drawn - expected).abs().max()) < 0.12  # five standard errors
    # a sample of p has an expected probability of sum p^2; a sample for another prefix would have less
    assert float(follow.gather(1, texts[:, 1:]).mean()) == pytest.approx(
        float(follow.square().sum(-1).mean()), rel=0.15
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "opt", "gpt-oss", "qwen2", "pythia", "cohere2",
                                  "qwen3-next", "lfm2", "falcon-h1", "nemotron-h", "jamba", "bamba", "granite4-moe"])  # fmt: skip
def test_decoding_steps_equal_a_forward_pass(opened, name, monkeypatch):
    monkeypatch.setattr(self_generated, "CACHE_UNIT", 8)  # so that the cache grows during decoding
    model = self_generated.load_whole(opened(name), CPU)
    length = getattr(model.config, "sliding_window", None) or 12
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))
    decoder = self_generated.Decoder(model, 2, length)
    with torch.no_grad():
        for _ in range(2):  # the second time, the cache holds another text
            decoder.restart()
            found = torch.stack([decoder(ids[:, [step]]).clone() for step in range(length)], 1)
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("refused", [False, True])
def test_captured_decoding_equals_a_forward_pass(opened, monkeypatch, refused):
    """The graphs are fakes that run their call eagerly; one for each length of the cache, in the memory of the first."""
    pools = []

    class Captured:
        def __init__(self, run, pool=None):
            if refused:
                raise CaptureError("operation not permitted when stream is capturing")
            self.run = run
            pools.append(pool)

        def __call__(self):
            return self.run()

        def pool(self):
            return "memory"

    monkeypatch.setattr(self_generated, "CapturedCall", Captured)
    monkeypatch.setattr(self_generated, "CACHE_UNIT", 8)
    model = self_generated.load_whole(opened("llama"), CPU)
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    decoder = self_generated.Decoder(model, 2, 20)
    decoder.capturable = True
    with torch.no_grad():
        for _ in range(2):
            decoder.restart()
            logits = torch.stack([decoder(ids[:, [step]]).clone() for step in range(20)], 1)
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))
    assert pools == ([] if refused else [None, "memory", "memory"]) and decoder.capturable != refused


def test_texts_longer_than_a_window_are_made_of_several(opened):
    model = self_generated.load_whole(opened("gemma2"), CPU)
    window = model.config.sliding_window
    texts = self_generated.write(model, 3, 2 * window + 1, first=1, seed=0)
    assert texts.shape == (3, 2 * window + 1)
    short = self_generated.write(model, 9, -(-(2 * window + 1) // 3), first=1, seed=0)
    assert torch.equal(texts, short.view(3, -1)[:, : 2 * window + 1])


def test_pairs_of_windows_are_spread_evenly():
    assert self_generated.arrangement(4, 4).tolist() == [False, False, True, True] * 2
    assert self_generated.arrangement(2, 7).sum() == 7 and not self_generated.arrangement(3, 0).any()
    places = self_generated.arrangement(280, 120)
    assert torch.equal(places[::2], places[1::2]) and all(10 <= part.sum() <= 14 for part in places.split(40))


def test_texts_that_are_too_short_are_filled_up():
    unset, half = ConvertConfig(source="x"), ConvertConfig(source="x", calib_self_generated=0.5)
    assert self_generated.generated_windows(unset, 50, 100, 0.5) == 50
    assert self_generated.generated_windows(unset, 30, 100, 0.5) == 70
    assert self_generated.generated_windows(half, 30, 100, 0.5) == 30  # the fraction was set
    assert self_generated.generated_windows(unset, 30, 100, 0.0) == 0
    everything = ConvertConfig(source="x", calib_self_generated=1)
    assert self_generated.generated_windows(everything, 1, 100, 1.0) == 99


def test_windows_keep_their_first_token_and_their_length(opened, sources, monkeypatch):
    monkeypatch.setattr(self_generated, "TEXT_TOKENS", 10)  # several texts a window
    source = opened("llama")
    windows = torch.full((8, 24), 7)
    found = self_generated.mixed(windows, 4, source, source.tokenizer(), alone(CPU), seed=0)
    places = self_generated.arrangement(8, 4)
    assert found.shape == (12, 24) and (found[~places] == 7).all() and not (found[places] == 7).all()
    assert self_generated.mixed(windows, 0, source, source.tokenizer(), alone(CPU), seed=0) is windows


def test_default(opened):
    assert self_generated.generated_fraction(ConvertConfig(source="x"), opened("llama"), CPU) == 0
    assert (
        self_generated.generated_fraction(ConvertConfig(source="x", calib_self_generated=0.25), opened("llama"), CPU)
        == 0.25
    )


def test_conversion(convert_folder, sources):
    first, second = (convert_folder(sources("llama"), calib_self_generated=0.5, kv_ratio=0.5) for _ in range(2))
    assert first.calibration["self_written"] == 0.5 and first.checksums == second.checksums
    assert first.checksums != convert_folder(sources("llama"), calib_self_generated=0, kv_ratio=0.5).checksums


def test_reports_name_the_self_generated_fraction():
    words = "t.txt, 8 windows of 64 tokens"
    section = CalibrationSection(protocol=words, self_written=0.5)
    assert calibration_text(section) == f"{words}, 50% of them written by the original itself"
    assert calibration_text(CalibrationSection(protocol=words, self_written=0.0)) == words
    assert calibration_text(CalibrationSection(protocol=words)) == words


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_grouped_attention_refuses_soft_caps_and_sinks(given):
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 3, 4)
    with pytest.raises(TypeError, match="neither soft caps nor sinks"):
        sdpa_grouped_query(None, query, key, key, None, 0.5, **given)

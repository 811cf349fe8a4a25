"""A model that runs one layer at a time computes the same as the whole model."""

from functools import partial

import pico
import pytest
import torch
from pico import VARIANTS, VOCAB, model

from mla_convert.method.calibrate import streamed_head
from mla_convert.method.calibrate.exchange import exchange_of
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layer_inputs import beside_windows
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.calibrate.streamed_head import StreamedHead
from mla_convert.modeling import distillation
from mla_convert.pipeline import streamed
from mla_convert.source.source import open_source


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_streamed_losses_equal_the_whole_models(sources, name, monkeypatch):
    # slices that divide neither the vocabulary nor the window
    monkeypatch.setattr(streamed_head, "LOGIT_ROWS", 100)
    monkeypatch.setattr(streamed_head, "LOGIT_TOKENS", 13)
    windows = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(2))
    layerwise = LayerwiseModel(open_source(str(sources(name))), torch.device("cpu"))
    beside = beside_windows(layerwise, windows)
    states = Activations(layerwise.embed(windows), torch.device("cpu"), torch.float32, beside=beside)
    kwargs = layerwise.layer_kwargs(40)
    for index in range(len(layerwise.layers)):
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
            exchange = exchange_of(layerwise, index)
            states.look(exchange.layout)
            states.advance_and_keep(partial(exchange.run_and_keep, layer, kwargs[index]))
    losses = streamed.scores(layerwise, windows, states.data).losses
    torch.testing.assert_close(losses, pico.losses(model(name), windows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_divergence_is_that_of_next_tokens(sources, name, monkeypatch):
    """From the output of the last layer, whatever a family has behind it: norm, biases, scales, soft caps."""
    monkeypatch.setattr(distillation, "CHUNK", 7 * VOCAB)
    layerwise = LayerwiseModel(open_source(str(sources(name))), torch.device("cpu"))
    draw = torch.Generator().manual_seed(3)
    expected = torch.randn(2, 9, layerwise.source.config.hidden_size * layerwise.streams, generator=draw)
    found = (expected + 0.3 * torch.randn(expected.shape, generator=draw)).requires_grad_(True)
    head = StreamedHead(layerwise)
    with torch.no_grad():
        for start in head.slices():
            assert start == 0  # one slice holds the whole vocabulary
            ours, theirs = (head.logits(each.flatten(0, 1)[None]).log_softmax(-1) for each in (found, expected))
    with head.divergence() as distance:
        value = distance(found, expected)
        assert float(distance(expected, expected)) == pytest.approx(0, abs=1e-6)
    value.backward()
    assert float(value.detach()) == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    with torch.no_grad(), head.divergence() as distance:
        # so long that the difference is far above the rounding of Cohere's small logits
        step = 5e-2 * found.grad / found.grad.norm()
        gained = float(distance(found + step, expected) - distance(found - step, expected))
    assert gained == pytest.approx(0.1 * float(found.grad.norm()), rel=0.05)
    assert all(parameter.is_meta for parameter in layerwise.model.parameters())


def test_nothing_stays_in_memory(sources):
    layerwise = LayerwiseModel(open_source(str(sources("llama"))), torch.device("cpu"))
    with layerwise.layer(1, layerwise.layer_tensors(1)) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in layerwise.layers[0].parameters())
    layerwise.embed(torch.zeros(1, 4, dtype=torch.int64))
    assert all(parameter.is_meta for parameter in layerwise.model.parameters())

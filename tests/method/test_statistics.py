"""Calibration statistics against direct computations on a pico layer."""

import pico
import pytest
import torch

from mla_convert.core.settings import Settings
from mla_convert.method.calibrate.attention_forward import attention_kwargs
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.calibrate.statistics import diagonal_sums, layer_statistics, second_moment
from mla_convert.method.factorise.layer import build_attention, mla_config
from mla_convert.method.factorise.sizes import make_plan
from mla_convert.source.source import open_source

WINDOWS, LENGTH = 5, 20
LAYER = 1


@pytest.fixture(scope="module", params=["llama3-rope", "mistral-window", "qwen2"])
def measured(request, sources):
    """Statistics of one layer, with its inputs x~ (N, T, d+1) and attention (N, H, T, T) to compute them directly."""
    layerwise = LayerwiseModel(open_source(str(sources(request.param))), torch.device("cpu"))
    ids = torch.randint(3, pico.VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    model = pico.model(request.param)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
        hidden = output.hidden_states[LAYER]
        rows = model.model.layers[LAYER].input_layernorm(hidden)
    states = Activations(hidden, layerwise.device, torch.float32)
    kwargs = attention_kwargs(layerwise, LENGTH)[LAYER]
    with layerwise.layer(LAYER, layerwise.layer_tensors(LAYER)) as layer:
        statistics = layer_statistics(layerwise, layer, states, kwargs)
    x = torch.cat([rows, torch.ones(WINDOWS, LENGTH, 1)], -1).double()
    return statistics, x, output.attentions[LAYER].double()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_second_moment(measured):
    statistics, x, _ = measured
    close(statistics.second_moment, torch.einsum("nti,ntj->ij", x, x) / (WINDOWS * LENGTH))
    assert statistics.second_moment[-1, -1] == pytest.approx(1)


def test_distance(measured):
    statistics, _, attention = measured
    expected = torch.zeros(attention.shape[1], LENGTH, dtype=torch.float64)
    for query in range(LENGTH):
        for key in range(1, query + 1):  # not the first key
            expected[:, query - key] += attention[:, :, query, key].sum(0)
    close(statistics.distance, expected / expected.sum(1, keepdim=True))


def test_key_moment(measured):
    statistics, x, attention = measured
    close(statistics.key_moment, torch.einsum("nt,nti,ntj->ij", attention.square().sum((1, 2)), x, x))


def test_statistics_are_positive_and_finite(measured):
    statistics, *_ = measured
    for moment in (statistics.second_moment, statistics.key_moment):
        assert moment.dtype == torch.float64 and torch.isfinite(moment).all()
        assert torch.linalg.eigvalsh(moment).min() > -1e-6 * moment.trace()
    assert (statistics.distance >= 0).all()


@pytest.mark.parametrize("name", ["qwen3-bias-window", "olmo2", "stablelm-12b", "cohere-norm"])
def test_moments_behind_norms(sources, name):
    """With norms on queries and keys the moments are those of [normed key; value] and of each head's normed query."""
    layerwise = LayerwiseModel(open_source(str(sources(name))), torch.device("cpu"))
    plan = make_plan(Settings(), layerwise.source.shape)
    hidden = torch.randn(
        WINDOWS, LENGTH, layerwise.source.shape.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    states = Activations(hidden, layerwise.device, torch.float32)
    kwargs = attention_kwargs(layerwise, LENGTH)[LAYER]
    seen = {}
    with layerwise.layer(LAYER, layerwise.layer_tensors(LAYER)) as layer:
        stock = layer.self_attn
        student = build_attention(mla_config(layerwise.source, plan, torch.float32), stock, layerwise.device)
        statistics = layer_statistics(layerwise, layer, states, kwargs, student)
        for part in ("q_norm", "k_norm", "v_proj"):
            module = getattr(stock, part, None) or getattr(stock, part.replace("norm", "layernorm"))
            module.register_forward_hook(lambda _, __, output, part=part: seen.update({part: output}))
        stock(hidden_states=layerwise.source.family.entry(layer)(hidden), **kwargs)
    for part, rows in seen.items():
        rows = rows.transpose(1, 2) if name == "stablelm-12b" and part != "v_proj" else rows
        seen[part] = rows.reshape(WINDOWS, LENGTH, -1)
    one = torch.ones(WINDOWS, LENGTH, 1)
    rows = torch.cat([seen["k_norm"], seen["v_proj"], one], -1).double()
    close(statistics.second_moment, torch.einsum("nti,ntj->ij", rows, rows) / (WINDOWS * LENGTH))
    assert statistics.key_moment.shape == statistics.second_moment.shape
    heads = torch.cat([seen["q_norm"].unflatten(-1, (6, -1)), one[:, :, None].expand(-1, -1, 6, -1)], -1).double()
    close(statistics.query_moment, torch.einsum("nthi,nthj->hij", heads, heads) / (WINDOWS * LENGTH))


@pytest.mark.parametrize("length", [1, 2, 7])
def test_diagonal_sums(length):
    weights = torch.rand(3, length, length).tril()
    expected = torch.stack([weights.diagonal(-distance, 1, 2).sum(-1) for distance in range(length)], 1)
    torch.testing.assert_close(diagonal_sums(weights), expected)


def test_moments_do_not_depend_on_batches(monkeypatch):
    states = Activations(torch.randn(WINDOWS, LENGTH, 6), torch.device("cpu"), torch.float32)
    whole = second_moment(states, torch.nn.Identity())
    monkeypatch.setattr("mla_convert.method.calibrate.hidden_states.BATCH_TOKENS", {"cpu": 2 * LENGTH})
    close(second_moment(states, torch.nn.Identity()), whole)

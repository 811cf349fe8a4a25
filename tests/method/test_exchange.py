"""Layers that attend to the keys and values of others, and that have inputs of their own, run one by one (Gemma 4)."""

from functools import partial

import pico
import pytest
import torch
from pico import VOCAB, model

from mla_convert.method.calibrate.beside import Beside, Layout, Part
from mla_convert.method.calibrate.exchange import exchange_of, layout_of
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layer_inputs import beside_windows
from mla_convert.method.calibrate.layerwise import LayerwiseModel, fold, unfold
from mla_convert.method.factorise.sensitivity import _backward
from mla_convert.source.source import open_source

CPU, NAME = torch.device("cpu"), "gemma4-shared"


@pytest.fixture
def layerwise(sources):
    return LayerwiseModel(open_source(str(sources(NAME))), CPU)


@pytest.mark.parametrize("name", [NAME, "gemma3n"])
def test_gradients_of_shared_keys_reach_the_layers_before_them(sources, name):
    layerwise = LayerwiseModel(open_source(str(sources(name))), CPU)
    windows = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(4))
    states = Activations(layerwise.embed(windows), CPU, torch.float32, beside=beside_windows(layerwise, windows))
    kwargs, inputs, shared = layerwise.layer_kwargs(40), [], {}
    for index, own in enumerate(kwargs):
        inputs.append(states.data.clone())
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
            exchange = exchange_of(layerwise, index)
            states.look(exchange.layout)
            states.advance_and_keep(partial(exchange.run_and_keep, layer, own))
    behind = torch.randn(states.data.shape, generator=torch.Generator().manual_seed(5))
    gradient = behind.clone()
    for index in reversed(range(len(kwargs))):
        states.data.copy_(inputs[index])
        with layerwise.layer(index, layerwise.layer_tensors(index)) as layer:
            exchange = exchange_of(layerwise, index)
            states.look(exchange.layout)
            _backward(layerwise, layer, True, states, gradient, kwargs[index], exchange, shared)
    whole, seen = model(name), {}

    def first(_module, args, kwargs):
        seen["before"] = args[0].detach().requires_grad_(True)
        return (seen["before"], *args[1:]), kwargs

    whole.model.layers[0].register_forward_pre_hook(first, with_kwargs=True)
    whole.model.layers[-1].register_forward_hook(lambda _module, _args, output: seen.update(behind=output))
    whole(windows, use_cache=False)
    seen["behind"].backward(unfold(behind, layerwise.streams))
    torch.testing.assert_close(gradient, fold(seen["before"].grad, layerwise.streams), rtol=1e-4, atol=1e-4)


def test_layers_that_run_together_read_of_earlier_ones_only(layerwise):
    def keys_of(group):
        parts = layout_of(layerwise, group, lambda layer: (8, 4)).parts
        return [part.key for part in parts if part.key[0] != "input"]

    # the first layer is read by the third, the second by the fourth and the fifth
    assert keys_of([2]) == [("keys", 0), ("latent", 0)] and keys_of([0]) == keys_of([1]) == []
    assert keys_of([2, 3]) == [("keys", 0), ("keys", 1), ("latent", 0), ("latent", 1)]
    assert keys_of([1, 2, 3]) == [("keys", 0), ("latent", 0)] and keys_of([0, 1, 2, 3, 4]) == []
    assert [len(exchange_of(layerwise, layer).hands_over) for layer in range(5)] == [1, 1, 0, 0, 0]


def test_columns_are_taken_apart_as_they_were_joined():
    parts = Part(("input", 1), (3,)), Part(("keys", 0), (4, 4), heads=2), Part(("latent", 0), (5, 2))
    layout, beside = Layout(6, parts), Beside(CPU, torch.tensor([[0, 1], [1, 1]]), torch.randn(2, 3, 3))
    tensors = {part.key: tuple(torch.randn(2, part.heads, 2, width) for width in part.widths) for part in parts[1:]}
    beside.layout = layout
    for part in parts[1:]:
        beside.put(slice(0, 2), {part.key: part.join(tensors[part.key])}, 2, torch.float32)
    states = Activations(torch.randn(2, 2, 6), CPU, torch.float32, beside=beside)
    hidden, found = layout.take(states.get(slice(0, 2)))
    assert torch.equal(hidden, states.data) and found.keys() == {part.key for part in parts}
    assert torch.equal(found["input", 1][0][:, 0], beside.inputs[beside.tokens, 1])
    assert all(torch.equal(a, b) for key in tensors for a, b in zip(found[key], tensors[key], strict=True))
    # a copy that goes on by itself leaves the first as it was; the source's states have no latents
    copied = states.clone()
    del copied.beside.kept["latent", 0]
    assert layout.take(copied.get(slice(0, 1)))[1].keys() == {("input", 1), ("keys", 0)}
    assert states.get(slice(0, 1)).shape[-1] == 6 + 3 + 16 + 7 and states.plain().get(slice(0, 1)).shape[-1] == 6


def test_inputs_of_few_tokens_are_those_of_the_whole_table(layerwise):
    windows = torch.tensor([[9, 3, 9, 200]])
    beside, whole = beside_windows(layerwise, windows), pico.model(NAME)
    with torch.no_grad():
        decoder = whole.model
        embedded = decoder.embed_tokens(windows)
        expected = decoder.project_per_layer_inputs(embedded, decoder.get_per_layer_inputs(windows, embedded))
    assert len(beside.inputs) == 3  # of distinct tokens
    torch.testing.assert_close(beside.inputs[beside.tokens], expected)

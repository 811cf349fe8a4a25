"""Losses by layer: the streamed gradient against autograd through the whole model, and what the sizes do with them."""

import pico
import pytest
import torch

from mla_convert.core.settings import Settings
from mla_convert.method.calibrate import streamed_head
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.calibrate.streamed_head import StreamedHead
from mla_convert.method.factorise import sensitivity
from mla_convert.method.factorise.sizes import make_plan
from mla_convert.source.source import open_source
from mla_convert.write.writer import Writer

WINDOWS, LENGTH = 3, 24


@pytest.fixture(params=["llama3-rope", "mistral-window", "qwen2"])
def layerwise(request, sources, monkeypatch):
    # slices that divide neither the vocabulary nor the window
    monkeypatch.setattr(streamed_head, "LOGIT_ROWS", 100)
    monkeypatch.setattr(streamed_head, "LOGIT_TOKENS", 13)
    monkeypatch.setattr(sensitivity, "MASSIVE", torch.inf)
    layerwise = LayerwiseModel(open_source(str(sources(request.param))), torch.device("cpu"))
    layerwise.whole = pico.model(request.param)
    return layerwise


def embedded(layerwise, ids):
    return Activations(layerwise.embed(ids), layerwise.device, torch.float32)


def tokens(seed=0):
    return torch.randint(3, pico.VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def whole_gradients(model, ids, drawn):
    """Gradients of the drawn tokens' losses at each attention's output (layers, N, L, d), and at each layer's."""
    kept, outputs = [], []

    def keep(_module, _args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.retain_grad()
        kept.append(tensor)

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
    hooks += [
        reader.register_forward_pre_hook(lambda _m, args: (args[0].retain_grad(), outputs.append(args[0]))[0])
        for reader in (*model.model.layers[1:], model.model.norm)
    ]
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return [tensor.grad for tensor in kept], [tensor.grad for tensor in outputs]


def test_gradient_of_drawn_tokens(layerwise):
    ids = tokens()
    with torch.no_grad():
        out = layerwise.whole.model(ids, use_cache=False)
        last = {}
        hook = layerwise.whole.model.norm.register_forward_pre_hook(
            lambda _m, args: last.update(states=args[0].clone())
        )
        layerwise.whole.model(ids, use_cache=False)
        hook.remove()
        logits = layerwise.whole.lm_head(out.last_hidden_state)
    gradient = StreamedHead(layerwise).output_gradient(last["states"], torch.Generator().manual_seed(1))
    # which tokens were drawn follows from the gradient at the logits: the same noise, drawn again
    drawn = drawn_tokens(layerwise, last["states"], 1)
    expected = whole_gradients(layerwise.whole, ids, drawn)[1][-1]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    # drawn, not the most likely ones: the mean loss is near the entropy
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten())
    assert abs(float(loss - entropy)) < 1.0


def drawn_tokens(layerwise, states, seed):
    """What output_gradient draws: the same passes over the same slices, with the noise added to whole logits."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.full(states.shape[:2], -torch.inf)
    drawn = torch.zeros(states.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        logits = layerwise.whole.lm_head(layerwise.whole.model.norm(states))
    for start in range(0, pico.VOCAB, streamed_head.LOGIT_ROWS):
        for window in range(states.shape[0]):
            for first in range(0, states.shape[1], streamed_head.LOGIT_TOKENS):
                part = logits[
                    window, first : first + streamed_head.LOGIT_TOKENS, start : start + streamed_head.LOGIT_ROWS
                ]
                noise = torch.empty_like(part).exponential_(generator=generator).log_().neg_()
                value, index = (part + noise).max(-1)
                where = (window, slice(first, first + streamed_head.LOGIT_TOKENS))
                drawn[where] = torch.where(value > best[where], index + start, drawn[where])
                best[where] = torch.maximum(best[where], value)
    return drawn


def test_metric_is_that_of_the_whole_model(layerwise, tmp_path, monkeypatch):
    found = []
    real = sensitivity._backward
    monkeypatch.setattr(sensitivity, "_backward", lambda *args: found.append(real(*args)) or found[-1])
    monkeypatch.setattr(sensitivity, "_losses", lambda *_: None)
    ids, plan = tokens(), make_plan(Settings(kv_ratio=0.5), layerwise.source.shape)
    with Writer(tmp_path / "out", {}) as writer:
        measured = sensitivity.sensitivities(layerwise, embedded(layerwise, ids), plan, 1, writer)
        assert not list(writer.folder.glob("*.tmp"))
    last = {}
    hook = layerwise.whole.model.norm.register_forward_pre_hook(
        lambda _m, args: last.update(states=args[0].detach().clone())
    )
    with torch.no_grad():
        layerwise.whole.model(ids, use_cache=False)
    hook.remove()
    gradients, behind = whole_gradients(layerwise.whole, ids, drawn_tokens(layerwise, last["states"], 1))
    for squares, gradient in zip(measured.channels, behind, strict=True):
        expected = gradient.flatten(0, 1).double().square().mean(0)
        torch.testing.assert_close(squares, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))
    for (metric, _), gradient in zip(found[::-1], gradients, strict=True):
        rows = gradient.flatten(0, 1).double()
        expected = rows.T @ rows / len(rows)
        torch.testing.assert_close(metric, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_losses_fall_and_are_small_where_little_is_left_out(layerwise, tmp_path):
    plan = make_plan(Settings(kv_ratio=0.5), layerwise.source.shape)
    with Writer(tmp_path / "out", {}) as writer:
        losses = sensitivity.sensitivities(layerwise, embedded(layerwise, tokens()), plan, 0, writer).losses
    assert len(losses) == plan.shape.layers
    for loss in losses:
        ranks, ropes = sorted(loss.rank), sorted(loss.rope)
        assert loss.rank[ranks[0]] > 2 * loss.rank[plan.full_rank] > 0
        assert loss.rope[ropes[0]] > loss.rope[ropes[-1]] >= 0
        # whole rank with the plan's rotary dims is the same thing reached from both sides
        assert loss.rank[plan.full_rank] == pytest.approx(loss.rope[plan.rope_dim], rel=0.02)

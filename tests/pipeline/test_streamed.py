"""Scores computed a slice of the vocabulary at a time are those of whole logits."""

import pico
import torch
import torch.nn.functional as F

from mla_convert.method.calibrate import streamed_head
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.calibrate.streamed_head import StreamedHead
from mla_convert.pipeline import streamed
from mla_convert.source.source import open_source

CPU = torch.device("cpu")


def test_streamed_scores_are_those_of_whole_logits(sources, monkeypatch):
    """Slices of the vocabulary and pieces of a window change nothing."""
    layerwise = LayerwiseModel(open_source(str(sources("llama"))), CPU)
    draw = torch.Generator().manual_seed(1)
    windows = torch.randint(3, pico.VOCAB, (2, 9), generator=draw)
    original = 2 * torch.randn(2, 9, layerwise.source.config.hidden_size, generator=draw)
    converted = original + 0.5 * torch.randn(original.shape, generator=draw)
    monkeypatch.setattr(streamed_head, "LOGIT_ROWS", pico.VOCAB)
    head = StreamedHead(layerwise)
    with torch.no_grad():
        for _ in head.slices():
            theirs, ours = (torch.stack([head.logits(row[None, :-1]) for row in states]).log_softmax(-1)
                            for states in (original, converted))  # fmt: skip
    for row_slice, tokens in ((pico.VOCAB, 1024), (90, 5)):
        monkeypatch.setattr(streamed_head, "LOGIT_ROWS", row_slice)
        monkeypatch.setattr(streamed, "LOGIT_TOKENS", tokens)
        found = streamed.scores(layerwise, windows, original, converted)
        for values, losses in ((ours, found.losses), (theirs, found.original)):
            torch.testing.assert_close(losses, -values.gather(-1, windows[:, 1:, None])[..., 0], rtol=1e-4, atol=1e-4)
        wanted = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(found.kl, wanted, rtol=1e-3, atol=1e-5)
        assert torch.equal(found.agreement, (ours.argmax(-1) == theirs.argmax(-1)).float())
    assert streamed.scores(layerwise, windows, original).kl is None


def test_a_token_that_is_impossible_adds_nothing(sources, monkeypatch):
    layerwise = LayerwiseModel(open_source(str(sources("llama"))), CPU)
    states = torch.randn(1, 5, layerwise.source.config.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = StreamedHead.logits

    def masked(head, hidden):
        logits = whole(head, hidden)
        logits[:, 5] = -torch.inf
        return logits

    monkeypatch.setattr(StreamedHead, "logits", masked)
    found = streamed.scores(layerwise, torch.full((1, 5), 7), states, states + 0.1)
    assert found.kl.isfinite().all() and float(found.kl.max()) > 0

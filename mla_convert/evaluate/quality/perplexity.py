"""Measurements of a model on windows of text: perplexity, distance from its original, bytes of its cache.

Perplexity is exp of the mean negative log-likelihood over non-overlapping windows. Every value comes with its standard
error over windows.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from mla_convert.core.errors import InputError
from mla_convert.core.report_schema import Comparison, EvaluationSection, Mean, NotEvaluated, Perplexity
from mla_convert.modeling.caching import with_cache
from mla_convert.modeling.head import HiddenStatesStub, decoder_name
from mla_convert.source.texts import Windows
from mla_convert.source.windows import evaluation_protocol

# Logits held at once, tokens by vocabulary: 128 MB in float32.
LOGITS = 1 << 25
# Tokens of the forward pass that fills the cache to be measured.
CACHE_TOKENS = 16
# Nats of a loss whose exponential is a number.
MOST = 700.0


def perplexity(losses: Tensor) -> Perplexity:
    """Perplexity from token losses (windows, length-1) in nats."""
    loss = mean(losses)
    return Perplexity(
        value=math.exp(min(loss.value, MOST)),
        log_error=loss.error,
        windows=losses.shape[0],
        length=losses.shape[1] + 1,
    )


def perplexity_section(windows: Windows, scores: Scores) -> EvaluationSection | NotEvaluated:
    """The evaluation in a report, from the scores of both models on `windows.measured`.

    Raises:
        InputError: a perplexity is not finite.
    """
    before, after = scores.original, scores.losses
    for model, losses, advice in (
        ("the original", before, ", so the checkpoint is damaged; fetch it again"),
        ("the converted model", after, "; try --dtype float32"),
    ):
        # Negated, so that NaN fails as well: no comparison with it holds.
        if not losses.double().mean(dim=1).max() < MOST:
            raise InputError(
                f"the perplexity of {model} is not finite: weights of its head or final norm are too large to compute with{advice}"
            )
    if not windows.evaluated:
        return NotEvaluated.section()
    count = len(windows.evaluation)
    section = EvaluationSection(
        **_comparison(windows.eval_text, windows.eval_protocol, before[:count], after[:count]).entries(),
        kl=mean(scores.kl[:count]),
        agreement=mean(scores.agreement[:count]),
    )
    if windows.held_out is not None:
        protocol = evaluation_protocol(windows.held_out)
        section.held_out = _comparison(windows.held_out_text, protocol, before[count:], after[count:])
    return section


def _comparison(text: str, protocol: str, before: Tensor, after: Tensor) -> Comparison:
    quotient = ratio(after, before)
    return Comparison(
        text=text,
        protocol=protocol,
        before=perplexity(before),
        after=perplexity(after),
        ratio=quotient.value,
        ratio_log_error=quotient.error,
    )


def ratio(losses: Tensor, original: Tensor) -> Mean:
    """Perplexity over the original's, from token losses (windows, length-1) of both on the same windows.

    `error` is the standard error of the ratio's logarithm, paired: it leaves out how hard a window is for both models.
    """
    difference = mean(losses - original)
    return Mean(value=math.exp(min(difference.value, MOST)), error=difference.error)


def mean(values: Tensor) -> Mean:
    """Mean of one value per token (windows, tokens), with its standard error over windows."""
    # Tokens of one window depend on each other, so the windows are the sample.
    means = values.double().mean(dim=1)
    spread = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Mean(value=float(means.mean()), error=spread)


class Readout:
    """The final hidden states of windows, and the model's head in float32, which turns slices of the states into logits.

    A readout holds no decoder, so the model can be freed before its original is loaded.

    Args:
        model: a causal language model.
        windows: token ids, each (L,).
        tick: called after each window with the number done and the number of windows.

    Raises:
        InputError: the model is not a decoder with a head on top.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, windows: Tensor | list[Tensor], tick: Callable[[int, int], None] | None = None
    ):
        """Run the decoder over all windows."""
        head, name = model.get_output_embeddings(), decoder_name(model)
        if head is None or not name:
            raise InputError(f"{type(model).__name__} is not a causal language model with a decoder and a head")
        self._device, self.vocabulary = head.weight.device, head.weight.shape[0]
        decoder = model.get_submodule(name)
        self._hidden = self._states(decoder, windows, tick)
        self._stub = HiddenStatesStub(decoder)
        # The stock forward with a stub for its decoder, so that logits are scaled and capped as the model does it.
        self._head = copy.copy(model)
        # With modules of its own, so that the model itself keeps its decoder.
        self._head._modules = dict(model._modules)
        setattr(self._head, name, self._stub)
        # A copy, because the head's weight may be that of the embedding, which keeps its dtype.
        if head.weight.dtype != torch.float32:
            self._head.set_output_embeddings(copy.deepcopy(head).float())

    @torch.no_grad()
    def of_other_states(
        self, model: nn.Module, windows: Tensor | list[Tensor], tick: Callable[[int, int], None] | None = None
    ) -> Readout:
        """A readout with the same head, of the states that the model's decoder makes of these windows now."""
        other = copy.copy(self)
        other._hidden = self._states(model.get_submodule(decoder_name(model)), windows, tick)
        return other

    def _states(
        self, decoder: nn.Module, windows: Tensor | list[Tensor], tick: Callable[[int, int], None] | None
    ) -> list[Tensor]:
        hidden = []
        for index, ids in enumerate(windows):
            states = decoder(input_ids=ids[None].to(self._device), use_cache=False).last_hidden_state
            # On the host, because the device has to hold the other model next.
            hidden.append(states[0, :-1].cpu())
            if tick:
                tick(index + 1, len(windows))
        return hidden

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        """Logits (stop - start, vocabulary), float32, that predict tokens start+1 to stop of a window.

        Args:
            window: index of the window.
            start: first position to predict from.
            stop: one past the last position to predict from.
        """
        self._stub.hidden = self._hidden[window][None, start:stop].to(self._device, torch.float32)
        try:
            return self._head(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits[0].float()
        finally:
            self._stub.hidden = None


@dataclass(frozen=True)
class Scores:
    """One value a token, each (N, L-1), of windows (N, L); without an original only `losses` is known.

    Attributes:
        losses: losses of the model in nats.
        original: losses of the original in nats.
        kl: KL(original ‖ model) of the next token in nats.
        agreement: 1 where the most likely next tokens of both models are equal, else 0.
    """

    losses: Tensor
    original: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None


@torch.no_grad()
def score(model: Readout, windows: Tensor, original: Readout | None = None, first: int = 0) -> Scores:
    """Losses of a model on windows, and, with an original, its losses and the distance of the two.

    Args:
        model: readout of the model.
        windows: token ids (N, L).
        original: readout of the original.
        first: index of these windows among those of the readouts.

    Raises:
        InputError: the two have vocabularies of different sizes.
    """
    count, length = windows.shape[0], windows.shape[1] - 1
    values = torch.zeros(4, count, length)
    step = max(1, LOGITS // model.vocabulary)
    if original and original.vocabulary != model.vocabulary:
        raise InputError(
            f"the model has {model.vocabulary} logits a token and the original {original.vocabulary}: "
            f"they do not share a vocabulary"
        )
    for window, start in itertools.product(range(count), range(0, length, step)):
        stop = min(start + step, length)
        part, targets = (window, slice(start, stop)), windows[window, start + 1 : stop + 1]
        logs = model.logits(first + window, start, stop).log_softmax(-1)
        values[0][part] = F.nll_loss(logs, targets.to(logs.device), reduction="none").cpu()
        if original:
            original_logs = original.logits(first + window, start, stop).log_softmax(-1)
            values[1][part] = F.nll_loss(original_logs, targets.to(original_logs.device), reduction="none").cpu()
            # PyTorch's order: with the model first and the original as the target this is KL(original ‖ model).
            values[2][part] = F.kl_div(logs, original_logs, reduction="none", log_target=True).sum(-1).cpu()
            values[3][part] = (logs.argmax(-1) == original_logs.argmax(-1)).float().cpu()
    return Scores(values[0], *values[1:]) if original else Scores(values[0])


@torch.no_grad()
def cache_bytes(model: nn.Module, ids: Tensor) -> float:
    """Bytes per token in all layers of a DynamicCache after a forward pass over the first of `ids` (L,).

    Raises:
        InputError: the model keeps no keys and values.
    """
    layers, tokens = _filled_cache(model, ids)
    # By storage, so that views of one tensor count once.
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for parts in layers for part in parts}
    if not sum(held.values()):
        raise InputError(f"{type(model).__name__} keeps no KV cache: it cannot be measured here")
    return sum(held.values()) / tokens


def cached_layers(model: nn.Module, ids: Tensor) -> int:
    """Number of layers that keep keys and values of the tokens `ids` (L,) in a DynamicCache."""
    return sum(any(part.numel() for part in parts) for parts in _filled_cache(model, ids)[0])


@torch.no_grad()
def _filled_cache(model: nn.Module, ids: Tensor) -> tuple[list[list[Tensor]], int]:
    """Keys and values of each layer after a forward pass over the first of `ids` (L,), and how many tokens these are."""
    window = getattr(model.config, "sliding_window", None) or CACHE_TOKENS + 1
    # Fewer than the smallest sliding window holds, which would drop the others.
    tokens = max(1, min(len(ids), CACHE_TOKENS, window - 1))
    cache = DynamicCache(config=model.config)
    start = ids[None, :tokens].to(model.device)
    with contextlib.suppress(TypeError):  # state-space models take no such cache
        model(input_ids=start, **with_cache(model, cache))
    parts = [[getattr(layer, "keys", None), getattr(layer, "values", None)] for layer in cache.layers]
    return [[part for part in layer if part is not None] for layer in parts], tokens

"""Figures of a model on windows of text: perplexity, distance from its original, and the bytes that its cache holds.

Perplexity is exp of the mean negative log-likelihood over non-overlapping windows. Every figure comes with its standard
error over windows.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from mla_convert.core.errors import InputError
from mla_convert.core.report_file import NOT_EVALUATED
from mla_convert.modeling.caching import with_cache
from mla_convert.modeling.head import HiddenStatesStub
from mla_convert.source.texts import Windows
from mla_convert.source.windows import evaluation_protocol

# Logits held at once, tokens by vocabulary: 128 MB in float32.
LOGITS = 1 << 25
# Tokens of the forward pass that fills the cache to be measured.
CACHE_TOKENS = 16
# Nats of a loss whose exponential is a number.
MOST = 700.0


@dataclass(frozen=True)
class Perplexity:
    """`value`, and the standard error of its logarithm over windows."""

    value: float
    log_error: float
    windows: int
    length: int

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, and its standard error over windows (NaN for a single window)."""

    value: float
    error: float


def perplexity(losses: Tensor) -> Perplexity:
    """From token losses (windows, length-1) in nats."""
    found = mean(losses)
    return Perplexity(math.exp(min(found.value, MOST)), found.error, losses.shape[0], losses.shape[1] + 1)


def perplexity_section(windows: Windows, scores: Scores) -> dict[str, Any]:
    """What a report says of its evaluation, from the scores of both models on `windows.measured`.

    Raises:
        InputError: a perplexity is not finite.
    """
    before, after = scores.original, scores.losses
    for model, losses in (("the original", before), ("the converted model", after)):
        if not losses.double().mean(dim=1).max() < MOST:
            raise InputError(
                f"the perplexity of {model} is not finite: weights of its head or final norm are too large to compute with"
                + (
                    ", so the checkpoint is damaged; fetch it again"
                    if model == "the original"
                    else "; try --dtype float32"
                )
            )
    if not windows.evaluated:
        return dict(NOT_EVALUATED)
    count = len(windows.evaluation)
    found = _compared(windows.eval_text, windows.eval_protocol, before[:count], after[:count])
    found |= {"kl": asdict(mean(scores.kl[:count])), "agreement": asdict(mean(scores.agreement[:count]))}
    if windows.held_out is not None:
        protocol = evaluation_protocol(windows.held_out)
        found["held_out"] = _compared(windows.held_out_text, protocol, before[count:], after[count:])
    return found


def _compared(text: str, protocol: str, before: Tensor, after: Tensor) -> dict[str, Any]:
    over = ratio(after, before)
    return {"text": text, "protocol": protocol, "before": perplexity(before).as_dict(), "after": perplexity(after).as_dict(),
            "ratio": over.value, "ratio_log_error": over.error}  # fmt: skip


def ratio(losses: Tensor, original: Tensor) -> Mean:
    """Perplexity over the original's, from token losses (windows, length-1) of both on the same windows.

    `error` is that of its logarithm, paired: how hard a window is for both models is no part of it.
    """
    found = mean(losses - original)
    return Mean(math.exp(min(found.value, MOST)), found.error)


def mean(values: Tensor) -> Mean:
    """Of a figure per token (windows, tokens)."""
    means = values.double().mean(dim=1)
    spread = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Mean(float(means.mean()), spread)


class Readout:
    """What a model's decoder says to windows, each (L,), and its head in float32, which turns parts of that into logits.

    Holds no decoder: once this is made, the model itself can go, and its original can be loaded in its place.

    Raises:
        InputError: not a decoder with a head on top.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, windows: Tensor | list[Tensor], tick: Callable[[int, int], None] | None = None
    ):
        decoder, head = model.base_model, model.get_output_embeddings()
        if decoder is model or head is None:
            raise InputError(f"{type(model).__name__} is not a causal language model with a decoder and a head")
        self._device, self.vocabulary = head.weight.device, head.weight.shape[0]
        self._hidden: list[Tensor] = []
        for index, ids in enumerate(windows):
            states = decoder(input_ids=ids[None].to(self._device), use_cache=False).last_hidden_state[0, :-1]
            self._hidden.append(states.cpu())
            if tick:
                tick(index + 1, len(windows))
        self._given = HiddenStatesStub()
        # The stock forward without its decoder, so that whatever it does to logits is done here too.
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)
        setattr(self._head, model.base_model_prefix, self._given)
        if head.weight.dtype != torch.float32:
            self._head.set_output_embeddings(copy.deepcopy(head).float())

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        """Logits (stop - start, vocabulary), float32, that predict tokens start+1 to stop of a window."""
        self._given.hidden = self._hidden[window][None, start:stop].to(self._device, torch.float32)
        try:
            return self._head(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits[0].float()
        finally:
            self._given.hidden = None


@dataclass(frozen=True)
class Scores:
    """One figure a token, each (N, L-1). `kl` is KL(original || model) in nats, `agreement` is 1 where both argmax agree."""

    losses: Tensor
    original: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None


@torch.no_grad()
def score(model: Readout, windows: Tensor, original: Readout | None = None, first: int = 0) -> Scores:
    """Losses of a model on windows (N, L), and, with an original, its losses and how far the two are from each other.

    `first` is where these windows begin among those that were read.

    Raises:
        InputError: the two have vocabularies of different sizes.
    """
    count, length = windows.shape[0], windows.shape[1] - 1
    found = torch.zeros(4, count, length)
    step = max(1, LOGITS // model.vocabulary)
    if original and original.vocabulary != model.vocabulary:
        raise InputError(
            f"the model has {model.vocabulary} logits a token and the original {original.vocabulary}: "
            f"they do not share a vocabulary"
        )
    for window, start in itertools.product(range(count), range(0, length, step)):
        stop = min(start + step, length)
        part, targets = (window, slice(start, stop)), windows[window, start + 1 : stop + 1]
        ours = model.logits(first + window, start, stop).log_softmax(-1)
        found[0][part] = F.nll_loss(ours, targets.to(ours.device), reduction="none").cpu()
        if original:
            theirs = original.logits(first + window, start, stop).log_softmax(-1)
            found[1][part] = F.nll_loss(theirs, targets.to(theirs.device), reduction="none").cpu()
            found[2][part] = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).cpu()
            found[3][part] = (ours.argmax(-1) == theirs.argmax(-1)).float().cpu()
    return Scores(found[0], *found[1:]) if original else Scores(found[0])


@torch.no_grad()
def cache_bytes(model: nn.Module, ids: Tensor) -> float:
    """Bytes a token that a DynamicCache really holds after a forward pass over some of `ids` (L,), all layers together.

    Few enough tokens are used for every sliding window to hold them all.

    Raises:
        InputError: the model keeps no keys and values.
    """
    window = getattr(model.config, "sliding_window", None) or CACHE_TOKENS + 1
    tokens = max(1, min(len(ids), CACHE_TOKENS, window - 1))
    cache = DynamicCache(config=model.config)
    held, start = {}, ids[None, :tokens].to(model.device)
    with contextlib.suppress(TypeError):  # state-space models take no such cache
        model(input_ids=start, **with_cache(model, cache))
    for layer in cache.layers:
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if part is not None:
                held[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    if not sum(held.values()):
        raise InputError(f"{type(model).__name__} keeps no KV cache: it cannot be measured here")
    return sum(held.values()) / tokens

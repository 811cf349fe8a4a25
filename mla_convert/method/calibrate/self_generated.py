"""Calibration text that the original writes itself: of every kind that it was trained on, where a user's text is of one.

Sampling from the model to calibrate or distil it is known from quantisation (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, StaticLayer

from mla_convert.core.settings import ConvertConfig
from mla_convert.method.calibrate.openings import SPARE, Openings, varied
from mla_convert.modeling.attention_backends import GROUPED, attending
from mla_convert.modeling.caching import with_cache
from mla_convert.source.shape import original_cache_bytes
from mla_convert.source.source import Source
from mla_convert.source.tokens import first_tokens
from mla_convert.write.writer import stored_bytes

# Share of the windows where none is asked for, on a GPU of which the whole original takes no more than MEMORY_SHARE.
SHARE, MEMORY_SHARE = 0.5, 1 / 8
# Whether texts begin in many ways (openings.py) or all as documents do.
OPENED = True
# Tokens of one text; a longer window holds several.
TEXT_TOKENS = 512
# What the caches of texts that are written at once may take: of a GPU's memory its share, if that is more. Not of what is free:
# how many are written at once decides what is drawn, which is to be the same every time.
CACHE_BYTES, CACHE_SHARE = 4 << 30, 1 / 8
# A cache grows by so many tokens: attention copies masks that are not aligned, and a CUDA graph is for one length.
CACHE_UNIT = 64
# What begins a document in the training data of many models whose tokenizers put nothing before a text.
DOCUMENT = "<|endoftext|>"


def share(config: ConvertConfig, source: Source, device: torch.device) -> float:
    """Share of the calibration windows that the original writes."""
    if config.calib_self_generated is not None:
        return config.calib_self_generated
    if device.type != "cuda":
        return 0.0
    room = torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE
    return SHARE if stored_bytes(source.reader, torch.bfloat16.itemsize) <= room else 0.0


def chosen(windows: int, share: float) -> Tensor:
    """Which windows (N,) are replaced: whole pairs of neighbours, one of which is noised and one is not, spread evenly."""
    pair = torch.arange(windows) // 2
    return ((pair + 1) * share).floor() > (pair * share).floor()


def mixed(windows: Tensor, share: float, source: Source, tokenizer: Any, device: torch.device, seed: int) -> Tensor:
    """Calibration windows (N, L) with `share` of them written by the original.

    The whole original is on the device while it writes. First tokens are the tokenizer's own, if it adds one.
    """
    replaced = chosen(len(windows), share)
    count = int(replaced.sum())
    if not count:
        return windows
    prefix = first_tokens(tokenizer)
    body = windows.shape[1] - len(prefix)
    pieces = -(-body // TEXT_TOKENS)
    model = load_whole(source, device)
    first = first_token(tokenizer, model.config.vocab_size)
    wanted, opened = count * pieces, Openings(tokenizer, first, seed) if OPENED else None
    spare = int(wanted * SPARE) if opened else 0
    written = varied(write(model, wanted + spare, -(-body // pieces), first, seed, openings=opened), wanted)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    body_ids = written.view(count, -1)[:, :body]
    texts = torch.cat([torch.tensor(prefix, dtype=body_ids.dtype).expand(count, -1), body_ids], dim=1)
    found = windows.clone()
    found[replaced] = texts
    return found


def first_token(tokenizer: Any, vocabulary: int | None = None) -> int:
    """What the model continues: what its tokenizer puts before a text, or what separates documents.

    `vocabulary`: rows of the model's embedding, which may be fewer than the tokenizer's tokens.
    """
    prefix = first_tokens(tokenizer)
    document = tokenizer.get_vocab().get(DOCUMENT)
    known = (*prefix, document, tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None and (vocabulary is None or token < vocabulary))


def load_whole(source: Source, device: torch.device) -> nn.Module:
    """The original with all of its weights on the device: bfloat16 on CUDA, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    if source.family.softcap or source.family.sinks:
        model.set_attn_implementation("eager")  # SDPA knows neither
    stored, wanted = set(source.reader.names()), [name for name, _ in model.named_parameters()]
    for name in wanted:
        if name in stored:
            (tensor,) = source.reader.read([name]).values()
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    model.tie_weights()
    return model.to(device).eval()


@dataclass
class _Place:
    """Where the next token goes: `position` (1,) says so on the device, `written` here."""

    position: Tensor
    written: int = 0

    @property
    def seen(self) -> int:
        """Tokens that attention looks at, that one included."""
        return (self.written // CACHE_UNIT + 1) * CACHE_UNIT


class _Layer(StaticLayer):
    """A cache layer of fixed size, written at a position that lies in device memory: a CUDA graph can be replayed on it."""

    def __init__(self, place: _Place, room: int):
        super().__init__(room)
        self.place = place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token, and give all that are looked at; which of them are not written yet is for the mask to hide."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.place.position, key_states)
        self.values.index_copy_(2, self.place.position, value_states)
        return self.keys[:, :, : self.place.seen], self.values[:, :, : self.place.seen]

    def get_seq_length(self) -> int:
        """Tokens that are looked at: where the next one goes, only the device knows."""
        return self.place.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for the mask."""
        return self.place.seen, 0


class _Writer:
    """The next token's logits, token by token; on CUDA a step is one CUDA graph, for launches are what it waits for.

    Attention looks at what is written, rounded up to CACHE_UNIT: there is a graph for every such length.
    """

    def __init__(self, model: nn.Module, texts: int, length: int):
        self.model, self.device = model, model.device
        room = -(-length // CACHE_UNIT) * CACHE_UNIT
        self.ids = torch.zeros(texts, 1, dtype=torch.int64, device=self.device)
        self.place = _Place(torch.zeros(1, dtype=torch.int64, device=self.device))
        self.hidden = torch.finfo(model.dtype).min
        self.mask = torch.empty(texts, 1, 1, room, dtype=model.dtype, device=self.device)
        self.cache = Cache(layers=[_Layer(self.place, room) for _ in range(model.config.num_hidden_layers)])
        self.capturable = self.device.type == "cuda"
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _run(self) -> Tensor:
        self.mask.index_fill_(3, self.place.position, 0)
        with attending(GROUPED, self.model):
            output = self.model(
                input_ids=self.ids, attention_mask=self.mask[..., : self.place.seen],
                position_ids=self.place.position.expand(len(self.ids), 1), **with_cache(self.model, self.cache),
            )  # fmt: skip
        return output.logits[:, -1]

    def restart(self) -> None:
        """New texts: nothing of the old ones is seen."""
        self.place.written = 0
        self.place.position.zero_()
        self.mask.fill_(self.hidden)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (N, vocabulary) behind the tokens `ids` (N, 1), valid until the next call."""
        self.ids.copy_(ids)
        if self.place.seen in self.graphs:
            graph, logits = self.graphs[self.place.seen]
            graph.replay()
        else:
            logits = self._run()
            if self.capturable:
                self._capture()
        self.place.position.add_(1)
        self.place.written += 1
        return logits

    def _capture(self) -> None:
        """Record the step that has just run, for those that follow. The graphs never run at once, and share memory.

        A model that looks at its numbers on the way (experts, RoPE scaled by length) cannot be recorded, and runs step by step.
        """
        graph, first = torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
        try:
            with torch.cuda.graph(graph, pool=first and first[0].pool()):
                logits = self._run()
        except RuntimeError:
            torch.cuda.synchronize()
            self.capturable = False
            return
        self.graphs[self.place.seen] = graph, logits


def rounds(model: nn.Module, count: int, length: int) -> int:
    """How often `write` begins anew: as many texts are written at once as there is room for their caches."""
    config = model.config.get_text_config()
    text_bytes = original_cache_bytes(config, model.dtype.itemsize) * length
    room = CACHE_BYTES
    if model.device.type == "cuda":
        room = max(room, int(torch.cuda.get_device_properties(model.device).total_memory * CACHE_SHARE))
    return min(count, -(-count * text_bytes // room))


@torch.no_grad()
def write(
    model: nn.Module,
    count: int,
    length: int,
    first: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
    openings: Openings | None = None,
) -> Tensor:
    """Texts (count, length), on the CPU, sampled token by token from the model's own distribution after `first`.

    `openings` are what the texts begin with behind `first`, and how freely they are written; without, at temperature 1.
    The end of a document does not end a text: the model goes on with another. A text longer than the narrowest attention
    window is made of several, so that one mask serves all layers. `advance` is told how many tokens are written.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    config = model.config.get_text_config()
    parts = -(-length // (getattr(config, "sliding_window", None) or length))
    if parts > 1:
        shorter = write(model, count * parts, -(-length // parts), first, seed, advance, openings)
        return shorter.view(count, -1)[:, :length]
    times = rounds(model, count, length)
    batch = -(-count // times)
    writer, texts = _Writer(model, batch, length), []
    scripts = openings.scripts(count, batch, length) if openings else []
    for number in range(times):
        writer.restart()
        script = scripts[number].to(model.device) if scripts else None
        ids, written = torch.full_like(writer.ids, first), []
        for step in range(length):
            probabilities = writer(ids).float().softmax(-1)
            if script:
                probabilities = script.likely(probabilities)
            ids = torch.multinomial(probabilities, 1, generator=generator)
            if script:
                ids = script.direct(step, ids)
            written.append(ids)
            advance((number * length + step + 1) * len(ids))
        texts.append(torch.cat(written, dim=1).cpu())
    return torch.cat(texts)[:count]

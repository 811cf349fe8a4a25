"""Self-generated text: samples from the source model cover its training distribution better than one user's corpus.

Data-free calibration and distillation by the model's own samples is known from quantisation (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticLayer

from mla_convert.core.cuda_graph import CapturedCall
from mla_convert.core.processes import Processes, alone
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.calibrate.openings import SPARE, Openings, varied
from mla_convert.modeling.attention_backends import GROUPED, attention_backend
from mla_convert.modeling.caching import with_cache
from mla_convert.source.checkpoint.reader import take_weights
from mla_convert.source.shape import converted_layers, original_cache_bytes
from mla_convert.source.source import Source
from mla_convert.source.tokens import first_tokens
from mla_convert.write.writer import stored_bytes

# Default fraction of the windows, on a GPU of whose memory the whole source takes no more than MEMORY_FRACTION.
DEFAULT_FRACTION, MEMORY_FRACTION = 0.5, 1 / 8
# Whether texts begin in many ways (openings.py) or all as documents do.
OPENED = True
# Tokens of one text; a longer window holds several.
TEXT_TOKENS = 512
# Memory of the caches of texts that are generated at once: CACHE_BYTES, or CACHE_FRACTION of a GPU's memory if that is more.
# Sized from total, not free, memory: the batch size affects sampling, and the output must be reproducible.
CACHE_BYTES, CACHE_FRACTION = 4 << 30, 1 / 8
# Tokens by which a cache grows: attention copies masks that are not aligned, and a CUDA graph is for one length.
CACHE_UNIT = 64
# Separates documents in the training data of many models whose tokenizers put nothing before a text.
DOCUMENT = "<|endoftext|>"


def generated_fraction(config: ConvertConfig, source: Source, device: torch.device) -> float:
    """Fraction of the calibration windows that are self-generated."""
    if config.calib_self_generated is not None:
        return config.calib_self_generated
    if device.type != "cuda":
        return 0.0
    memory = torch.cuda.get_device_properties(device).total_memory * MEMORY_FRACTION
    return DEFAULT_FRACTION if stored_bytes(source.reader, torch.bfloat16.itemsize) <= memory else 0.0


def generated_windows(config: ConvertConfig, given: int, samples: int, fraction: float) -> int:
    """Self-generated windows beside `given` windows of the calibration texts.

    Where texts have fewer windows than wanted, the original generates the rest, unless the fraction was set.

    Args:
        config: the settings as given.
        given: windows of the calibration texts.
        samples: windows wanted in all.
        fraction: of the windows that are self-generated.
    """
    if not fraction:
        return 0
    if config.calib_self_generated is None or fraction == 1:
        return max(0, samples - given)
    return round(given * fraction / (1 - fraction))


def arrangement(given: int, generated: int) -> Tensor:
    """Which of the windows are self-generated, bool (given + generated,).

    Pairs of neighbours, of which one gets noise and one does not, at even distances.
    """
    pairs = [(torch.arange(count) // 2 + 0.5) / max(1, -(-count // 2)) for count in (given, generated)]
    return torch.cat(pairs).argsort(stable=True) >= given


def mixed(windows: Tensor, generated: int, source: Source, tokenizer: Any, processes: Processes, seed: int) -> Tensor:
    """Put self-generated windows between those of the calibration texts, the same in every process.

    The whole source is on the device while it generates.

    Args:
        windows: token ids (N, L).
        generated: self-generated windows.
        source: the model.
        tokenizer: of the source; a window begins with its prefix, if it has one.
        processes: that share out the rounds of texts.
        seed: of the samples.

    Returns:
        Token ids (N + generated, L).
    """
    if not generated:
        return windows
    prefix = first_tokens(tokenizer)
    body = windows.shape[1] - len(prefix)
    pieces = -(-body // TEXT_TOKENS)
    model = load_whole(source, processes.device)
    texts = varied_texts(model, tokenizer, generated * pieces, -(-body // pieces), seed, processes=processes)
    del model
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    own = texts.view(generated, -1)[:, :body]
    places = arrangement(len(windows), generated)
    result = windows.new_empty(len(places), windows.shape[1])
    result[~places] = windows
    result[places] = torch.cat([torch.tensor(prefix, dtype=own.dtype).expand(generated, -1), own], dim=1)
    return result


def varied_texts(
    model: nn.Module,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
    processes: Processes | None = None,
) -> Tensor:
    """Texts (count, length) that begin in many ways; more are sampled, and the most repetitive ones are left out.

    Args:
        model: with all of its weights.
        tokenizer: of the model.
        count: texts.
        length: tokens of a text.
        seed: of the samples.
        advance: told the number of tokens generated so far.
        processes: that share out the rounds; the texts are those of one process.
    """
    first = first_token(tokenizer, model.config.vocab_size)
    openings = Openings(tokenizer, first, seed) if OPENED else None
    spare = int(count * SPARE) if openings else 0
    return varied(write(model, count + spare, length, first, seed, advance, openings, processes), count)


def first_token(tokenizer: Any, vocabulary: int | None = None) -> int:
    """The token that a text continues: the tokenizer's prefix, or the separator of documents.

    Args:
        tokenizer: of the model.
        vocabulary: rows of the model's embedding, which may be fewer than the tokenizer's tokens.
    """
    prefix = first_tokens(tokenizer)
    document = tokenizer.get_vocab().get(DOCUMENT)
    candidates = (*prefix, document, tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None and (vocabulary is None or token < vocabulary))


def load_whole(source: Source, device: torch.device) -> nn.Module:
    """The source model with all of its weights on the device: bfloat16 on CUDA, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    if source.family.softcap or source.family.sinks:
        model.set_attn_implementation("eager")  # SDPA supports neither
    take_weights(model, source.reader, device, dtype)
    return model.to(device).eval()


@dataclass
class _NextPosition:
    """Position of the next token, on the device and on the host."""

    on_device: Tensor  # (1,) int64
    on_host: int = 0

    @property
    def attended(self) -> int:
        """Tokens that attention reads: those up to the position, rounded up to CACHE_UNIT."""
        return (self.on_host // CACHE_UNIT + 1) * CACHE_UNIT


class _Layer(StaticLayer):
    """A cache layer of fixed size, written at a position that is in device memory: a CUDA graph can be replayed on it."""

    def __init__(self, position: _NextPosition, length: int):
        """A layer for `length` tokens; `position` is shared by all layers of a cache."""
        super().__init__(length)
        self.position = position

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token, and return all that attention reads; the mask hides those that are not written yet."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.position.on_device, key_states)
        self.values.index_copy_(2, self.position.on_device, value_states)
        return self.keys[:, :, : self.position.attended], self.values[:, :, : self.position.attended]

    def get_seq_length(self) -> int:
        """Tokens that attention reads; only the device knows the position while a graph is replayed."""
        return self.position.attended

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.position.attended, 0


class _HybridLayer(LinearAttentionLayer, _Layer):
    """A cache layer of a layer with attention and a recurrent mixer."""

    def __init__(self, position: _NextPosition, length: int):
        """As `_Layer`."""
        _Layer.__init__(self, position, length)
        LinearAttentionLayer.__init__(self)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:
        """Lay out keys and values, which are given by position, or a recurrent state, which is given by name."""
        (_Layer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)


def _cache_layer(stock: Any) -> type[_Layer]:
    """The class that takes the place of a stock cache layer with keys and values."""
    return _HybridLayer if isinstance(stock, LinearAttentionLayer) else _Layer


class Decoder:
    """Next-token logits of texts of equal length; on CUDA a step is one CUDA graph, as launches dominate its time.

    Attention reads the tokens up to the position, rounded up to CACHE_UNIT; every such length has its graph.
    """

    def __init__(self, model: nn.Module, texts: int, length: int):
        """Allocate the cache; `restart` has to follow.

        Args:
            model: with a key-value cache.
            texts: number of texts N.
            length: tokens of a text at most.
        """
        self.model, self.device = model, model.device
        length = -(-length // CACHE_UNIT) * CACHE_UNIT
        self.ids = torch.zeros(texts, 1, dtype=torch.int64, device=self.device)
        self.position = _NextPosition(torch.zeros(1, dtype=torch.int64, device=self.device))
        self.hidden = torch.finfo(model.dtype).min
        self.mask = torch.empty(texts, 1, 1, length, dtype=model.dtype, device=self.device)
        self.cache = Cache(layers=DynamicCache(config=model.config).layers)
        for index in converted_layers(model.config):
            self.cache.layers[index] = _cache_layer(self.cache.layers[index])(self.position, length)
        self.capturable = self.device.type == "cuda"
        self.graphs: dict[int, CapturedCall[Tensor]] = {}

    def _run(self) -> Tensor:
        self.mask.index_fill_(3, self.position.on_device, 0)
        with attention_backend(GROUPED, self.model):
            output = self.model(
                input_ids=self.ids, attention_mask=self.mask[..., : self.position.attended],
                position_ids=self.position.on_device.expand(len(self.ids), 1), **with_cache(self.model, self.cache),
            )  # fmt: skip
        return output.logits[:, -1]

    def restart(self) -> None:
        """Begin new texts; the mask hides those before."""
        self.position.on_host = 0
        self.position.on_device.zero_()
        for layer in self.cache.layers:
            if isinstance(
                layer, LinearAttentionLayer
            ):  # keys and values are overwritten, a recurrent state is continued
                LinearAttentionLayer.reset(layer)
        self.mask.fill_(self.hidden)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits (N, vocabulary) behind the tokens `ids` (N, 1), valid until the next call."""
        self.ids.copy_(ids)
        if self.position.attended in self.graphs:
            logits = self.graphs[self.position.attended]()
        else:
            logits = self._run()
            if self.capturable:
                self._capture()
        self.position.on_device.add_(1)
        self.position.on_host += 1
        return logits

    def _capture(self) -> None:
        """Capture the step that has just run, for those that follow. The graphs never run at once, and share memory.

        A model that reads values on the host (experts, RoPE scaled by length) cannot be captured, and runs step by step.
        """
        first = next(iter(self.graphs.values()), None)
        try:
            self.graphs[self.position.attended] = CapturedCall(self._run, pool=first and first.pool())
        except RuntimeError:
            self.capturable = False


def rounds(model: nn.Module, count: int, length: int) -> int:
    """Rounds in which `write` generates `count` texts of `length` tokens, as the caches of one round fit into memory."""
    config = model.config.get_text_config()
    text_bytes = original_cache_bytes(config, model.dtype.itemsize) * length
    memory = CACHE_BYTES
    if model.device.type == "cuda":
        memory = max(memory, int(torch.cuda.get_device_properties(model.device).total_memory * CACHE_FRACTION))
    return min(count, -(-count * text_bytes // memory))


@torch.no_grad()
def write(
    model: nn.Module,
    count: int,
    length: int,
    first: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
    openings: Openings | None = None,
    processes: Processes | None = None,
) -> Tensor:
    """Sample texts token by token from the model's own distribution.

    The end of a document does not end a text: the model continues with another document. A text longer than the narrowest
    attention window is made of several, so that one mask serves all layers.

    Args:
        model: with all of its weights.
        count: texts.
        length: tokens of a text.
        first: token before each text, which is not part of it.
        seed: of the samples.
        advance: told the number of tokens generated so far.
        openings: first tokens of the texts and how freely they are sampled; without, all are sampled at temperature 1.
        processes: that share out the rounds; the texts are those of one process.

    Returns:
        Token ids (count, length), on the CPU.
    """
    processes = processes or alone(model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    config = model.config.get_text_config()
    parts = -(-length // (getattr(config, "sliding_window", None) or length))
    if parts > 1:
        shorter = write(model, count * parts, -(-length // parts), first, seed, advance, openings, processes)
        return shorter.view(count, -1)[:, :length]
    times = rounds(model, count, length)
    batch = -(-count // times)
    decoder, texts = Decoder(model, batch, length), {}
    scripts = openings.scripts(count, batch, length) if openings else []
    for number in range(times):
        if number not in processes.share(times):
            _skip(generator, batch, config.vocab_size, length)
            continue
        decoder.restart()
        script = scripts[number].to(model.device) if scripts else None
        ids, tokens = torch.full_like(decoder.ids, first), []
        for step in range(length):
            probabilities = decoder(ids).float().softmax(-1)
            if script:
                probabilities = script.likely(probabilities)
            ids = torch.multinomial(probabilities, 1, generator=generator)
            if script:
                ids = script.direct(step, ids)
            tokens.append(ids)
            advance((number * length + step + 1) * len(ids))
        texts[number] = torch.cat(tokens, dim=1).cpu()
    everyones = {number: text for part in processes.gathered(texts) for number, text in part.items()}
    return torch.cat([everyones[number] for number in range(times)])[:count]


def _skip(generator: torch.Generator, texts: int, vocabulary: int, length: int) -> None:
    """Draw the random numbers of a round that another process generates: how many they are depends on shapes alone."""
    anything = torch.ones(texts, vocabulary, device=generator.device)
    for _ in range(length):
        torch.multinomial(anything, 1, generator=generator)

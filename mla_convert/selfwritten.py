"""Calibration text that the original writes itself: of every kind that it was trained on, where a user's text is of one.

Sampling from the model to calibrate or distil it is known from quantisation (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mla_convert.checkpoint.writer import stored_bytes
from mla_convert.config import ConvertConfig
from mla_convert.source import Source

# Share of the windows where none is asked for, on a GPU of which the whole original takes no more than MEMORY_SHARE.
SHARE, MEMORY_SHARE = 0.5, 1 / 8
# Tokens of one text; a longer window holds several.
TEXT_TOKENS = 512
# What the cache of the texts that are written at once may take: of a GPU's free memory, and of a host's.
CACHE_SHARE, CACHE_BYTES = 1 / 3, 4 << 30
# What begins a document in the training data of many models whose tokenizers put nothing before a text.
DOCUMENT = "<|endoftext|>"


def share(config: ConvertConfig, source: Source, device: torch.device) -> float:
    """Share of the calibration windows that the original writes."""
    if config.calib_self is not None:
        return config.calib_self
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
    prefix = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    body = windows.shape[1] - len(prefix)
    pieces = -(-body // TEXT_TOKENS)
    model = load_whole(source, device)
    written = write(model, count * pieces, -(-body // pieces), first_token(tokenizer), seed)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    body_ids = written.view(count, -1)[:, :body]
    texts = torch.cat([torch.tensor(prefix, dtype=body_ids.dtype).expand(count, -1), body_ids], dim=1)
    found = windows.clone()
    found[replaced] = texts
    return found


def first_token(tokenizer: Any) -> int:
    """What the model continues: what its tokenizer puts before a text, or what separates documents."""
    prefix = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    if prefix:
        return prefix[0]
    document = tokenizer.get_vocab().get(DOCUMENT)
    known = (document, tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


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


@torch.no_grad()
def write(
    model: nn.Module, count: int, length: int, first: int, seed: int, advance: Callable[[int], None] | None = None
) -> Tensor:
    """Texts (count, length), on the CPU, sampled token by token from the model's own distribution after `first`.

    The end of a document does not end a text: the model goes on with another. `advance` is told how many of the
    `steps(model, count, length)` forward passes are done.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    parts = torch.tensor_split(torch.arange(count), steps(model, count, length) // length)
    texts, done = [], 0
    for size in parts:
        ids, cache, written = torch.full((len(size), 1), first, device=model.device), None, []
        for _ in range(length):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            ids = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            written.append(ids)
            done += 1
            if advance:
                advance(done)
        texts.append(torch.cat(written, dim=1).cpu())
    return torch.cat(texts)


def steps(model: nn.Module, count: int, length: int) -> int:
    """Forward passes that `write` needs: as many texts are written at once as there is room for their caches."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    text = 2 * heads * width * config.num_hidden_layers * length * model.dtype.itemsize
    room = CACHE_BYTES
    if model.device.type == "cuda":
        room = int(torch.cuda.mem_get_info(model.device)[0] * CACHE_SHARE)
    return length * min(count, -(-count * text // room))

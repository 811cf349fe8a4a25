"""Default steps of refinement, and the blocks of layers that are refined together."""

from __future__ import annotations

import itertools
import math

import torch

from mla_convert.core.settings import ConvertConfig
from mla_convert.method.refine.optimise import RefineSettings
from mla_convert.source.shape import AttentionShape
from mla_convert.source.source import Source

# Default block on a GPU: at most BLOCK_LAYERS layers and BLOCK_BYTES of activations, weights and optimizer state.
BLOCK_LAYERS = 6
BLOCK_BYTES = 6 << 30
# Steps of a block = steps of a layer x (calibration windows / BLOCK_WINDOWS): more text has more to teach.
BLOCK_WINDOWS = 125
# The last layers are then trained on KL(source || converted) of the next token, for 1 / OUTPUT_STEPS of a block's steps at
# OUTPUT_RATE of its learning rate. On a GPU they are as many as fit into OUTPUT_MEMORY of its memory (of CARD_BYTES where
# there is no GPU, for a dry run).
OUTPUT_STEPS, OUTPUT_RATE, OUTPUT_MEMORY, CARD_BYTES = 4, 1 / 3, 1 / 4, 80 * 10**9
# Held-out evaluations of these steps: on little text their KL rises again before they end.
OUTPUT_EVALUATIONS = 8


def blocks(layers: int, size: int) -> list[range]:
    """Split `layers` layers into blocks of at most `size`, as equal as possible."""
    count = -(-layers // size)
    bounds = [round(i * layers / count) for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def groups(layers: int, settings: RefineSettings) -> list[list[range]]:
    """Group the blocks that are in memory together: each alone, but the last ones, whose last steps are joint."""
    every = blocks(layers, settings.block)
    last = 1
    while settings.output_steps and last < len(every) and layers - every[-last].start < settings.output_layers:
        last += 1
    return [*([block] for block in every[:-last]), every[-last:]]


def output_lr(settings: RefineSettings, layers: int) -> float:
    """Learning rate of the last `layers` layers towards the next-token distribution: less, the more layers they are."""
    return OUTPUT_RATE * settings.block_lr * min(1.0, settings.block / layers)


def refine_settings(
    config: ConvertConfig, device: torch.device, calib: tuple[int, int], hidden: int, numbers: int = 0
) -> RefineSettings:
    """Steps, batch and blocks of a conversion; defaults are a minute or two of a GPU, and few steps on a CPU.

    Args:
        config: the settings that were given.
        device: of the conversion.
        calib: calibration windows, and tokens in one.
        hidden: width of the residual stream.
        numbers: parameters of a layer, with all of its experts.
    """
    windows, length = calib
    cuda = device.type == "cuda"
    steps = (200 if cuda else 30) if config.refine_steps is None else config.refine_steps
    batch = max(1, (8192 if cuda else 2048) // length) if config.refine_batch is None else config.refine_batch
    block = config.refine_block
    if block is None:
        block = max(1, min(BLOCK_LAYERS, BLOCK_BYTES // _layer_bytes(batch * length, hidden))) if cuda else 1
    block_steps = steps * windows // BLOCK_WINDOWS if config.block_steps is None else config.block_steps
    block_steps = block_steps if block > 1 else 0
    output_steps = config.output_steps
    if output_steps is None:  # on a CPU the head takes most of a small model's time
        output_steps = block_steps // OUTPUT_STEPS if cuda else 0
    output_layers = config.output_layers
    if output_layers is None:
        # weights are held in float32
        layer = _layer_bytes(batch * length, hidden) + torch.float32.itemsize * numbers
        output_layers = int(_output_bytes(device) // layer) if cuda else 1
    return RefineSettings(
        steps,
        batch,
        config.refine_lr,
        config.seed,
        block,
        block_steps,
        config.block_lr,
        output_steps,
        max(1, output_layers),
    )


def draft_bytes(settings: RefineSettings, layers: int, attention: int) -> int:
    """Bytes of the students that wait for the last steps, float32, until they are written; `attention`: numbers of one."""
    waiting = sum(map(len, groups(layers, settings)[-1])) if settings.output_steps else 0
    return waiting * attention * torch.float32.itemsize


def layer_numbers(source: Source, part: str = "") -> int:
    """Parameters of the largest layer, as they are stored, or of the modules in it whose names begin with `part`."""
    counts: dict[str, int] = {}
    for name in source.reader.names():
        if name.startswith(f"{source.family.layers}."):
            layer, _, inner = name.removeprefix(f"{source.family.layers}.").partition(".")
            if inner.startswith(part):
                counts[layer] = counts.get(layer, 0) + math.prod(source.reader.shape(name))
    return max(counts.values(), default=0)


def output_advances(settings: RefineSettings, shape: AttentionShape) -> int:
    """Steps towards the next-token distribution, counted for each layer that takes them."""
    last = set(itertools.chain(*groups(shape.layers, settings)[-1]))
    return settings.output_steps * len(last.intersection(shape.converted_layers))


def _output_bytes(device: torch.device) -> int:
    """Memory in bytes for the layers that are trained towards the next-token distribution on a GPU."""
    card = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else CARD_BYTES
    return int(card * OUTPUT_MEMORY)


def _layer_bytes(tokens: int, hidden: int) -> int:
    """Memory in bytes of one more layer in a block, roughly: activations for the backward pass, weights, Adam's state."""
    return 60 * tokens * hidden + 80 * hidden**2

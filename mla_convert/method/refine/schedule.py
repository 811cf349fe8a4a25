"""Which layers are refined together, and in how many steps."""

from __future__ import annotations

import itertools
import math

import torch

from mla_convert.core.settings import ConvertConfig
from mla_convert.method.refine.optimise import RefineSettings
from mla_convert.source.source import Source

# Where no block is asked for, on a GPU: layers refined together, at most, and while they take no more than so many bytes.
BLOCK_LAYERS = 6
BLOCK_BYTES = 6 << 30
# A block gets as many steps as each of its layers for every so many calibration windows: more text has more to teach.
BLOCK_WINDOWS = 125
# The last layers then go towards the next-token distribution: one step for so many of a block's, and on a GPU as many layers
# as take no more than this share of its memory (of CARD_BYTES where there is none, for a plan).
OUTPUT_SHARE, OUTPUT_MEMORY, CARD_BYTES = 4, 1 / 4, 80 * 10**9


def blocks(layers: int, size: int) -> list[range]:
    """Layers in blocks of at most `size`, as equal as can be."""
    count = -(-layers // size)
    bounds = [round(i * layers / count) for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def groups(layers: int, settings: RefineSettings) -> list[list[range]]:
    """Blocks in groups that are in memory together: one by one, and the last ones, which take the last steps together."""
    found = blocks(layers, settings.block)
    last = 1
    while settings.output_steps and last < len(found) and layers - found[-last].start < settings.output_layers:
        last += 1
    return [*([block] for block in found[:-last]), found[-last:]]


def refine_settings(
    config: ConvertConfig, device: torch.device, calib: tuple[int, int], hidden: int, numbers: int = 0
) -> RefineSettings:
    """Steps, batch and blocks where none are given: what a GPU does in a minute or two, and a token amount on a CPU.

    :param calib: calibration windows, and tokens in one;  :param hidden: size of the residual stream;
    :param numbers: weights of a layer, all of its experts among them.
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
    if output_steps is None:  # on a CPU the head is most of a small model's work
        output_steps = block_steps // OUTPUT_SHARE if cuda else 0
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


def layer_numbers(source: Source) -> int:
    """Weights of the largest layer, as they are stored."""
    counts: dict[str, int] = {}
    for name in source.reader.names():
        if name.startswith(f"{source.family.layers}."):
            layer = name.removeprefix(f"{source.family.layers}.").partition(".")[0]
            counts[layer] = counts.get(layer, 0) + math.prod(source.reader.shape(name))
    return max(counts.values(), default=0)


def output_advances(settings: RefineSettings, layers: int) -> int:
    """Steps towards the next-token distribution, counted once for each layer that takes them."""
    return settings.output_steps * sum(map(len, groups(layers, settings)[-1]))


def _output_bytes(device: torch.device) -> int:
    """Memory that the layers which take the last steps may have on the GPU."""
    card = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else CARD_BYTES
    return int(card * OUTPUT_MEMORY)


def _layer_bytes(tokens: int, hidden: int) -> int:
    """What one more layer in a block takes on the device, roughly: activations kept for the way back, weights, Adam's state."""
    return 60 * tokens * hidden + 80 * hidden**2

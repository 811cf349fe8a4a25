"""The healed state that is nearest to the start among those that held-out text finds equally good.

Training also moves weights that the text at hand does not need, and what they held of other text is lost. On the way back
to the start that loss falls with the square of the distance, and the gain on the text at hand hardly at first: the loss is
flat around its least. So weights between start and end keep the gain and forget less (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mla_convert.heal.loop import Trainer
from mla_convert.heal.state import SHARDED, trained_parameters

# Shares of the way from the start to the best state that are tried, and how much larger a held-out loss counts as equal.
SHARES, EQUAL = (0.75, 0.5, 0.25), 1.01


def step_back(trainer: Trainer, folder: Path, shards: list[str]) -> None:
    """Keep the state nearest to the start whose held-out loss is at most EQUAL times the least, on the kind with the largest.

    Nothing is done for adapters, which do not start from a checkpoint's weights, nor where processes share the weights out.

    Args:
        trainer: after training. Its best state is replaced, and its run notes the share of the way.
        folder: of the converted model, whose weights are the start.
        shards: names of its weight files.
    """
    end, accelerator = trainer.best, trainer.accelerator
    if trainer.settings.train == "lora" or accelerator.distributed_type in SHARDED:
        return
    # A process of another host may lack the best state of a run that it resumed, and all must measure or none.
    have = accelerator.reduce(torch.tensor([end is not None], dtype=torch.float32, device=accelerator.device), "sum")
    if end is None or int(have) < accelerator.num_processes:
        return
    parameters = trained_parameters(accelerator, trainer.model)
    losses = {1.0: trainer.run.best}
    for share in SHARES:
        with torch.no_grad():
            for name, between in _between(folder, shards, end, share):
                parameters[name].copy_(between)
        losses[share] = trainer.held_out()["loss"]
    losses = {share: loss for share, loss in losses.items() if math.isfinite(loss)}
    trainer.run.share = min(share for share, loss in losses.items() if loss <= EQUAL * min(losses.values()))
    if trainer.run.share < 1:
        for name, between in _between(folder, shards, end, trainer.run.share):
            end[name] = between
        trainer.run.best = losses[trainer.run.share]
        trainer.progress.note(
            f"{trainer.run.share:.0%} of the way from the start is as good or better on held-out text, and is kept"
        )


def _between(folder: Path, shards: list[str], end: dict[str, Tensor], share: float) -> Iterator[tuple[str, Tensor]]:
    """Every trained tensor at a share of the way from the checkpoint's to that of `end`, float32 on the CPU."""
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for name in end.keys() & file.keys():
                yield name, torch.lerp(file.get_tensor(name).float(), end[name], share)

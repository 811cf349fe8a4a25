"""Adam with learning rates relative to the parameters, its schedule, and the best state of a run.

Refinement (`optimise`) and healing (`heal.loop`) train with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

# Floor of a parameter's root mean square when its learning rate is scaled by it: a zero bias has none.
MIN_SCALE = 1e-3

State = TypeVar("State")


class RelativeAdam(torch.optim.AdamW):
    """Adam without weight decay, whose learning rates are `lr` times the root mean square of each parameter.

    One setting then suits models of any scale. `set_rates` sets the rates of a step.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        *,
        relative: bool = True,
        grouped: bool = False,
        fused: bool = True,
        capturable: bool = False,
    ):
        """Measure the parameters.

        Args:
            parameters: to be trained.
            lr: peak learning rate, relative to each parameter's root mean square.
            betas: Adam's decay rates of the first and second moments.
            relative: without, `lr` is absolute; for parameters that start at zero, such as LoRA's.
            grouped: round the rates to powers of sqrt(2), so that many parameters share a group; else each has its own.
            fused: use the fused kernels.
            capturable: keep the rates on the device, where a CUDA graph reads them.
        """
        groups: dict[float | int, list[nn.Parameter]] = {}
        rates: dict[float | int, float] = {}
        for index, parameter in enumerate(parameters):
            rate = lr * _scale(parameter, grouped) if relative else lr
            key = rate if grouped else index
            groups.setdefault(key, []).append(parameter)
            rates[key] = rate
        super().__init__(
            [
                {"params": groups[key], "lr": _rate(rates[key], groups[key][0], capturable), "peak": rates[key]}
                for key in sorted(groups)
            ],
            betas=betas,
            weight_decay=0.0,
            fused=fused,
            capturable=capturable,
        )


def _scale(parameter: nn.Parameter, grouped: bool) -> float:
    """Root mean square of a parameter, at least MIN_SCALE."""
    scale = float(parameter.detach().float().square().mean().sqrt().clamp_min(MIN_SCALE))
    return 2 ** (round(2 * math.log2(scale)) / 2) if grouped else scale


def _rate(rate: float, parameter: nn.Parameter, capturable: bool) -> Tensor | float:
    return torch.tensor(rate, device=parameter.device) if capturable else rate


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every rate to `factor` times its peak.

    Args:
        optimizer: a `RelativeAdam`, or what accelerate made of one.
        factor: from `warmup_cosine`.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak"] * factor)
        else:
            group["lr"] = group["peak"] * factor


def cosine(done: float, floor: float = 0.0) -> float:
    """Half a cosine from 1 to `floor` (SGDR without restarts, arXiv 1608.03983), at the fraction `done` of a run."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.0, overlap: bool = False) -> float:
    """Factor on the peak learning rate at a step: linear warm-up and cosine decay.

    Args:
        step: from 0 on.
        steps: of the whole run.
        warmup: steps until the peak, at least 1.
        floor: the factor at the end.
        overlap: the decay begins with the first step and multiplies the warm-up; else it begins behind the warm-up.
    """
    rise = min(1.0, (step + 1) / warmup)
    done = step / steps if overlap else max(0, step - warmup) / max(1, steps - warmup)
    return rise * cosine(done, floor)


class BestState(Generic[State]):
    """The state with the least held-out error so far."""

    def __init__(self, error: float = math.inf, state: State | None = None):
        """Start from a known state, or from none.

        Args:
            error: of `state`; whatever is less replaces it.
            state: None if the state to keep is not at hand.
        """
        self.error, self.state = error, state

    def update(self, error: float, snapshot: Callable[[], State | None]) -> bool:
        """Keep a state if its error is less than every one before; one that is NaN never is.

        Args:
            error: on the held-out data.
            snapshot: copies the state; called only if it is kept.

        Returns:
            Whether it was kept.
        """
        if not error < self.error:
            return False
        self.error, self.state = error, snapshot()
        return True

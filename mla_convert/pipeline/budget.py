"""`--budget`: the calibration windows and steps with which a conversion takes about a given time, by the plan's estimate."""

from __future__ import annotations

import math

import torch

from mla_convert.core.errors import UsageError
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.units import duration
from mla_convert.pipeline.estimate import time as timing
from mla_convert.pipeline.resolve import ResolvedConversion, resolve
from mla_convert.pipeline.work import converted_parameters, layer_run, layer_work, source_parameters
from mla_convert.source.source import Source

# Least windows and steps that are chosen; a conversion's defaults are the most.
WINDOWS, STEPS = 16, 5
# The choices: square roots of these fractions of windows and of steps, so that the steps of blocks, which grow with both, are
# these fractions of the default's.
FRACTIONS = [0.9**power for power in range(60)]


def within_budget(
    config: ConvertConfig, source: Source, device: torch.device, processes: int = 1
) -> tuple[ConvertConfig, str | None]:
    """Choose windows and steps that were not given, so that the conversion takes the budget's time at most.

    Args:
        config: settings as given.
        source: the opened source; its weights are not read.
        device: of the conversion.
        processes: that share it.

    Returns:
        The settings with the choice, and the choice in words; None where there is no budget.

    Raises:
        UsageError: the least takes longer.
    """
    if config.budget is None:
        return config, None
    free = [name for name in ("calib_samples", "refine_steps") if getattr(config, name) is None]
    most = resolve(config, source, device)
    # Sizes of the model do not depend on what is chosen, so that they are counted once.
    before, after = source_parameters(source), converted_parameters(source, most.plan, most.dtype)

    def seconds(resolved: ResolvedConversion) -> float:
        work, run, layers = layer_work(resolved, before, after), layer_run(resolved), resolved.plan.shape.layers
        if resolved.on_gpu:
            return timing.h100_seconds(work, layers, run, processes)
        return timing.cpu_seconds(work, layers, run, torch.get_num_threads(), processes)

    takes = math.inf
    # The fractions fall, so that the first choice that fits is the largest.
    for fraction in FRACTIONS:
        part = math.sqrt(fraction)
        sizes = {"calib_samples": max(WINDOWS, int(most.calibration[0] * part)),
                 "refine_steps": max(STEPS, int(most.refinement.steps * part))}  # fmt: skip
        chosen = config.model_copy(update={name: min(sizes[name], _default(most, name)) for name in free})
        takes = seconds(resolve(chosen, source, device))
        if takes <= config.budget:
            return chosen, _words(chosen, config.budget, takes, most.on_gpu)
    raise UsageError(
        f"a conversion of {source.name} takes about {duration(takes)} at least, more than --budget {duration(config.budget)}: "
        f"give it more"
    )


def _default(most: ResolvedConversion, name: str) -> int:
    return most.calibration[0] if name == "calib_samples" else most.refinement.steps


def _words(chosen: ConvertConfig, budget: float, takes: float, on_gpu: bool) -> str:
    spread = timing.H100_SPREAD if on_gpu else timing.CPU_SPREAD
    return (
        f"for a budget of {duration(budget)}: {chosen.calib_samples} calibration windows and {chosen.refine_steps} steps a "
        f"layer, about {duration(takes)} by the plan's estimate, which holds within a factor of {spread:g}"
    )

"""One resolution of a conversion's settings: everything that was not given follows here from source, engine and device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from mla_convert.core.runtime import pick_device
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality.suite import suite_size
from mla_convert.heal.settings import HealSettings, conversion_healing
from mla_convert.method.calibrate import self_generated
from mla_convert.method.factorise.sensitivity import is_measured, scratch_bytes
from mla_convert.method.factorise.sizes import Plan, make_plan, shares_out
from mla_convert.method.refine.optimise import RefineSettings
from mla_convert.method.refine.schedule import draft_bytes, layer_numbers, refine_settings
from mla_convert.publish.engines import target_engine
from mla_convert.publish.engines.profiles import check_profile
from mla_convert.source.source import Source, open_source
from mla_convert.source.texts import Reach, calibration_size, evaluation_length, reach


@dataclass(frozen=True)
class ResolvedConversion:
    """A conversion with nothing left to choose. The dry run, the conversion, its recipe and sweeps read their settings here.

    Attributes:
        settings: As given, with sizes and planes that the target engine can serve, if one is named.
        source: The opened source.
        device: Device of the conversion; the dry run resolves for devices that this machine does not have.
        plan: Rank and rotary dimensions: every layer's, or the mean that layers share out (`uniform`).
        reach: The longest window and the vocabulary of the model.
        calibration: Calibration windows and tokens in one.
        generated: Calibration windows that the original generates; 0 until the texts are read.
        healing: Settings of the healing run that follows, or None.
    """

    settings: ConvertConfig
    source: Source
    device: torch.device
    plan: Plan
    reach: Reach
    calibration: tuple[int, int]
    healing: HealSettings | None
    generated: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the sizes of `plan`."""
        return not shares_out(self.settings, self.plan)

    @property
    def cast(self) -> torch.dtype | None:
        """Dtype that tensors are converted to as they are written; None writes them as they are stored."""
        if self.settings.dtype == "auto":
            # Dequantised tensors are float32 in memory, which is not the dtype to write.
            return self.source.dtype if self.source.gguf else None
        return getattr(torch, self.settings.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the written model."""
        return self.cast or self.source.dtype

    @property
    def is_measured(self) -> bool:
        """Whether sensitivities are measured: for sizes by layer, or for the channel weights of refinement."""
        return is_measured(self.plan, self.settings)

    @property
    def scratch_bytes(self) -> int:
        """Bytes on disk that the conversion takes while it runs: for sensitivities, later for layers before their last steps."""
        attention = layer_numbers(self.source, f"{self.source.family.attention}.")
        drafts = draft_bytes(self.refinement, self.plan.shape.layers, attention)
        return max(scratch_bytes(self.plan) if self.is_measured else 0, drafts)

    @property
    def evaluation_length(self) -> int:
        """Tokens in an evaluation window."""
        return evaluation_length(self.settings, self.reach)

    @property
    def evaluation(self) -> tuple[int, int]:
        """Windows that perplexity is measured on, and tokens in one; windows of the packaged suite count by their tokens."""
        length = self.evaluation_length
        suite = prod(suite_size(self.settings, self.on_gpu, length))
        return self.settings.eval_windows + -(-suite // length), length

    @cached_property
    def refinement(self) -> RefineSettings:
        """Steps, batch and blocks of the refinement."""
        hidden = self.source.shape.hidden_size
        return refine_settings(self.settings, self.device, self.calibration, hidden, layer_numbers(self.source))

    @cached_property
    def self_generated(self) -> float:
        """Fraction of the calibration windows that the original generates."""
        # Once the texts are read, the fraction follows from the windows that there are.
        if self.generated:
            return self.generated / self.calibration[0]
        return self_generated.generated_fraction(self.settings, self.source, self.device)

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings that depend on the device or the calibration text, by name: as reports and recipes record them."""
        refine = self.refinement
        return {
            "refine_steps": refine.steps,
            "refine_batch": refine.batch,
            "refine_block": refine.block,
            "block_steps": refine.block_steps,
            "output_steps": refine.output_steps,
            "output_layers": refine.output_layers,
            "calib_self_generated": self.self_generated,
        }

    def recorded(self) -> dict[str, Any]:
        """All settings by name, as report.json records them: without source and output."""
        given = self.settings.model_dump(mode="json", exclude={"source", "revision", "out", "overwrite"})
        return given | self.chosen

    def for_texts(self, windows: int, length: int) -> ResolvedConversion:
        """The same with the calibration windows that the texts fill, and the original's own beside them."""
        generated = self_generated.generated_windows(self.settings, windows, self.calibration[0], self.self_generated)
        return replace(self, calibration=(windows + generated, length), generated=generated)


def resolve(config: ConvertConfig, source: Source, device: torch.device | None = None) -> ResolvedConversion:
    """Resolve everything that the settings leave open.

    Args:
        config: The settings as given.
        source: The opened source; its weights are not read.
        device: Device of the conversion; None takes the one that the settings name.

    Raises:
        InputError: The model cannot have such sizes, or the engine cannot serve it.
        UsageError: A setting that the engine cannot serve.
        ResourceError: There is no such device.
    """
    device = pick_device(config.device) if device is None else device
    # First, because the plan follows from the sizes that the engine has kernels for.
    settings = target_engine.apply_constraints(config, source)
    model = reach(source.config, learned=not source.family.rotary)
    return ResolvedConversion(
        settings=settings,
        source=source,
        device=device,
        plan=make_plan(settings, source.shape),
        reach=model,
        calibration=calibration_size(settings, device.type == "cuda", source.shape.hidden_size, model),
        healing=conversion_healing(settings),
    )


def check_export(config: ConvertConfig, profile: str) -> None:
    """Refuse, before a conversion, an export of its result that is not possible whatever the result is.

    Args:
        config: The settings of the conversion.
        profile: Name of the export's profile.

    Raises:
        UsageError: No such profile, or settings that it cannot express.
        InputError: A source that it cannot express.
    """
    name = check_profile(profile)
    source = open_source(config.source, config.revision, weights=False)
    resolved = resolve(config, source)
    target_engine.check_export(resolved.settings, resolved.plan, name, source)

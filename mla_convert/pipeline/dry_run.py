"""`plan`: sizes and needs of a conversion before and after, from the configuration alone."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from rich.console import Console

from mla_convert.core.errors import UsageError
from mla_convert.core.settings import ConvertConfig
from mla_convert.method.calibrate.hidden_states import DEVICE_BYTES, DEVICE_FRACTION
from mla_convert.method.refine.schedule import CARD_BYTES
from mla_convert.modeling.fixed_states import fixed_state_bytes
from mla_convert.pipeline.budget import within_budget
from mla_convert.pipeline.dry_run_sections import (
    Advice,
    CacheSection,
    CardFit,
    CardSection,
    GpuCount,
    GpusSection,
    HealSection,
    HostMemory,
    RunSection,
    Section,
    SourceSection,
    Warnings,
)
from mla_convert.pipeline.estimate import memory as sizing
from mla_convert.pipeline.estimate import time as timing
from mla_convert.pipeline.estimate.advice import advice
from mla_convert.pipeline.estimate.heal import HealEstimate, HealWork
from mla_convert.pipeline.estimate.heal import estimate as estimate_healing
from mla_convert.pipeline.resolve import ResolvedConversion, resolve
from mla_convert.pipeline.work import converted_parameters, layer_run, layer_work, mixing, prefixed, source_parameters
from mla_convert.report.report import cache_section
from mla_convert.source.source import Source, open_source

LIMIT = 1 << 20  # longest context looked for where the model names none
# The device that each estimate is for. The conversion is resolved for both: its defaults differ.
PLACES = {"cpu": torch.device("cpu"), "h100": torch.device("cuda")}


@dataclass(frozen=True)
class DryRun:
    """Everything that `plan` reports; bytes and parameters are exact for unquantised weights."""

    source: SourceSection
    cache: CacheSection
    card: CardSection | None
    run: RunSection
    gpus: GpusSection | None
    heal: HealSection | None
    advice: Advice
    warnings: Warnings

    @property
    def sections(self) -> list[Section]:
        """The sections that there are, in the order in which they are printed."""
        sections: list[Section | None] = [self.source, self.cache, self.card, self.run, self.gpus, self.heal]
        return [section for section in (*sections, self.advice, self.warnings) if section is not None]

    def as_dict(self) -> dict[str, Any]:
        """As `plan --json` prints it."""
        source, plan = self.source, self.cache.plan
        return {
            "source": {"name": source.name, "revision": source.revision, "model_type": source.model_type},
            "shape": source.shape,
            "dtype": source.dtype,
            "exact": plan.exact,
            "layers": [
                {
                    "layer": layer,
                    "kv_lora_rank": size.rank,
                    "qk_rope_head_dim": size.rope_dim,
                    "qk_nope_head_dim": plan.layer_nope_dim(layer),
                }
                for layer, size in zip(plan.shape.caching_layers, plan.layers, strict=True)
            ],
            "uniform": self.cache.uniform,
            "cache": {**self.cache.section, "grid": self.cache.grid},
            "parameters": self.cache.parameters,
            "disk_bytes": self.run.disk_bytes,
            "disk_aside_bytes": self.run.scratch_bytes,
            "peak_host_memory": asdict(self.run.memory),
            "time": {place: estimate.as_dict() for place, estimate in self.run.time.items()},
            "advice": self.advice.lines,
            "warnings": self.warnings.lines,
            **({"budget": self.run.budget} if self.run.budget else {}),
            **({"gpus": [asdict(each) for each in self.gpus.counts]} if self.gpus else {}),
            **({"heal": self.heal.estimate.as_dict()} if self.heal else {}),
            **({"card": asdict(self.card)} if self.card else {}),
        }


def plan_conversion(
    config: ConvertConfig, card_bytes: int | None = None, card: str | None = None, gpus: int | None = None
) -> DryRun:
    """Sizes before and after a conversion, and what it takes.

    Args:
        config: The conversion's settings.
        card_bytes: Memory of a card to fit model and cache into, in bytes.
        card: Name of that card.
        gpus: Most GPUs to give time and memory for: also for each power of two below.

    Raises:
        InputError: No such source, or sizes that it cannot have.
        ResourceError: The Hub cannot be reached.
    """
    source = open_source(config.source, config.revision, weights=False)
    chosen = {place: _within_budget(config, source, device) for place, device in PLACES.items()}
    resolved = {place: resolve(chosen[place][0], source, device) for place, device in PLACES.items()}
    # Windows and steps depend on the device, the sizes of the model do not.
    on_cpu = resolved["cpu"]
    plan, dtype, windows = on_cpu.plan, on_cpu.dtype, source.sliding_windows
    before = source_parameters(source)
    after = converted_parameters(source, plan, dtype)
    counts = {"before": _counts(source, before), "after": _counts(source, after)}
    weights = {side: count["model"] * dtype.itemsize for side, count in counts.items()}
    fixed = fixed_state_bytes(source.config, dtype)
    # A quantised row is counted in bytes, one to an element.
    width, itemsize = (plan.row_bytes, 1) if plan.cache.quantised else (plan.cache_width, dtype.itemsize)
    if plan.shape.heads:  # layers with and without windows have other sizes
        row = plan.cache.row_bytes if plan.cache.quantised else operator.attrgetter("width")
        width = tuple(map(row, plan.layers))
    caches = {
        "before": sizing.CacheSize(tuple(plan.shape.cache_widths), dtype.itemsize, tuple(windows), fixed),
        "after": sizing.CacheSize(width, itemsize, tuple(windows), fixed),
    }
    return DryRun(
        source=SourceSection(
            source.name,
            source.revision,
            source.config.model_type,
            shape_section(source),
            str(dtype).removeprefix("torch."),
        ),
        cache=CacheSection(
            plan=plan,
            uniform=on_cpu.uniform,
            section=cache_section(plan, dtype.itemsize, windows, fixed).as_dict(),
            sizes=caches,
            parameters={key: {side: count[key] for side, count in counts.items()} for key in ("attention", "model")},
        ),
        card=None if card_bytes is None else _card(source, card_bytes, card, weights, caches),
        run=RunSection(
            # beside the weights, each layer stores the indices of its rotary planes (int64)
            disk_bytes=weights["after"]
            + sum(plan.layer(layer).rope_dim // 2 for layer in plan.shape.converted_layers) * 8
            + (source.whole.other_bytes() if source.whole else 0),
            scratch_bytes=on_cpu.scratch_bytes,
            memory=_host_memory(on_cpu, after),
            time=_time(resolved, before, after),
            budget={place: choice for place, (_, choice) in chosen.items() if choice},
        ),
        gpus=None if gpus is None else _several(resolved["h100"], before, after, gpus, card_bytes or CARD_BYTES),
        heal=HealSection(_healing(on_cpu, after), torch.get_num_threads()) if on_cpu.healing else None,
        advice=Advice(advice(plan, healed=on_cpu.healing is not None)),
        warnings=Warnings([*source.notes, *sizing.warnings(plan)]),
    )


def _within_budget(config: ConvertConfig, source: Source, device: torch.device) -> tuple[ConvertConfig, str | None]:
    """The settings with what a budget chooses, or without it and the reason that a conversion there does not fit it."""
    try:
        return within_budget(config, source, device)
    except UsageError as error:
        return config.model_copy(update={"budget": None}), str(error)


def _card(
    source: Source, card_bytes: int, card: str | None, weights: dict[str, int], caches: dict[str, sizing.CacheSize]
) -> CardSection:
    limit = getattr(source.config, "max_position_embeddings", None) or LIMIT
    usable = int(card_bytes * sizing.USABLE)
    sides = {
        side: CardFit(weights[side], **sizing.fit(usable - weights[side], cache, limit))
        for side, cache in caches.items()
    }
    return CardSection(card, card_bytes, usable, limit, sides["before"], sides["after"])


def shape_section(source: Source) -> dict[str, int]:
    """Shape of a source's attention, as JSON output names it."""
    shape = source.shape
    return {
        "layers": shape.layers,
        "attention_layers": len(shape.converted_layers),
        "hidden_size": shape.hidden_size,
        "attention_heads": shape.num_heads,
        "key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "key_value_bias": shape.has_kv_bias,
    }


def _counts(source: Source, numbers: dict[str, int]) -> dict[str, int]:
    """Parameters of the attention layers and of the whole model."""
    return {
        "attention": sum(count for name, count in numbers.items() if source.is_replaced(name)),
        "model": sum(numbers.values()),
    }


def _time(
    resolved: dict[str, ResolvedConversion], before: dict[str, int], after: dict[str, int]
) -> dict[str, timing.TimeEstimate]:
    """Seconds on this machine's cores and on an H100, each with the settings of a conversion there."""
    work, layers = layer_work(resolved["cpu"], before, after), resolved["cpu"].plan.shape.layers
    runs = {place: layer_run(conversion) for place, conversion in resolved.items()}
    return timing.estimate(work, layers, runs, torch.get_num_threads())


def _several(
    resolved: ResolvedConversion, before: dict[str, int], after: dict[str, int], most: int, card_bytes: int
) -> GpusSection:
    """Time and memory on 1, 2, 4, … and `most` GPUs."""
    work, run, refine, layers = (
        layer_work(resolved, before, after),
        layer_run(resolved),
        resolved.refinement,
        resolved.plan.shape.layers,
    )
    memory = sizing.GpuRun(
        hidden=work.hidden,
        layer=max(work.layer_before, work.layer_after),
        attention=work.attention_after,
        head=work.head,
        itemsize=resolved.dtype.itemsize,
        calibration_tokens=prod(resolved.calibration),
        evaluation_tokens=prod(resolved.evaluation),
        step_tokens=refine.batch * resolved.calibration[1],
        block=refine.block,
        output_layers=min(refine.output_layers, layers) if refine.output_steps else 0,
    )
    limit = max(DEVICE_BYTES, int(card_bytes * DEVICE_FRACTION))
    counts = sorted({most, *(1 << power for power in range(most.bit_length()))})
    return GpusSection(
        [
            GpuCount(
                count,
                timing.h100_range(timing.h100_seconds(work, layers, run, count)),
                memory.device_bytes(count, limit),
                memory.host_bytes(count, limit),
            )
            for count in counts
        ]
    )


def _healing(resolved: ResolvedConversion, after: dict[str, int]) -> HealEstimate:
    """Memory and time of the healing run."""
    source, plan, healing = resolved.source, resolved.plan, resolved.healing
    assert healing is not None
    shape, config = plan.shape, source.config
    limit = getattr(config, "max_position_embeddings", None)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    mixing_before, mixing_after = mixing(plan)
    work = HealWork(
        weights=sum(after.values()),
        attention=_counts(source, after)["attention"],
        # An embedding table of its own is only looked up; a tied one is multiplied as the head.
        looked_up=0 if getattr(config, "tie_word_embeddings", False) else shape.hidden_size * config.vocab_size,
        layers=shape.layers,
        hidden=shape.hidden_size,
        # GPT-2 states no width where it is four times the hidden size.
        intermediate=experts * (inner or 4 * shape.hidden_size),
        mixing_before=mixing_before,
        mixing_after=mixing_after,
    )
    # The longest windows have the most attention for a token.
    length = max(each for each, _ in healing.mix(limit))
    written = healing.written_tokens(limit)
    return estimate_healing(work, healing.tokens, healing.train, length, torch.get_num_threads(), written)


def _host_memory(resolved: ResolvedConversion, after: dict[str, int]) -> HostMemory:
    """Peak host memory of a conversion on a CPU, and the moment of the peak."""
    source = resolved.source
    layers, first = f"{source.family.layers}.", source.first_layer
    moments = sizing.peak_host_bytes(
        table=max(count for name, count in after.items() if not name.startswith(layers)),
        layer=prefixed(after, first),
        attention=prefixed(after, f"{first}{source.family.attention}."),
        hidden=resolved.plan.shape.hidden_size,
        itemsize=4 if source.gguf else resolved.dtype.itemsize,  # dequantised tensors are float32
        calibration_tokens=prod(resolved.calibration),
        evaluation_tokens=prod(resolved.evaluation),
    )
    largest = max(moments, key=moments.__getitem__)
    return HostMemory(moments[largest], largest, sizing.HOST_BASIS)


def print_plan(plan: DryRun, console: Console) -> None:
    """Print the sections of a dry run, one after another."""
    for section in plan.sections:
        for part in section.rows():
            if isinstance(part, str):
                console.print(part, highlight=False, soft_wrap=True, markup=False)
            else:
                console.print(part)

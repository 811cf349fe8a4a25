"""The sections of a dry run: what each holds, and the tables and lines that show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rich.table import Table

from mla_convert.core.units import duration, human_bytes
from mla_convert.method.factorise.sizes import Plan
from mla_convert.pipeline.estimate import memory as sizing
from mla_convert.pipeline.estimate import time as timing
from mla_convert.pipeline.estimate.heal import HealEstimate
from mla_convert.report.format import latent_words

Parts = Iterator[Table | str]


class Section(Protocol):
    """A part of a dry run."""

    def rows(self) -> Parts:
        """Tables and lines to print, in order."""
        ...


@dataclass(frozen=True)
class SourceSection:
    """The source and the shape of its attention."""

    name: str
    revision: str | None
    model_type: str
    shape: dict[str, int]
    dtype: str

    def rows(self) -> Parts:
        """One line."""
        shape = self.shape
        attention, layers = shape["attention_layers"], shape["layers"]
        hybrid = f" ({attention} with attention)" if attention < layers else ""
        yield (
            f"{self.name}: {self.model_type}, {layers} layers{hybrid}, {shape['attention_heads']} heads of "
            f"{shape['head_dim']}, {shape['key_value_heads']} for keys and values, {self.dtype}"
        )


@dataclass(frozen=True)
class CacheSection:
    """Sizes of the latents, and bytes of the cache at several contexts and batches; `uniform` is False where they are means."""

    plan: Plan
    uniform: bool
    section: dict[str, Any]  # as report.json holds it
    sizes: dict[str, sizing.CacheSize]
    parameters: dict[str, dict[str, int]]

    @property
    def grid(self) -> list[dict[str, int]]:
        """Bytes before and after for every context and batch."""
        return [
            {
                "context": context,
                "batch": batch,
                **{side: size.growing(context, batch) for side, size in self.sizes.items()},
            }
            for context in sizing.CONTEXTS
            for batch in sizing.BATCHES
        ]

    def rows(self) -> Parts:
        """A table of cache and parameters, and one of the cache at several contexts."""
        rank, rope, exact = self.section["kv_lora_rank"], self.section["qk_rope_head_dim"], self.plan.exact
        cached = latent_words(self.section.get("latent_cache"))
        spread = "in every layer" if self.uniform else "on average: layers that lose more get more"
        heads = f", heads of {self.plan.nope_dim} content dims" if self.plan.nope_dim else ""
        table = _table(f"→ MLA, rank {rank} + {rope} rotary {spread}{cached}{heads}{', exact' if exact else ''}")
        _compare(table, "cache numbers per token and layer", self.section["numbers_per_token_per_layer"], str)
        _compare(table, "cache per token", self.section["bytes_per_token"], human_bytes)
        _compare(table, "parameters of attention", self.parameters["attention"], _count)
        _compare(table, "parameters of the model", self.parameters["model"], _count)
        yield table
        grid = Table(title="KV cache, before → after", title_justify="left")
        grid.add_column("context")
        for batch in sizing.BATCHES:
            grid.add_column(f"batch {batch}", justify="right")
        for context in sizing.CONTEXTS:
            cells = [cell for cell in self.grid if cell["context"] == context]
            pairs = [f"{human_bytes(cell['before'])} → {human_bytes(cell['after'])}" for cell in cells]
            grid.add_row(_context(context), *pairs)
        yield grid
        if "fixed_bytes" in self.section:
            shares = self.section["growing_share_at_context"].items()
            grows = ", ".join(f"{_context(int(at))} {of['before']:.1%} → {of['after']:.1%}" for at, of in shares)
            yield (
                f"beside it, other layers hold {human_bytes(self.section['fixed_bytes'])} a sequence, whatever its length; "
                f"share of the whole that grows: {grows}"
            )


@dataclass(frozen=True)
class CardFit:
    """Bytes of a model's weights, and the largest batches and contexts that fit beside them."""

    weights_bytes: int
    largest_batch_at_context: dict[str, int]
    largest_context_at_batch: dict[str, int]


@dataclass(frozen=True)
class HostMemory:
    """Peak host memory in bytes, its moment and what that is based on."""

    bytes: int
    moment: str
    basis: str


@dataclass(frozen=True)
class CardSection:
    """Batches and contexts that fit a card's memory beside the weights."""

    name: str | None
    bytes: int
    usable_bytes: int
    context_limit: int
    before: CardFit
    after: CardFit

    def rows(self) -> Parts:
        """A table, and the model's own limit."""
        name = f"{self.name}, " if self.name else ""
        table = _table(
            f"{name}{human_bytes(self.bytes)}, of which {sizing.USABLE:.0%} for weights and cache", change=False
        )
        before, after, limit = self.before, self.after, self.context_limit
        table.add_row("weights", human_bytes(before.weights_bytes), human_bytes(after.weights_bytes))
        beyond = False
        for context, batch in before.largest_batch_at_context.items():
            star = " *" if int(context) > limit else ""
            beyond |= bool(star)
            label = f"largest batch, {_context(int(context))} context{star}"
            table.add_row(label, str(batch), str(after.largest_batch_at_context[context]))
        for size_of_batch, longest in before.largest_context_at_batch.items():
            row = [_limited(size, limit) for size in (longest, after.largest_context_at_batch[size_of_batch])]
            table.add_row(f"longest context, batch {size_of_batch}", *row)
        yield table
        yield f"the model's own limit is {limit} tokens{' (*)' if beyond else ''}"


@dataclass(frozen=True)
class RunSection:
    """Disk, memory and time of the conversion."""

    disk_bytes: int
    scratch_bytes: int
    memory: HostMemory
    time: dict[str, timing.TimeEstimate]
    budget: dict[str, str]

    def rows(self) -> Parts:
        """One line each."""
        scratch = f"; {human_bytes(self.scratch_bytes)} more while it runs" if self.scratch_bytes else ""
        yield f"disk: {human_bytes(self.disk_bytes)} of weights, and the tokenizer's files{scratch}"
        memory = self.memory
        yield f"peak memory: about {human_bytes(memory.bytes)}, for {memory.moment} ({memory.basis})"
        for place, where in _places(self.time["cpu"].cores):
            yield f"time: {_range(self.time[place].seconds)} {where} ({self.time[place].basis})"
            if place in self.budget:
                yield self.budget[place]


@dataclass(frozen=True)
class GpuCount:
    """A conversion on some number of GPUs: a range of seconds, and bytes of each card and in each process."""

    gpus: int
    seconds: tuple[float, float]
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class GpusSection:
    """Time and memory of the conversion on several GPUs of one host."""

    counts: list[GpuCount]

    def rows(self) -> Parts:
        """A table, and what it is based on."""
        table = Table(title="On several H100s, one process each", title_justify="left")
        for column in ("GPUs", "time", "memory of a card", "host memory of a process"):
            table.add_column(column, justify="right")
        for each in self.counts:
            memory = human_bytes(each.device_bytes), human_bytes(each.host_bytes)
            table.add_row(str(each.gpus), _range(each.seconds), *memory)
        yield table
        yield f"time as above; memory: {sizing.GPUS_BASIS}"


@dataclass(frozen=True)
class HealSection:
    """Memory and time of the healing run that follows."""

    estimate: HealEstimate
    cores: int

    def rows(self) -> Parts:
        """A line for each device, and what the memory is made of."""
        heal = self.estimate
        task = f"healing, {heal.tokens:,} tokens, {heal.train} trained"
        if heal.written_tokens:
            task += f", {heal.written_tokens:,} generated by the original"
        for place, where in _places(self.cores):
            run = heal.places[place]
            memory = human_bytes(run.memory_bytes)
            yield f"{task}: {_range(run.seconds)} and about {memory} {where} ({run.basis})"
        yield f"memory of healing: {heal.memory_basis}"


@dataclass(frozen=True)
class Warnings:
    """Properties of the plan that its user may not have meant."""

    lines: list[str]

    def rows(self) -> Parts:
        """One line each."""
        for line in self.lines:
            yield f"warning: {line}"


@dataclass(frozen=True)
class Advice:
    """Advice from measured conversions of other models."""

    lines: list[str]

    def rows(self) -> Parts:
        """One line each."""
        for line in self.lines:
            yield f"advice: {line}"


def _places(cores: int | None) -> list[tuple[str, str]]:
    """The devices of the estimates, and how lines name them."""
    return [("cpu", f"on {cores} of these cores"), ("h100", "on an H100")]


def _range(seconds: tuple[float, float]) -> str:
    low, high = map(duration, seconds)
    return f"{low} to {high}"


def _table(title: str, change: bool = True) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("before", "after", *(("change",) if change else ())):
        table.add_column(column, justify="right")
    return table


def _compare(table: Table, label: str, sizes: dict[str, int], shown: Any) -> None:
    before, after = sizes["before"], sizes["after"]
    table.add_row(label, shown(before), shown(after), f"{after / before - 1:+.1%}")


def _count(number: int) -> str:
    """1234567 -> '1.23 M'."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _context(tokens: int) -> str:
    return f"{tokens // 1024}k"


def _limited(tokens: int, limit: int) -> str:
    return f"{tokens} (limit)" if tokens == limit else str(tokens)

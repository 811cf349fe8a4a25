"""`plan`: what a conversion would give and take, from the configuration alone."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from mla_convert.core.settings import ConvertConfig
from mla_convert.core.units import duration, human_bytes
from mla_convert.evaluate.quality.suite import suite_size
from mla_convert.heal.settings import HealSettings
from mla_convert.method.factorise.layer import mla_config
from mla_convert.method.factorise.sensitivity import TOKENS, is_measured, scratch_bytes
from mla_convert.method.factorise.sizes import Plan, make_plan, shares_out
from mla_convert.method.refine.schedule import output_advances, refine_settings
from mla_convert.pipeline.estimate import memory as sizing
from mla_convert.pipeline.estimate import time as timing
from mla_convert.pipeline.estimate.heal import HealWork, estimate
from mla_convert.publish.engines.target_engine import apply_constraints
from mla_convert.report.report import cache_section
from mla_convert.source.source import Source, open_source, parameters
from mla_convert.source.texts import Reach, calibration_size, evaluation_length, reach

LIMIT = 1 << 20  # longest context looked for where the model names none


def plan_conversion(config: ConvertConfig, card_bytes: int | None = None, card: str | None = None) -> dict[str, Any]:
    """Sizes before and after, as `plan --json` prints them; bytes and parameters are exact for unquantised weights.

    `card_bytes` is the memory of a card to fit model and cache into, `card` its name.

    Raises:
        InputError: no such source, or sizes that it cannot have.
        ResourceError: the Hub cannot be reached.
    """
    source = open_source(config.source, config.revision, weights=False)
    config = apply_constraints(config, source)
    plan = make_plan(config, source.shape)
    dtype = source.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    windows = source.sliding_windows
    before = {name: prod(source.reader.shape(name)) for name in source.reader.names()}
    after = _converted_parameters(source, plan, dtype)
    counts = {side: _counts(source, numbers) for side, numbers in (("before", before), ("after", after))}
    weights = {side: counted["model"] * dtype.itemsize for side, counted in counts.items()}
    caches = {
        "before": sizing.CacheSize(plan.shape.cache_width, dtype.itemsize, tuple(windows)),
        "after": sizing.CacheSize(plan.cache_width, dtype.itemsize, tuple(windows)),
    }
    uniform = not shares_out(config, plan)
    result = {
        "source": {"name": source.name, "revision": source.revision, "model_type": source.config.model_type},
        "shape": shape_figures(source),
        "dtype": str(dtype).removeprefix("torch."),
        "exact": plan.exact,
        "layers": [
            {"layer": layer, "kv_lora_rank": size.rank, "qk_rope_head_dim": size.rope_dim}
            for layer, size in enumerate(plan.layers)
        ],
        # otherwise these are means, which the conversion shares out by what it measures
        "uniform": uniform,
        "cache": {
            **cache_section(plan, dtype.itemsize, windows),
            "grid": [
                {"context": context, "batch": batch, **{side: cache.bytes(context, batch) for side, cache in caches.items()}}
                for context in sizing.CONTEXTS
                for batch in sizing.BATCHES
            ],
        },
        "parameters": {key: {side: counted[key] for side, counted in counts.items()} for key in ("attention", "model")},
        # beside the weights each layer names its rotary planes (int64)
        "disk_bytes": weights["after"] + sum(size.rope_dim // 2 for size in plan.layers) * 8,
        "disk_aside_bytes": scratch_bytes(plan) if is_measured(plan, config) else 0,
        "peak_host_memory": _host_memory(config, source, plan, after, dtype.itemsize),
        "time": _time(config, source, plan, before, after),
        "warnings": [*source.notes, *sizing.warnings(plan)],
    }  # fmt: skip
    if config.heal_tokens:
        result["heal"] = _healing(config, source, plan, after)
    if card_bytes is not None:
        limit = getattr(source.config, "max_position_embeddings", None) or LIMIT
        usable = int(card_bytes * sizing.USABLE)
        result["card"] = {
            "name": card,
            "bytes": card_bytes,
            "usable_bytes": usable,
            "context_limit": limit,
            **{
                side: {"weights_bytes": weights[side], **sizing.fit(usable - weights[side], cache, limit)}
                for side, cache in caches.items()
            },
        }
    return result


def shape_figures(source: Source) -> dict[str, Any]:
    """Shape of a source's attention, for JSON."""
    shape = source.shape
    return {
        "layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "attention_heads": shape.num_heads,
        "key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "key_value_bias": shape.has_kv_bias,
    }


def _converted_parameters(source: Source, plan: Plan, dtype: torch.dtype) -> dict[str, int]:
    """Numbers of each parameter of the converted model."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(mla_config(source, plan, dtype), dtype=dtype)
    return {name: parameter.numel() for name, parameter in parameters(model).items()}


def _counts(source: Source, numbers: dict[str, int]) -> dict[str, int]:
    """Parameters of attention and of the whole model."""
    attention = f".{source.family.attention}."
    return {
        "attention": sum(count for name, count in numbers.items() if attention in name),
        "model": sum(numbers.values()),
    }


def _evaluation_windows(config: ConvertConfig, source: Source, on_gpu: bool) -> tuple[int, int]:
    """Windows that perplexity is measured on and tokens in one; those of the packaged suite count by their tokens."""
    length = evaluation_length(config, _reach(source))
    return config.eval_windows + -(-prod(suite_size(config, on_gpu, length)) // length), length


def _reach(source: Source) -> Reach:
    return reach(source.config, learned=not source.family.rotary)


def _time(
    config: ConvertConfig, source: Source, plan: Plan, before: dict[str, int], after: dict[str, int]
) -> dict[str, Any]:
    """A range of seconds on this machine's cores and on an H100, each with the settings it would run with."""
    layer = f"{source.family.layers}.0."
    attention = f"{layer}{source.family.attention}."

    def numbers(side: dict[str, int], prefix: str) -> int:
        return sum(count for name, count in side.items() if name.startswith(prefix))

    shape = plan.shape
    work = timing.LayerWork(
        hidden=shape.hidden_size,
        layer_before=numbers(before, layer),
        layer_after=numbers(after, layer),
        attention_before=numbers(before, attention),
        attention_after=numbers(after, attention),
        mixing_before=shape.num_heads * 2 * shape.head_dim,
        mixing_after=shape.num_heads * (plan.qk_nope_head_dim + plan.rope_dim + shape.head_dim),
        head=shape.hidden_size * source.config.vocab_size,
    )
    windows = {}
    for place, device in (("cpu", torch.device("cpu")), ("h100", torch.device("cuda"))):
        evaluation = _evaluation_windows(config, source, device.type == "cuda")
        calib = calibration_size(config, device.type == "cuda", shape.hidden_size, _reach(source))
        refine = refine_settings(config, device, calib, shape.hidden_size, work.layer_before)
        last = output_advances(refine, shape.layers) / shape.layers  # of the last block's layers, by layer
        windows[place] = {"calib": calib, "evaluation": evaluation, "steps": refine.steps,
                          "block_steps": refine.block_steps + last, "output_steps": refine.output_steps / shape.layers,
                          "batch": refine.batch, "measured": TOKENS[device.type] * is_measured(plan, config)}  # fmt: skip
    return timing.estimate(work, shape.layers, windows, torch.get_num_threads())


def _healing(config: ConvertConfig, source: Source, plan: Plan, after: dict[str, int]) -> dict[str, Any]:
    """Memory and time of healing the conversion as its settings say."""
    shape, limit = plan.shape, getattr(source.config, "max_position_embeddings", None)
    given = {"length": config.heal_length, "self_share": config.heal_self_share}
    healing = HealSettings(
        tokens=config.heal_tokens, **{key: value for key, value in given.items() if value is not None}
    )
    tied = getattr(source.config, "tie_word_embeddings", False)
    experts = getattr(source.config, "num_experts_per_tok", None) or 1
    inner = getattr(source.config, "moe_intermediate_size", None) or getattr(source.config, "intermediate_size", None)
    work = HealWork(
        weights=sum(after.values()),
        attention=_counts(source, after)["attention"],
        looked_up=0 if tied else shape.hidden_size * source.config.vocab_size,
        layers=shape.layers,
        hidden=shape.hidden_size,
        intermediate=experts * (inner or 4 * shape.hidden_size),
        mixing_before=shape.num_heads * 2 * shape.head_dim,
        mixing_after=shape.num_heads * (plan.qk_nope_head_dim + plan.rope_dim + shape.head_dim),
    )
    train = config.heal_train or healing.train
    return estimate(
        work, config.heal_tokens, train, max(each for each, _ in healing.mix(limit)), torch.get_num_threads(),
        healing.written_tokens(limit),
    )  # fmt: skip


def _host_memory(
    config: ConvertConfig, source: Source, plan: Plan, after: dict[str, int], itemsize: int
) -> dict[str, Any]:
    first = f"{source.family.layers}.0."
    moments = sizing.peak_host_bytes(
        table=max(count for name, count in after.items() if not name.startswith(f"{source.family.layers}.")),
        layer=sum(count for name, count in after.items() if name.startswith(first)),
        attention=sum(count for name, count in after.items() if name.startswith(f"{first}{source.family.attention}.")),
        hidden=plan.shape.hidden_size,
        itemsize=itemsize,
        calibration_tokens=prod(calibration_size(config, False, plan.shape.hidden_size, _reach(source))),
        evaluation_tokens=prod(_evaluation_windows(config, source, False)),
    )
    if source.gguf:  # transformers holds these whole, in float32
        moments = {moment: size + 4 * sum(after.values()) for moment, size in moments.items()}
    largest = max(moments, key=moments.__getitem__)
    whole = "; on top of it comes the whole model in float32, as GGUF is read" if source.gguf else ""
    return {"bytes": moments[largest], "moment": largest, "basis": sizing.HOST_BASIS + whole}


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """The plan as tables and a few lines."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    shape, cache, source = plan["shape"], plan["cache"], plan["source"]
    line(
        f"{source['name']}: {source['model_type']}, {shape['layers']} layers, {shape['attention_heads']} heads of "
        f"{shape['head_dim']}, {shape['key_value_heads']} for keys and values, {plan['dtype']}"
    )
    rank, rope = cache["kv_lora_rank"], cache["qk_rope_head_dim"]
    spread = "in every layer" if plan["uniform"] else "on average: layers that lose more get more"
    table = _table(f"→ MLA, rank {rank} + {rope} rotary {spread}{', exact' if plan['exact'] else ''}")
    _compare(table, "cache numbers per token and layer", cache["numbers_per_token_per_layer"], str)
    _compare(table, "cache per token", cache["bytes_per_token"], human_bytes)
    for what, numbers in plan["parameters"].items():
        _compare(table, f"parameters of {'attention' if what == 'attention' else 'the model'}", numbers, _count)
    console.print(table)

    grid = Table(title="KV cache, before → after", title_justify="left")
    grid.add_column("context")
    for batch in sizing.BATCHES:
        grid.add_column(f"batch {batch}", justify="right")
    sizes = {(entry["context"], entry["batch"]): entry for entry in cache["grid"]}
    for context in sizing.CONTEXTS:
        cells = [sizes[context, batch] for batch in sizing.BATCHES]
        pairs = [f"{human_bytes(cell['before'])} → {human_bytes(cell['after'])}" for cell in cells]
        grid.add_row(_context(context), *pairs)
    console.print(grid)

    if "card" in plan:
        _print_card(plan["card"], console)
    memory = plan["peak_host_memory"]
    aside = f"; {human_bytes(plan['disk_aside_bytes'])} more while it runs" if plan["disk_aside_bytes"] else ""
    line(f"disk: {human_bytes(plan['disk_bytes'])} of weights, and the tokenizer's files{aside}")
    line(f"peak memory: about {human_bytes(memory['bytes'])}, for {memory['moment']} ({memory['basis']})")
    for place, where in (("cpu", f"on {plan['time']['cpu']['cores']} of these cores"), ("h100", "on an H100")):
        low, high = (duration(seconds) for seconds in plan["time"][place]["seconds"])
        line(f"time: {low} to {high} {where} ({plan['time'][place]['basis']})")
    if heal := plan.get("heal"):
        what = f"healing, {heal['tokens']:,} tokens, {heal['train']} trained"
        if written := heal["written_tokens"]:
            what += f", {written:,} written by the original"
        for place, where in (("cpu", f"on {plan['time']['cpu']['cores']} of these cores"), ("h100", "on an H100")):
            low, high = (duration(seconds) for seconds in heal[place]["seconds"])
            memory = human_bytes(heal[place]["memory_bytes"])
            line(f"{what}: {low} to {high} and about {memory} {where} ({heal[place]['basis']})")
        line(f"memory of healing: {heal['memory_basis']}")
    for warning in plan["warnings"]:
        line(f"warning: {warning}")


def _print_card(card: dict[str, Any], console: Console) -> None:
    name = f"{card['name']}, " if card["name"] else ""
    table = _table(
        f"{name}{human_bytes(card['bytes'])}, of which {sizing.USABLE:.0%} for weights and cache", change=False
    )
    before, after = card["before"], card["after"]
    table.add_row("weights", human_bytes(before["weights_bytes"]), human_bytes(after["weights_bytes"]))
    for context, batch in before["largest_batch_at_context"].items():
        name = f"largest batch, {_context(int(context))} context"
        if int(context) > card["context_limit"]:
            name += " *"
        table.add_row(name, str(batch), str(after["largest_batch_at_context"][context]))
    for batch, context in before["largest_context_at_batch"].items():
        row = [_limited(size, card["context_limit"]) for size in (context, after["largest_context_at_batch"][batch])]
        table.add_row(f"longest context, batch {batch}", *row)
    console.print(table)
    limit = card["context_limit"]
    star = " (*)" if any(int(context) > limit for context in before["largest_batch_at_context"]) else ""
    console.print(f"the model's own limit is {limit} tokens{star}", highlight=False, soft_wrap=True, markup=False)


def _table(title: str, change: bool = True) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("before", "after", *(("change",) if change else ())):
        table.add_column(column, justify="right")
    return table


def _compare(table: Table, what: str, sizes: dict[str, int], shown: Any) -> None:
    before, after = sizes["before"], sizes["after"]
    table.add_row(what, shown(before), shown(after), f"{after / before - 1:+.1%}")


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

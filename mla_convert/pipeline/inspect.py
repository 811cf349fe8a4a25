"""`inspect`: what a checkpoint is and whether it can be converted, or what a converted one has become."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.files import read_regular
from mla_convert.core.report_file import mean
from mla_convert.core.report_schema import JsonObject, parse_report, to_json
from mla_convert.core.units import human_bytes
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.pipeline.dry_run import shape_figures
from mla_convert.source.config_file import check_sizes
from mla_convert.source.place import locate
from mla_convert.source.source import Source, open_source
from mla_convert.write.writer import REPORT

LOADED = "every tensor is there, in the shape and a dtype that the conversion reads; the tokenizer loads"
CONFIG_ONLY = "judged by its configuration alone: no weights were read"


def inspect_checkpoint(name: str, revision: str | None = None) -> JsonObject:
    """What stands at `name` (folder, Hub id, `.gguf` file, packaged checkpoint), as `inspect --json` prints it.

    Of a local folder the tensors' headers are read and compared with the configuration; of a Hub id and of a GGUF file
    only the configuration.

    Raises:
        InputError: it cannot be converted, and why; or there is no such checkpoint.
        ResourceError: the Hub cannot be reached.
    """
    place = locate(name, revision, ["config.json", REPORT])
    content = {} if place.gguf else _json(place.folder / "config.json")
    if str(content.get("model_type", "")).startswith("mla_"):
        check_sizes(content, place.label)
        return _converted(place.label, place.revision, content, _json(place.folder / REPORT))
    local = not place.gguf and place.revision is None
    source = open_source(name, revision, weights=False)
    if local:
        source = open_source(name, weights=True)
        for tensor in source.reader.names():
            source.reader.dtype(tensor)  # refuses what is quantised
        LayerwiseModel(source, torch.device("cpu"))  # refuses missing and misshapen tensors
        source.tokenizer()
        source.copied_files()  # refuses links to what is not the checkpoint's
    return _source(source, "; ".join([LOADED if local else CONFIG_ONLY, *source.notes]))


def _json(path: Path) -> JsonObject:
    """A JSON object, or an empty one where there is no such file or it is something else."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _source(source: Source, basis: str) -> JsonObject:
    shape, config = source.shape, source.config
    windows = [window for window in source.sliding_windows if window]
    tied = config.tie_word_embeddings
    stored = {name for name in source.reader.names() if not (tied and name == "lm_head.weight")}
    first = f"{source.family.layers}.0."
    return {
        "name": source.name,
        "revision": source.revision,
        "kind": "source",
        "convertible": True,
        "basis": basis,
        "model_type": config.model_type,
        "shape": shape_figures(source),
        "rope": _rope(config) if source.family.rotary else None,
        "sliding_window": {"tokens": windows[0], "layers": len(windows)} if windows else None,
        "biases": sorted(
            name.removeprefix(first).removesuffix(".bias")
            for name in stored
            if name.startswith(first) and name.endswith(".bias")
        ),
        "context_limit": getattr(config, "max_position_embeddings", None),
        "vocabulary": config.vocab_size,
        "dtype": str(source.dtype).removeprefix("torch."),
        "tied_embeddings": tied,
        "parameters": sum(prod(source.reader.shape(name)) for name in stored),
        "cache_bytes_per_token": shape.layers * shape.cache_width * source.dtype.itemsize,
    }


def _rope(config: Any) -> JsonObject:
    """RoPE's settings; where layers differ, those of full attention, and all of them by type of layer."""
    parameters = dict(config.rope_parameters or {})
    by_type = {kind: dict(own) for kind, own in parameters.items() if isinstance(own, dict)}
    main = dict(by_type.get("full_attention", {})) if by_type else parameters
    found = {"type": main.pop("rope_type", "default"), "base": main.pop("rope_theta", None), "scaling": main}
    return {**found, "by_layer_type": by_type} if by_type else found


def _converted(label: str, revision: str | None, config: JsonObject, report: JsonObject) -> JsonObject:
    try:
        layers = config["num_hidden_layers"]
        # where layers differ there is a list beside the largest
        sizes = [config.get(f"{name}s") or [config[name]] * layers for name in ("kv_lora_rank", "qk_rope_head_dim")]
        if not (layers == len(sizes[0]) == len(sizes[1])) or not all(
            type(size) is int for each in sizes for size in each
        ):
            raise ValueError("sizes that are not a whole number for each layer")
        return {
            "name": label,
            "revision": revision,
            "kind": "converted",
            "convertible": False,
            "model_type": config["model_type"],
            "layers": layers,
            "kv_lora_rank": mean(sizes[0]),
            "qk_rope_head_dim": mean(sizes[1]),
            "cache_numbers_per_token_per_layer": mean(map(int.__add__, *sizes)),
            "dtype": str(config.get("dtype") or "float32"),
            "report": _reported(report),
        }
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"config.json of {label} lacks what a converted model has ({one_line(error)})") from error


def _reported(content: JsonObject) -> JsonObject | None:
    """What a report says, or None where it is not whole: what the configuration says stands."""
    try:
        report = parse_report(content)
    except InputError:
        return None
    evaluation, version = report.measured, report.versions.get("mla_convert")
    if version is None:
        return None
    return to_json({
        "source": report.source.name,
        "source_revision": report.source.revision,
        "share_saved": report.cache.share_saved,
        "cache_bytes_per_token": report.cache.bytes_per_token,
        "perplexity": {side: evaluation and evaluation[side].value for side in ("before", "after")},
        "perplexity_ratio": report.perplexity_ratio,
        "evaluation": evaluation and f"{evaluation.text}: {evaluation.protocol}",
        "calibration": report.calibration.protocol,
        "converted_by": f"mla_convert {version}",
    })  # fmt: skip


def print_inspection(found: JsonObject, console: Console) -> None:
    """The findings in rows, the verdict last."""
    table = Table(title=found["name"], title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for what, value in (_converted_rows if found["kind"] == "converted" else _source_rows)(found):
        table.add_row(what, value)
    console.print(table)
    if found["kind"] == "source":
        verdict = f"can be converted: {found['basis']}"
    elif found["report"]:
        verdict = "converted already; the figures are those of its report.json"
    else:
        verdict = f"converted already; it has no complete {REPORT}"
    console.print(verdict, highlight=False, soft_wrap=True, markup=False)


def _source_rows(found: JsonObject) -> list[tuple[str, str]]:
    shape, rope, window = found["shape"], found["rope"], found["sliding_window"]
    turned = "none"
    if rope:
        scaling = "".join(f", {key} {value}" for key, value in rope["scaling"].items())
        others = (kind for kind in rope.get("by_layer_type", {}) if kind != "full_attention")
        bases = "".join(f"; {kind}: base {rope['by_layer_type'][kind].get('rope_theta')}" for kind in others)
        turned = f"{rope['type']}, base {rope['base']}{scaling}{bases}"
    windowed = f"{window['tokens']} tokens in {window['layers']} of {shape['layers']} layers" if window else "none"
    return [
        ("family", found["model_type"]),
        ("layers", str(shape["layers"])),
        ("hidden size", str(shape["hidden_size"])),
        ("heads", f"{shape['attention_heads']} of {shape['head_dim']}, {shape['key_value_heads']} for keys and values"),
        ("RoPE", turned),
        ("sliding window", windowed),
        ("biases", ", ".join(found["biases"]) or "none"),
        ("longest context", str(found["context_limit"])),
        ("parameters", f"{found['parameters']:,}, {found['dtype']}"),
        ("head", "tied to the embeddings" if found["tied_embeddings"] else "its own"),
        ("KV cache per token", human_bytes(found["cache_bytes_per_token"])),
    ]


def _converted_rows(found: JsonObject) -> list[tuple[str, str]]:
    rows = [
        ("family", found["model_type"]),
        ("layers", str(found["layers"])),
        ("rank", f"{found['kv_lora_rank']} + {found['qk_rope_head_dim']} rotary, {found['dtype']}"),
    ]
    report = found["report"]
    if not report:
        return rows
    cache, perplexity = report["cache_bytes_per_token"], report["perplexity"]
    revision = f" at {report['source_revision']}" if report["source_revision"] else ""
    words = "not evaluated"
    if report["evaluation"]:
        values = [_figure(perplexity["before"]), _figure(perplexity["after"])]
        words = f"{values[0]} → {values[1]} (×{_figure(report['perplexity_ratio'], 4)})"
    return [
        *rows,
        ("source", f"{report['source']}{revision}"),
        ("KV cache per token", f"{human_bytes(cache['before'])} → {human_bytes(cache['after'])}"),
        ("saved", f"{report['share_saved']:.1%}"),
        ("perplexity", words),
        *([("measured on", report["evaluation"])] if report["evaluation"] else []),
        ("calibrated on", report["calibration"]),
        ("by", report["converted_by"]),
    ]


def _figure(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"

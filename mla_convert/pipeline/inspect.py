"""`inspect`: properties of a checkpoint and whether it can be converted, or those of a converted folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
from mla_convert.modeling.fixed_states import fixed_state_bytes
from mla_convert.pipeline.dry_run import shape_section
from mla_convert.source.config_file import check_sizes, language_model
from mla_convert.source.place import locate
from mla_convert.source.source import Source, open_source
from mla_convert.write.writer import REPORT

LOADED = "every tensor is there, in the shape and a dtype that the conversion reads; the tokenizer loads"
CONFIG_ONLY = "judged by its configuration alone: no weights were read"

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class SourceFindings:
    """Properties of a checkpoint that can be converted; `basis` says how that was judged."""

    name: str
    revision: str | None
    basis: str
    model_type: str
    shape: dict[str, int]
    rope: dict[str, Any] | None
    sliding_window: dict[str, int] | None
    biases: list[str]
    context_limit: int | None
    vocabulary: int
    dtype: str
    tied_embeddings: bool
    parameters: int
    cache_bytes_per_token: int
    fixed_cache_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """As `inspect --json` prints it."""
        return {**asdict(self), "kind": "source", "convertible": True}

    @property
    def verdict(self) -> str:
        """Whether it can be converted."""
        return f"can be converted: {self.basis}"

    def rows(self) -> Rows:
        """The rows of the table."""
        shape, window = self.shape, self.sliding_window
        windowed = f"{window['tokens']} tokens in {window['layers']} of {shape['layers']} layers" if window else "none"
        attention = shape["attention_layers"]
        hybrid = f", {attention} of them with attention" if attention < shape["layers"] else ""
        fixed = f", and {human_bytes(self.fixed_cache_bytes)} that do not grow" if self.fixed_cache_bytes else ""
        heads = f"{shape['attention_heads']} of {shape['head_dim']}, {shape['key_value_heads']} for keys and values"
        return [
            ("family", self.model_type),
            ("layers", f"{shape['layers']}{hybrid}"),
            ("hidden size", str(shape["hidden_size"])),
            ("heads", heads),
            ("RoPE", self._rope_words()),
            ("sliding window", windowed),
            ("biases", ", ".join(self.biases) or "none"),
            ("longest context", str(self.context_limit)),
            ("parameters", f"{self.parameters:,}, {self.dtype}"),
            ("head", "tied to the embeddings" if self.tied_embeddings else "its own"),
            ("KV cache per token", f"{human_bytes(self.cache_bytes_per_token)}{fixed}"),
        ]

    def _rope_words(self) -> str:
        if not self.rope:
            return "none"
        scaling = "".join(f", {key} {value}" for key, value in self.rope["scaling"].items())
        kinds = self.rope.get("by_layer_type", {})
        bases = "".join(
            f"; {kind}: base {own.get('rope_theta')}" for kind, own in kinds.items() if kind != "full_attention"
        )
        return f"{self.rope['type']}, base {self.rope['base']}{scaling}{bases}"


@dataclass(frozen=True)
class ReportFindings:
    """The results in the report of a converted folder. Values that were not measured, or are not finite, are None."""

    source: str
    source_revision: str | None
    share_saved: float
    cache_bytes_per_token: dict[str, float]
    perplexity: dict[str, float | None]
    perplexity_ratio: float | None
    evaluation: str | None
    calibration: str
    converted_by: str

    def rows(self) -> Rows:
        """The rows of the table."""
        cache, perplexity = self.cache_bytes_per_token, self.perplexity
        revision = f" at {self.source_revision}" if self.source_revision else ""
        words = "not evaluated"
        if self.evaluation:
            values = [_value_words(perplexity["before"]), _value_words(perplexity["after"])]
            words = f"{values[0]} → {values[1]} (×{_value_words(self.perplexity_ratio, 4)})"
        return [
            ("source", f"{self.source}{revision}"),
            ("KV cache per token", f"{human_bytes(cache['before'])} → {human_bytes(cache['after'])}"),
            ("saved", f"{self.share_saved:.1%}"),
            ("perplexity", words),
            *([("measured on", self.evaluation)] if self.evaluation else []),
            ("calibrated on", self.calibration),
            ("by", self.converted_by),
        ]


@dataclass(frozen=True)
class ConvertedFindings:
    """Sizes of a converted folder by its configuration, and the results in its report; None if that is not complete."""

    name: str
    revision: str | None
    model_type: str
    layers: int
    kv_lora_rank: float
    qk_rope_head_dim: float
    cache_numbers_per_token_per_layer: float
    dtype: str
    report: ReportFindings | None
    latent_cache: JsonObject | None = None

    def as_dict(self) -> dict[str, Any]:
        """As `inspect --json` prints it."""
        return {**asdict(self), "kind": "converted", "convertible": False}

    @property
    def verdict(self) -> str:
        """That it is converted, and where the results come from."""
        if self.report:
            return "converted already; the results are those of its report.json"
        return f"converted already; it has no complete {REPORT}"

    def rows(self) -> Rows:
        """The rows of the table."""
        return [
            ("family", self.model_type),
            ("layers", str(self.layers)),
            ("rank", f"{self.kv_lora_rank} + {self.qk_rope_head_dim} rotary, {self.dtype}"),
            *([("cached latent", str(self.latent_cache.get("kind")))] if self.latent_cache else []),
            *(self.report.rows() if self.report else []),
        ]


Findings = SourceFindings | ConvertedFindings


def inspect_checkpoint(name: str, revision: str | None = None) -> Findings:
    """Properties of a checkpoint.

    Of a local folder the tensors' headers are read and compared with the configuration; of a Hub id and of a GGUF file only
    the configuration is read.

    Args:
        name: Folder, Hub id, `.gguf` file or packaged checkpoint.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        InputError: There is no such checkpoint, or it cannot be converted; the message says why.
        ResourceError: The Hub cannot be reached.
    """
    place = locate(name, revision, ["config.json", REPORT])
    content = {} if place.gguf else _json(place.folder / "config.json")
    # A converted folder is described by its own files: it is no source that could be opened.
    if str(content.get("model_type", "")).startswith("mla_"):
        check_sizes(content, place.label)
        return _converted(place.label, place.revision, content, _json(place.folder / REPORT))
    local = not place.gguf and place.revision is None
    source = open_source(name, revision, weights=False)
    if local:
        source = open_source(name, weights=True)
        for tensor in source.reader.names():
            source.reader.dtype(tensor)  # refuses quantised tensors
        LayerwiseModel(source, torch.device("cpu"))  # refuses missing and misshapen tensors
        source.tokenizer()
        source.copied_files()  # refuses links that lead out of the checkpoint
    return _source(source, "; ".join([LOADED if local else CONFIG_ONLY, *source.notes]))


def _json(path: Path) -> JsonObject:
    """A JSON object, or an empty one if the file does not exist or holds something else."""
    try:
        content = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _source(source: Source, basis: str) -> SourceFindings:
    shape, config = source.shape, source.config
    windows = [window for window in source.sliding_windows if window]
    tied = config.tie_word_embeddings
    stored = {name for name in source.reader.names() if not (tied and name == "lm_head.weight")}
    first = source.first_layer
    biases = (name for name in stored if name.startswith(first) and name.endswith(".bias"))
    return SourceFindings(
        name=source.name,
        revision=source.revision,
        basis=basis,
        model_type=config.model_type,
        shape=shape_section(source),
        rope=_rope(config) if any(shape.of(layer).full_rope_dim for layer in shape.converted_layers) else None,
        sliding_window={"tokens": windows[0], "layers": len(windows)} if windows else None,
        biases=sorted(name.removeprefix(first).removesuffix(".bias") for name in biases),
        context_limit=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        dtype=str(source.dtype).removeprefix("torch."),
        tied_embeddings=tied,
        parameters=sum(prod(source.reader.shape(name)) for name in stored),
        cache_bytes_per_token=sum(shape.cache_widths) * source.dtype.itemsize,
        fixed_cache_bytes=fixed_state_bytes(config, source.dtype),
    )


def _rope(config: Any) -> JsonObject:
    """Settings of RoPE; where layers differ, those of full attention, and all of them by type of layer."""
    stated = {
        "rope_theta": 10000.0,
        "rotary_dim": getattr(config, "rotary_dim", None),
    }  # GPT-J and CodeGen state no more
    parameters = dict(getattr(config, "rope_parameters", stated) or {})
    by_type = {kind: dict(own) for kind, own in parameters.items() if isinstance(own, dict)}
    main = dict(by_type.get("full_attention", {})) if by_type else parameters
    settings = {"type": main.pop("rope_type", "default"), "base": main.pop("rope_theta", None), "scaling": main}
    return {**settings, "by_layer_type": by_type} if by_type else settings


def _converted(label: str, revision: str | None, config: JsonObject, report: JsonObject) -> ConvertedFindings:
    try:
        config = {**config, **language_model(config), "model_type": config["model_type"]}
        stated = (config[name] for name in ("num_hidden_layers", "n_layer") if name in config)
        layers = next(stated, None) or len(config["layers_block_type"])
        # where layers differ there is a list beside the largest
        converted = config.get("mla_converted_layers") or range(layers)
        sources = config.get("mla_latent_of") or range(layers)
        converted = [layer for layer in converted if sources[layer] == layer]  # others cache nothing
        sizes = [config.get(f"{name}s") or [config[name]] * layers for name in ("kv_lora_rank", "qk_rope_head_dim")]
        # By `type`, because isinstance would take true and false of a damaged file for integers.
        if not isinstance(config.get("latent_cache") or {}, dict):
            raise ValueError("latent_cache is no object")
        if not (layers == len(sizes[0]) == len(sizes[1])) or not all(
            type(size) is int for each in sizes for size in each
        ):
            raise ValueError("sizes that are not a whole number for each layer")
        sizes = [[each[layer] for layer in converted] for each in sizes]
        return ConvertedFindings(
            name=label,
            revision=revision,
            model_type=config["model_type"],
            layers=len(converted),
            kv_lora_rank=mean(sizes[0]),
            qk_rope_head_dim=mean(sizes[1]),
            cache_numbers_per_token_per_layer=mean(map(int.__add__, *sizes)),
            dtype=str(config.get("dtype") or "float32"),
            report=_reported(report),
            latent_cache=config.get("latent_cache"),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"config.json of {label} lacks what a converted model has ({one_line(error)})") from error


def _reported(content: JsonObject) -> ReportFindings | None:
    """The results in a report; None if it is not complete."""
    try:
        report = parse_report(content)
    except InputError:
        return None
    evaluation, version = report.measured, report.versions.get("mla_convert")
    if version is None:
        return None
    per_token = report.cache.bytes_per_token
    return ReportFindings(
        source=report.source.name,
        source_revision=report.source.revision,
        share_saved=report.cache.share_saved,
        cache_bytes_per_token={"before": per_token.before, "after": per_token.after},
        perplexity=to_json({side: evaluation and evaluation[side].value for side in ("before", "after")}),
        perplexity_ratio=to_json(report.perplexity_ratio),
        evaluation=f"{evaluation.text}: {evaluation.protocol}" if evaluation else None,
        calibration=report.calibration.protocol,
        converted_by=f"mla_convert {version}",
    )


def print_inspection(findings: Findings, console: Console) -> None:
    """Print the findings in rows, the verdict last."""
    table = Table(title=findings.name, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in findings.rows():
        table.add_row(label, value)
    console.print(table)
    console.print(findings.verdict, highlight=False, soft_wrap=True, markup=False)


def _value_words(value: float | None, digits: int = 3) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"

"""Gives a converted folder another format of its cache: the latent in a basis of its own, folded into the projections."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.files import on_disk, write_file
from mla_convert.core.progress import Progress
from mla_convert.core.recipes import first_problem
from mla_convert.core.report_schema import CacheSection, EvaluationSection, Measurement, Report, SelfCheckSection
from mla_convert.core.runtime import pick_device
from mla_convert.core.settings import CacheDtype, Settings
from mla_convert.evaluate.quality.evaluation import Evaluation, evaluate_model
from mla_convert.heal.checks import open_converted
from mla_convert.heal.output import write_report, write_weights
from mla_convert.heal.teacher_student import attentions
from mla_convert.method.calibrate.latent_channels import channel_moments
from mla_convert.method.factorise.basis import Latent, query_factors, rope_factors
from mla_convert.method.factorise.sizes import CacheFormat, LayerSize, Plan, cache_format
from mla_convert.modeling.attention_mla import MlaAttention
from mla_convert.modeling.fixed_states import fixed_state_bytes
from mla_convert.modeling.latent_format_mla import VERSION, LatentFormat
from mla_convert.report.frontier import state_of
from mla_convert.report.report import cache_section
from mla_convert.source import mixture, texts
from mla_convert.source.config_file import language_model
from mla_convert.source.load_model import (
    check_same_sizes,
    find_model,
    find_original,
    is_converted,
    load_model,
    load_tokenizer,
    model_config,
)
from mla_convert.source.place import SourceLocation
from mla_convert.source.source import open_source
from mla_convert.source.windows import mixed_windows
from mla_convert.write import writer as output
from mla_convert.write.intact import check_input
from mla_convert.write.selfcheck import self_check

# "auto" chooses sizes too, which a converted model has.
FORMATS = [kind for kind in get_args(CacheDtype) if kind != "auto"]
# Windows on which the loss's gradient in the latents is measured, and their tokens.
WINDOWS, LENGTH = 16, 512
NOTE = (
    "the cache got its format after the conversion: errors of single layers and recipe.yaml are those of the conversion"
)


def quantise(
    folder: Path,
    cache_dtype: str,
    cache_group: int | None = None,
    cache_rope: str | None = None,
    out: Path | None = None,
    against: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Write a converted model with another `--cache-dtype`, measure it, and return its report.

    The latent's channels get a new basis by their second moments and by E[g^2] of the loss's gradient g in them, on packaged
    text. Without a cache format the model stays the same function to rounding.

    Args:
        folder: of a converted model.
        cache_dtype: "bf16", "fp8", "int8" or "int4".
        cache_group: channels that share a scale.
        cache_rope: of the rotary key: "bf16", "fp8" or "int8".
        out: folder to write; None replaces `folder`.
        against: the original; None: the one that the report names.
        device: where it runs.
        progress: takes notes.

    Raises:
        UsageError: no such format, or the original is not where the report says.
        InputError: no converted model, damaged, or it has no such row.
    """
    progress = progress or Progress()
    change, where = _change(folder, cache_dtype, cache_group, cache_rope, out, progress), pick_device(device)
    folder, report, place = change.folder, change.report, change.place
    origin = find_model(against) if against else find_original(report)
    if origin is None:
        raise UsageError(
            "the original is not where the report says, and the result is measured against it: give --against"
        )
    if is_converted(model_config(origin)):
        raise InputError(f"{origin.label} is a converted model: --against is for the original")
    check_same_sizes(model_config(origin), model_config(place), origin.label)
    target = Path(os.path.realpath(out or folder))
    output.check_output(target, origin.folder, None)
    section = _cache_section(origin, change.sizes, change.cache, model_config(place))
    if section.numbers_per_token_per_layer.before != report.cache.numbers_per_token_per_layer.before:
        raise InputError(f"{origin.label} is not the original of this model: its KV cache has another size")
    with change.written(target, where, progress) as writer:
        result = report.model_copy(update={"cache": section})
        result.write(writer.folder)  # names the evaluation's text and windows
        found = evaluate_model(str(writer.folder), origin, device=str(where), progress=Progress(quiet=True))
        result = _with_measurement(result, found).model_copy(update={"earlier_states": state_of(report)})
        result.checksums = writer.checksums()
        result.self_check = SelfCheckSection(**self_check(writer.folder, where))
        result.out = target
        write_report(result, writer.folder)
        writer.publish()
    return result


@contextmanager
def in_format(folder: Path, cache_dtype: str, device: str = "auto", progress: Progress | None = None) -> Iterator[Path]:
    """A copy of a converted folder with another `--cache-dtype`, beside it, for as long as the context lasts.

    Args:
        folder: of a converted model.
        cache_dtype: as for `quantise`.
        device: where the latents are measured.
        progress: takes notes.

    Raises:
        UsageError, InputError: as for `quantise`.
    """
    progress = progress or Progress()
    change = _change(folder, cache_dtype, None, None, folder.parent, progress)
    name = change.folder.name
    with on_disk("the copy", change.folder.parent):
        work = TemporaryDirectory(dir=change.folder.parent, prefix=f".{name}-")
    with work as beside:
        target = Path(beside) / f"{name} in {cache_dtype}"
        with change.written(target, pick_device(device), progress) as writer:
            change.report.write(writer.folder)  # names the evaluation's text and windows
            writer.publish()
        yield target


@dataclass(frozen=True)
class _Change:
    """Another format of a folder's cache: its report, its place, the format, the entry in config.json, and sizes of layers."""

    folder: Path
    report: Report
    place: SourceLocation
    cache: CacheFormat
    latent_cache: dict[str, object] | None
    sizes: list[LayerSize]

    @contextmanager
    def written(self, target: Path, device: torch.device, progress: Progress) -> Iterator[output.Writer]:
        """A writer of the target that has written weights, code and config.json."""
        output.check_space(target, sum((self.folder / shard).stat().st_size for shard in self.report.checksums))
        # The error of FP8 is relative to each number, so that no basis is better than another (`in_basis`).
        plain = self.cache.kind in ("bf16", "fp8")
        changed = {} if plain else _changed(self.place, self.sizes, self.cache, device, progress)
        with output.Writer(target, {"quantise": self.report.checksums, "cache": self.latent_cache}) as writer:
            write_weights(writer, self.folder, sorted(self.report.checksums), changed)
            with on_disk("the output", target.parent):
                # As JSON, so that all other entries stay as they were written.
                config = json.loads((writer.folder / "config.json").read_text(encoding="utf-8"))
                language_model(config)["latent_cache"] = self.latent_cache
                write_file(writer.folder / "config.json", json.dumps(config, indent=2) + "\n")
            yield writer


def _change(
    folder: Path,
    cache_dtype: str,
    cache_group: int | None,
    cache_rope: str | None,
    out: Path | None,
    progress: Progress,
) -> _Change:
    """Check a format and a folder; arguments are those of `quantise`."""
    if cache_dtype not in FORMATS and cache_dtype != "auto":
        raise UsageError(f"{cache_dtype!r} is no cache format: give {', '.join(FORMATS)}")
    try:
        settings = Settings.model_validate(
            {"cache_dtype": cache_dtype, "cache_group": cache_group, "cache_rope": cache_rope}
        )
    except ValidationError as error:
        raise UsageError(first_problem(error)) from error
    if cache_dtype == "auto":
        raise UsageError(f"auto chooses ranks and bits together, while it converts: give {', '.join(FORMATS)}")
    folder, report = open_converted(folder, out)
    if note := check_input(folder):
        progress.note(note)
    place, cache = find_model(str(folder)), cache_format(settings)
    latent_cache, sizes = _rows(model_config(place), cache)
    return _Change(folder, report, place, cache, latent_cache, sizes)


def _rows(config: Any, cache: CacheFormat) -> tuple[dict[str, object] | None, list[LayerSize]]:
    """The configuration's `latent_cache`, and the sizes of all layers.

    Raises:
        InputError: a layer has no row of this format.
    """
    layers = config.caching_layers()
    sizes = [LayerSize(config.layer_rank(layer), config.layer_rope_dim(layer)) for layer in layers]
    for layer, size in zip(layers, sizes, strict=True):
        if cache.possible(size.rank) != size.rank:
            raise InputError(
                f"layer {layer} has rank {size.rank}, and two channels of 4 bits share a byte: give int8 or fp8"
            )
    if not cache.quantised:
        return None, sizes
    return {"version": VERSION, "kind": cache.kind, "group": cache.group, "rope": cache.rope}, sizes


def _changed(
    place: SourceLocation, sizes: list[LayerSize], cache: CacheFormat, device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    """The projections of every layer in the new basis, by name, in float32."""
    model, tokenizer = load_model(place, torch.float32, device), load_tokenizer(place)
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    weighted = [(texts.load_text(part.spec, "calibration")[0], part.spec, 1.0) for part in mixture.parts(None)]
    windows, _ = mixed_windows(weighted, tokenizer, WINDOWS, length, 0, 1)
    progress.note(f"measuring the latents on {len(windows)} windows of {length} tokens")
    moments = channel_moments(model, windows.to(device), 0)
    changed: dict[str, Tensor] = {}
    names = {id(module): name for name, module in model.named_modules()}
    makers = [attention for attention in attentions(model) if attention.source_idx == attention.layer_idx]
    for attention, size, (variance, cost) in zip(makers, sizes, moments, strict=True):
        row = cache.row(size)
        assert row is not None
        readers = [each for each in attentions(model) if each.source_idx == attention.layer_idx]
        found = _in_basis(readers, row, variance, cost)
        changed |= {f"{names[id(each)]}.{name}": tensor for each, name, tensor in found}
    return changed


def _in_basis(
    readers: list[MlaAttention], row: LatentFormat, variance: Tensor, cost: Tensor
) -> list[tuple[MlaAttention, str, Tensor]]:
    """The projections of attentions in the basis in which their latent rounds least: attention, name and tensor in float32.

    Args:
        readers: attentions that attend to one latent; the first makes it.
        row: format of its cached rows.
        variance: from `channel_moments`.
        cost: likewise.
    """
    first, rank, ups = readers[0], row.rank, [each.kv_b_proj.weight.detach() for each in readers]
    down = first.kv_a_proj_with_mqa
    # In float64, so that the change of basis adds no rounding of its own.
    weight, bias = (None if part is None else part.detach().double().cpu() for part in (down.weight, down.bias))
    up = torch.cat(ups).double().cpu()
    latent = Latent(weight[:rank], None if bias is None else bias[:rank], up, variance[:rank], cost[:rank])
    latent = latent.ordered().turned((row.wide, rank - row.wide))
    factors = torch.ones(len(weight) - rank, dtype=torch.float64)
    found: list[tuple[MlaAttention, str, Tensor]] = []
    if row.rope == "int4" and row.rope_dim:
        factors = rope_factors(variance[rank:], cost[rank:], latent)
        for each in readers:
            name = "q_b_proj" if each.normed else "q_proj"
            query = getattr(each, name)
            undone = query_factors(factors, each.num_heads, len(query.weight))
            found.append((each, f"{name}.weight", (query.weight.detach().double().cpu() * undone[:, None]).float()))
            if query.bias is not None:
                found.append((each, f"{name}.bias", (query.bias.detach().double().cpu() * undone).float()))
    found.append(
        (first, "kv_a_proj_with_mqa.weight", torch.cat([latent.down, weight[rank:] * factors[:, None]]).float())
    )
    if bias is not None:
        found.append((first, "kv_a_proj_with_mqa.bias", torch.cat([latent.bias, bias[rank:] * factors]).float()))
    for each, part in zip(readers, latent.up.float().split([len(part) for part in ups]), strict=True):
        found.append((each, "kv_b_proj.weight", part.contiguous()))
    return found


def _cache_section(origin: SourceLocation, sizes: list[LayerSize], cache: CacheFormat, config: Any) -> CacheSection:
    """The cache in the report."""
    source = open_source(str(origin.folder / origin.gguf if origin.gguf else origin.folder), weights=False)
    plan = Plan(
        max(size.rank for size in sizes), max(size.rope_dim for size in sizes), source.shape, tuple(sizes), cache
    )
    dtype = config.dtype or torch.float32
    return cache_section(plan, dtype.itemsize, source.sliding_windows, fixed_state_bytes(source.config, dtype))


def _with_measurement(report: Report, found: Evaluation) -> Report:
    """The report with the evaluation of the model as it is now."""
    content = found.as_dict()
    measured = Measurement.model_validate({key: content[key] for key in ("evaluation", "probes", "dtype", "device")})
    values = {key: value for key, value in measured.evaluation.entries().items() if key not in ("kl", "agreement")}
    # Once, however often the format is changed.
    notes = [note for note in report.notes or [] if note != NOTE]
    return report.model_copy(
        update={"evaluation": EvaluationSection(**values), "probes": measured.probes, "notes": [*notes, NOTE]}
    )

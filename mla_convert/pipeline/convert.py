"""A conversion from its settings to the finished folder, step by step."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla_convert.core import runtime as environment
from mla_convert.core.errors import UsageError
from mla_convert.core.files import on_disk
from mla_convert.core.processes import Processes, join
from mla_convert.core.progress import Progress
from mla_convert.core.recipes import default_name
from mla_convert.core.report_file import PAGE
from mla_convert.core.report_schema import (
    CalibrationSection,
    EvaluationSection,
    NotEvaluated,
    OriginalCacheSection,
    Report,
)
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.words import check_name
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.evaluate.quality.suite import Suite, suite_of, suite_section
from mla_convert.heal.checks import check_conversion
from mla_convert.heal.run import heal_conversion
from mla_convert.method.calibrate import self_generated
from mla_convert.method.calibrate.hidden_states import Activations
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.factorise import sensitivity
from mla_convert.method.factorise.layer import mla_config, whole_config
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.refine import schedule
from mla_convert.modeling.fixed_states import fixed_state_bytes
from mla_convert.moved import callable_as_before
from mla_convert.pipeline import layers, original_cache, streamed
from mla_convert.pipeline.budget import within_budget
from mla_convert.pipeline.layer_files import LayerFiles
from mla_convert.pipeline.recipe import write_recipe
from mla_convert.pipeline.resolve import ResolvedConversion, resolve
from mla_convert.pipeline.streams import Streams, open_streams
from mla_convert.report import report
from mla_convert.report.html.page import write_page
from mla_convert.report.model_card import write_card
from mla_convert.source import texts
from mla_convert.source.carried import tokenizer_code
from mla_convert.source.source import Source, open_source
from mla_convert.write import writer as output
from mla_convert.write.model_files import write_config, write_tokenizer
from mla_convert.write.selfcheck import self_check
from mla_convert.write.writer import Writer


@dataclass(frozen=True)
class PreparedText:
    """Token windows of all texts of a conversion, and the packaged suite where it is measured."""

    windows: texts.Windows
    suite: Suite | None


@dataclass(frozen=True)
class ConvertedLayers:
    """All layers of a finished conversion: their sizes, the model's configuration, report entries and the evaluation."""

    plan: Plan
    mla_config: Any
    stock_class: str
    entries: list[dict[str, Any]]
    evaluation: EvaluationSection | NotEvaluated
    original_cache: OriginalCacheSection | None = None


def convert(config: ConvertConfig, progress: Progress | None = None) -> Report | None:
    """Convert a checkpoint to Multi-head Latent Attention, write it with its report, and return the report.

    With several processes (`accelerate launch`, or `--gpus`) all call this with equal arguments; they share the windows, and the
    first one writes.

    Args:
        config: Source, output and settings.
        progress: Where progress is shown; by default on stderr.

    Returns:
        The report; None in other processes than the first.

    Raises:
        InputError: The source, a text or a setting cannot be used; nothing is written.
        ResourceError: Disk, device or network did not suffice; nothing is left behind.
    """
    began = time.perf_counter()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    processes = join(config.device)
    device = processes.device
    progress = (progress or Progress()) if processes.first else Progress(quiet=True)
    phases = environment.Phases(device)
    out = config.out or Path(default_name(config.source))
    check_name(out)

    with phases.phase("open"):
        with processes.in_turn():
            source = open_source(config.source, config.revision)
            config, budget = within_budget(config, source, device, processes.count)
            resolved = resolve(config, source, device)
            # Only the first process writes the output, so that it alone looks at the place.
            if processes.first:
                check_target(resolved, out)
        layerwise, tokenizer = LayerwiseModel(source, device), source.tokenizer()
        if config.original_cache:
            original_cache.check_attention(layerwise)
    with phases.phase("text"):
        # The first process reads the texts for all, so that they share out the same windows.
        text = processes.told(lambda: prepare_text(resolved, tokenizer))
    # A short text fills fewer windows than were planned, and the steps of blocks follow their number.
    resolved = resolved.for_texts(*text.windows.calib.shape)
    check_shares(processes, resolved.calibration[0])
    notes = collect_notes(source, text, progress, budget)

    # A link is written through, not replaced.
    target = Path(os.path.realpath(out))
    with (
        environment.deterministic(config.seed),
        Writer(target, _identity(resolved, text, processes), processes) as writer,
    ):
        converted = run_layers(resolved, text, layerwise, tokenizer, writer, progress, phases)
        result = make_report(resolved, text, converted, processes)
        result.phases, result.checksums, result.notes, result.out = phases.results, writer.checksums(), notes, out
        result.seconds = round(time.perf_counter() - began, 2)
        if processes.first:
            write_recipe(writer.folder, resolved, text.windows, result)
            finish(source, tokenizer, converted, writer, result, device)
    processes.wait()  # until the folder has its name
    # Healing starts from the finished folder: if it fails, the conversion stays.
    if resolved.healing:
        return heal_conversion(resolved.settings, result, progress)
    return result if processes.first else None


def check_shares(processes: Processes, windows: int) -> None:
    """Refuse more processes than there are windows to share.

    Raises:
        UsageError: a process would have none.
    """
    if processes.count > windows:
        raise UsageError(f"{processes.count} processes cannot share {windows} calibration windows: start fewer")


def check_target(resolved: ResolvedConversion, out: Path) -> None:
    """Refuse an output folder that cannot be written, and a source whose other files cannot be carried over.

    These checks run before the conversion, which may take hours.

    Raises:
        InputError: The folder holds something else, or a file of the source cannot be carried over.
        ResourceError: There is not enough space.
    """
    source, cast = resolved.source, resolved.cast
    output.check_output(out, source.folder, resolved.settings.overwrite)
    source.license()
    source.copied_files()
    stored = output.stored_bytes(source.reader, cast.itemsize if cast else None)
    others = source.whole.other_bytes(cast.itemsize if cast else None) if source.whole else 0
    output.check_space(out, stored + others + resolved.scratch_bytes)


def prepare_text(resolved: ResolvedConversion, tokenizer: Any) -> PreparedText:
    """Read and tokenise every text.

    Raises:
        InputError: A text that cannot be used, or a tokenizer of another model.
        UsageError: A healing run that would be refused after the conversion.
    """
    settings, model, hidden = resolved.settings, resolved.reach, resolved.source.shape.hidden_size
    check_conversion(settings, model.longest)
    windows = texts.load_windows(settings, tokenizer, resolved.on_gpu, model, hidden, resolved.self_generated)
    suite = None
    if windows.evaluated:
        suite = suite_of(tokenizer, settings.suite_windows, resolved.on_gpu, windows.evaluation)
    if suite:
        model.check(suite.windows, "the packaged suite")
    return PreparedText(windows, suite)


def collect_notes(source: Source, text: PreparedText, progress: Progress, budget: str | None = None) -> list[str]:
    """The notes of a conversion's report, each of which is also shown; `budget`: what was chosen for one."""
    notes = [*source.notes, *([budget] if budget else [])]
    if code := None if source.gguf else tokenizer_code(source.folder):
        notes.append(
            f"the tokenizer of {source.name} names code of its own ({code}), which is not run: transformers' own class reads it"
        )
    notes += text.windows.notes
    for note in notes:
        progress.note(note)
    if untried := environment.untried():
        warnings.warn(untried, stacklevel=3)
        notes.append(untried)
    return notes


def run_layers(
    resolved: ResolvedConversion,
    text: PreparedText,
    layerwise: LayerwiseModel,
    tokenizer: Any,
    writer: Writer,
    progress: Progress,
    phases: environment.Phases,
) -> ConvertedLayers:
    """Choose each layer's sizes, convert and write every layer, and evaluate the result.

    Args:
        resolved: The conversion.
        text: Its texts.
        layerwise: The source, of which one layer's weights are loaded at a time.
        tokenizer: The source's tokenizer.
        writer: Writes the shards; an interrupted run continues after those that it finished.
        progress: Where progress is shown.
        phases: Records time and memory of each step.
    """
    settings, source, windows = resolved.settings, resolved.source, text.windows
    with phases.phase("write text"):
        calib = self_generated.mixed(
            windows.calib, resolved.generated, source, tokenizer, writer.processes, settings.seed
        )
    with phases.phase("embed"):
        suite_windows = text.suite.windows if text.suite else None
        streams = open_streams(layerwise, calib, windows.measured, suite_windows, writer.processes)
    refine = resolved.refinement
    with phases.phase("allocate"):
        calibration = streams.calib_original
        plan, channels = sensitivity.measure(
            resolved.plan, settings, refine.steps, layerwise, calibration, writer, progress
        )
        del calibration
    new_config = mla_config(source, plan, resolved.dtype)
    files = LayerFiles(layerwise, plan.shape.layers, resolved.cast, writer)
    with phases.phase("ends"):
        files.write_embeddings_and_head()
    converter = layers.LayerConverter(
        settings, plan, layerwise, new_config, files, writer.processes, progress, refine, channels
    )
    extra_steps = schedule.output_advances(refine, plan.shape)
    progress.start(len(plan.shape.converted_layers), refine.steps_per_layer, "layer", extra_steps)
    try:
        with phases.phase("layers"):
            entries = converter.convert(streams)
    finally:
        progress.stop()
    with phases.phase("evaluate"):
        evaluation = evaluate(layerwise, streams, text)
    states, found = streams.measured_original, None
    del streams  # the states of the converted model and of calibration: those of the original's caches take their place
    if settings.original_cache:
        with phases.phase("original"):
            found = quantised_originals(resolved, text, layerwise, states)
    return ConvertedLayers(plan, new_config, type(layerwise.model).__name__, entries, evaluation, found)


def quantised_originals(
    resolved: ResolvedConversion, text: PreparedText, layerwise: LayerwiseModel, states: Sequence[Activations]
) -> OriginalCacheSection:
    """The report's section on the original with quantised caches, on the windows of the evaluation.

    Args:
        resolved: The conversion.
        text: Its texts.
        layerwise: The source.
        states: Its outputs for the evaluation windows, then for the suite's.
    """
    windows, names = text.windows, resolved.settings.original_cache or []
    return OriginalCacheSection(
        text=windows.eval_text,
        protocol=windows.eval_protocol,
        dtype=str(resolved.dtype).removeprefix("torch."),
        device=environment.device_name(resolved.device),
        formats=original_cache.measure(names, layerwise, windows, text.suite, states, resolved.dtype.itemsize),
    )


def evaluate(layerwise: LayerwiseModel, streams: Streams, text: PreparedText) -> EvaluationSection | NotEvaluated:
    """The report's section on the evaluation, from the hidden states of both models behind their last layers."""
    measured = streams.eval_original, streams.eval_converted
    section = measure.perplexity_section(
        text.windows, streamed.shared_scores(layerwise, text.windows.measured, *measured)
    )
    if text.suite and streams.suite_original and streams.suite_converted:
        states = streams.suite_original, streams.suite_converted
        section.suite = suite_section(text.suite, streamed.shared_scores(layerwise, text.suite.windows, *states))
    return section


def make_report(
    resolved: ResolvedConversion, text: PreparedText, converted: ConvertedLayers, processes: Processes
) -> Report:
    """The report of a conversion, without the time it took and the files it wrote."""
    source, settings, windows, plan = resolved.source, resolved.settings, text.windows, converted.plan
    return Report(
        source=report.source_section(
            source.name, source.revision, source.model_type, plan.shape, source.license()
        ),
        # labels, not paths: a report is made to be published
        settings={**resolved.recorded(), **windows.labels(settings)},
        versions=environment.versions(),
        device=_devices(processes),
        cache=report.cache_section(
            plan,
            resolved.dtype.itemsize,
            source.sliding_windows,
            fixed_state_bytes(source.config, resolved.dtype),
        ),
        evaluation=converted.evaluation,
        calibration=CalibrationSection(
            text=windows.calib_text,
            protocol=windows.calib_protocol(resolved.generated),
            noise=settings.calib_noise,
            self_written=resolved.self_generated,
            windows=windows.calib_counts,
        ),
        layers=converted.entries,
        phases={},
        seconds=0.0,
        checksums={},
        **({"original_cache": converted.original_cache} if converted.original_cache else {}),
    )  # fmt: skip


def _devices(processes: Processes) -> str:
    """Name of the device, with the number of processes if there are several."""
    name = environment.device_name(processes.device)
    return name if processes.alone else f"{processes.count} × {name}"


def _identity(resolved: ResolvedConversion, text: PreparedText, processes: Processes) -> dict[str, Any]:
    """Everything that changes the written weights: shards of an interrupted run are kept only where this is the same."""
    return {"settings": resolved.recorded(), "source": resolved.source.fingerprint(),
            "device": _devices(processes),
            "windows": [text.windows.calib.tolist(), text.windows.measured.tolist()],
            "versions": environment.versions()}  # fmt: skip


def finish(
    source: Source,
    tokenizer: Any,
    converted: ConvertedLayers,
    writer: Writer,
    report: Report,
    device: torch.device,
) -> None:
    """Write everything but the weights, check that the folder generates, and give the folder its name.

    Args:
        source: The source of the conversion.
        tokenizer: Its tokenizer.
        converted: The converted layers.
        writer: Has written the shards.
        report: The report; its self-check is filled in.
        device: Device of the self-check.

    Raises:
        SelfCheckFailed: The model does not generate what it should.
    """
    with on_disk("the output", writer.out.parent):
        write_tokenizer(source, tokenizer, writer.folder)
        if source.whole:
            write_config(whole_config(source.whole, converted.mla_config), source.whole.stock_class, writer.folder)
        else:
            write_config(converted.mla_config, converted.stock_class, writer.folder)
        # The self-check loads the folder as a user would, with tokenizer, configuration and index; the report, card and
        # page state its result, so that they come last.
        writer.write_index()
        report.self_check = self_check(writer.folder, device)
        write_card(report, writer.folder)
        report.write(writer.folder)
        write_page(report, writer.folder / PAGE)
        writer.publish()


callable_as_before(__name__)

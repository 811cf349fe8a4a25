"""The whole story of a conversion, in order."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from mla_convert.core import runtime as environment
from mla_convert.core.files import on_disk
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import PAGE
from mla_convert.core.report_schema import EvaluationSection, NotEvaluated, SelfCheckSection
from mla_convert.core.settings import ConvertConfig, default_name
from mla_convert.core.words import check_name
from mla_convert.evaluate.quality import perplexity as measure
from mla_convert.evaluate.quality import suite
from mla_convert.heal.run import check_conversion, heal_conversion
from mla_convert.method.calibrate import self_generated as selfwritten
from mla_convert.method.calibrate.layerwise import LayerwiseModel
from mla_convert.method.factorise import sensitivity
from mla_convert.method.factorise.layer import mla_config
from mla_convert.method.factorise.sizes import make_plan
from mla_convert.method.refine import schedule
from mla_convert.moved import callable_as_before
from mla_convert.pipeline import layers, streamed
from mla_convert.pipeline.recipe import write_recipe
from mla_convert.publish.engines.target_engine import apply_constraints
from mla_convert.report import report
from mla_convert.report.html.page import write_page
from mla_convert.report.model_card import write_card
from mla_convert.report.report import Report
from mla_convert.source import texts
from mla_convert.source.carried import tokenizer_code
from mla_convert.source.source import Source, open_source
from mla_convert.write import writer as output
from mla_convert.write.model_files import write_config, write_tokenizer
from mla_convert.write.selfcheck import self_check
from mla_convert.write.writer import Writer


def evaluated(
    layerwise: LayerwiseModel, streams: layers.Streams, windows: texts.Windows, kinds: suite.Suite | None
) -> EvaluationSection | NotEvaluated:
    """What a report says of its evaluation, from the states that both models left behind their last layers."""
    found = measure.perplexity_section(
        windows,
        streamed.scores(layerwise, windows.measured, streams.eval_original.data, streams.eval_converted.data),
    )
    if kinds:
        states = streams.suite_original.data, streams.suite_converted.data
        found.suite = suite.suite_section(kinds, streamed.scores(layerwise, kinds.windows, *states))
    return found


def convert(config: ConvertConfig, progress: Progress | None = None) -> report.Report:
    """Convert a checkpoint to Multi-head Latent Attention, write it with its report, and return the report.

    Raises:
        InputError: the source, a text or a setting cannot be used; nothing is written.
        ResourceError: disk, device or network did not suffice; nothing is left behind.
    """
    began, progress = time.perf_counter(), progress or Progress()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    device = environment.pick_device(config.device)
    phases = environment.Phases(device)
    out = config.out or Path(default_name(config.source))
    check_name(out)

    with phases.phase("open"):
        source = open_source(config.source, config.revision)
        config = apply_constraints(config, source)
        output.check_output(out, source.folder, config.overwrite)
        # what is carried over is looked at now: hours later it would be too late to refuse it
        licence, _ = source.license(), source.copied_files()
        plan = make_plan(config, source.shape)
        cast = None if config.dtype == "auto" and not source.gguf else getattr(torch, config.dtype, source.dtype)
        aside = sensitivity.scratch_bytes(plan) if sensitivity.is_measured(plan, config) else 0
        output.check_space(out, output.stored_bytes(source.reader, cast.itemsize if cast else None) + aside)
        layerwise, tokenizer = LayerwiseModel(source, device), source.tokenizer()

    with phases.phase("text"):
        model = texts.reach(source.config, learned=not source.family.rotary)
        check_conversion(config, model.longest)
        windows = texts.load_windows(config, tokenizer, device.type == "cuda", model, source.shape.hidden_size)
        kinds = None
        if windows.evaluated:
            kinds = suite.suite_of(tokenizer, config.suite_windows, device.type == "cuda", windows.evaluation)
        if kinds:
            model.check(kinds.windows, "the packaged suite")
    written = selfwritten.share(config, source, device)
    code = None if source.gguf else tokenizer_code(source.folder)
    stock = [
        f"the tokenizer of {source.name} names code of its own ({code}), which is not run: a class of transformers' reads it"
    ]
    for note in (notes := [*source.notes, *(stock if code else []), *windows.notes]):
        progress.note(note)
    if untried := environment.untried():
        warnings.warn(untried, stacklevel=2)
        notes.append(untried)

    size = source.shape.hidden_size, schedule.layer_numbers(source)
    refine = schedule.refine_settings(config, device, tuple(windows.calib.shape), *size)
    settings = config.model_dump(mode="json", exclude={"source", "revision", "out", "overwrite"})
    settings |= {"refine_steps": refine.steps, "refine_batch": refine.batch, "refine_block": refine.block,
                 "block_steps": refine.block_steps, "output_steps": refine.output_steps, "output_layers": refine.output_layers,
                 "calib_self": written}  # fmt: skip
    identity = {"settings": settings, "source": source.fingerprint(), "device": environment.device_name(device),
                "windows": [windows.calib.tolist(), windows.measured.tolist()],
                "versions": environment.versions()}  # fmt: skip
    # a link is written through, not replaced
    with environment.deterministic(config.seed), output.Writer(Path(os.path.realpath(out)), identity) as writer:
        with phases.phase("write text"):
            calib = selfwritten.mixed(windows.calib, written, source, tokenizer, device, config.seed)
        with phases.phase("embed"):
            streams = layers.open_streams(layerwise, calib, windows.measured, kinds and kinds.windows)
        with phases.phase("allocate"):
            states = streams.calib_original
            plan, channels = sensitivity.measure(plan, config, refine.steps, layerwise, states, writer, progress)
        new_config = mla_config(source, plan, cast or source.dtype)
        job = layers.LayerJob(config, plan, layerwise, new_config, cast, writer, progress, refine, channels)
        with phases.phase("ends"):
            layers.write_embeddings_and_head(job)
        further = schedule.output_advances(refine, plan.shape.layers)
        progress.start(plan.shape.layers, refine.steps_per_layer, "layer", further)
        try:
            with phases.phase("layers"):
                layer_reports = layers.convert_layers(job, streams)
        finally:
            progress.stop()
        with phases.phase("evaluate"):
            evaluation = evaluated(layerwise, streams, windows, kinds)
        result = report.Report(
            source=report.source_section(source.name, source.revision, source.config.model_type, plan.shape, licence),
            # labels, not paths: a report is made to be published
            settings={**settings, **windows.labels(config)},
            versions=environment.versions(),
            device=environment.device_name(device),
            cache=report.cache_section(plan, (cast or source.dtype).itemsize, source.sliding_windows),
            evaluation=evaluation,
            calibration={"text": windows.calib_text, "protocol": windows.calib_protocol, "noise": config.calib_noise,
                         "self_written": written, "windows": windows.calib_counts},
            layers=layer_reports,
            phases=phases.results,
            seconds=round(time.perf_counter() - began, 2),
            checksums=writer.checksums(),
            notes=notes,
            out=out,
        )  # fmt: skip
        write_recipe(writer.folder, config, source, plan, windows, refine, written, result)
        finish(source, tokenizer, new_config, type(layerwise.model).__name__, writer, result, device)
    return heal_conversion(config, result, progress) if config.heal_tokens else result


def finish(
    source: Source,
    tokenizer: Any,
    config: Any,
    stock_class: str,
    writer: Writer,
    report: Report,
    device: torch.device,
) -> None:
    """Write everything but the weights, try what was written, then give the folder its name.

    Raises:
        SelfCheckFailed: the model does not generate what it should.
    """
    with on_disk("the output", writer.out.parent):
        write_tokenizer(source, tokenizer, writer.folder)
        write_config(config, stock_class, writer.folder)
        writer.write_index()
        report.self_check = SelfCheckSection.model_validate(self_check(writer.folder, device))
        write_card(report, writer.folder)
        report.write(writer.folder)
        write_page(report, writer.folder / PAGE)
        writer.publish()


callable_as_before(__name__)

"""The whole story of a conversion, in order."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mla_convert import environment, evaluate, layers, report, texts
from mla_convert.attention import mla_config
from mla_convert.card import write_card
from mla_convert.checkpoint import writer as output
from mla_convert.config import ConvertConfig, default_name
from mla_convert.plan import make_plan
from mla_convert.progress import Progress
from mla_convert.skeleton import Skeleton
from mla_convert.source import Source, open_source

CALIB = {"cuda": (256, 1024), "cpu": (32, 512)}
EVAL_LENGTH = 2048


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

    with phases.phase("open"):
        source = open_source(config.source, config.revision)
        output.check_output(out, source.folder, config.overwrite)
        plan = make_plan(config, source.shape)
        dtype = None if config.dtype == "auto" and not source.gguf else getattr(torch, config.dtype, source.dtype)
        output.check_space(out, output.stored_bytes(source.reader, dtype.itemsize if dtype else None))
        skeleton = Skeleton(source, device)
        tokenizer = source.tokenizer()

    with phases.phase("text"):
        samples, length = (given or default for given, default in
                           zip((config.calib_samples, config.calib_length), CALIB[device.type], strict=True))  # fmt: skip
        limit = getattr(source.config, "max_position_embeddings", None) or EVAL_LENGTH
        calib_text, calib_label = texts.load_text(config.calib, "calibration")
        eval_text, eval_label = texts.load_text(config.eval, "evaluation")
        calib = texts.calibration_windows(calib_text, tokenizer, samples, length, config.seed, calib_label)
        evaluation, protocol = texts.evaluation_windows(
            eval_text, tokenizer, config.eval_windows, config.eval_length or min(limit, EVAL_LENGTH), eval_label
        )
    notes = [f"no text was given: {purpose} uses {label}" for purpose, given, label in
             (("calibration", config.calib, calib_label), ("evaluation", config.eval, eval_label)) if given is None]  # fmt: skip
    for note in notes:
        progress.note(note)

    settings = config.model_dump(mode="json", exclude={"out", "overwrite", "source", "revision"})
    refine = layers.refine_settings(config, device, length)
    identity = {"settings": settings, "source": source.name, "refine": vars(refine), "device": device.type,
                "windows": [calib.tolist(), evaluation.tolist()], "versions": environment.versions()}  # fmt: skip
    with environment.deterministic(config.seed), output.Writer(out, identity) as writer:
        job = layers.LayerJob(config, plan, skeleton, mla_config(source, plan, dtype or source.dtype), dtype, writer,
                              progress, refine)  # fmt: skip
        with phases.phase("embed"):
            layers.write_ends(job)
            streams = layers.open_streams(skeleton, calib, evaluation)
        progress.start(plan.shape.layers, refine.steps)
        try:
            with phases.phase("layers"):
                layer_reports = layers.convert_layers(job, streams)
        finally:
            progress.stop()
        with phases.phase("evaluate"):
            before, after = map(evaluate.perplexity, skeleton.token_losses(
                [streams.eval_original.data, streams.eval_converted.data], evaluation))  # fmt: skip
        result = report.Report(
            source={"name": source.name, "revision": source.revision, "model_type": source.config.model_type},
            settings={**settings, "calib": config.calib and calib_label, "eval": config.eval and eval_label,
                      "refine_steps": refine.steps, "refine_batch": refine.batch},
            versions=environment.versions(),
            device=environment.device_name(device),
            cache={"kv_lora_rank": plan.rank, "qk_rope_head_dim": plan.rope_dim, **report.cache_figures(
                plan.shape.layers, plan.shape.cache_numbers, plan.cache_numbers, (dtype or source.dtype).itemsize,
                source.sliding_windows)},
            evaluation={"text": eval_label, "protocol": f"{protocol}, not overlapping", "before": before.as_dict(),
                        "after": after.as_dict(), "ratio": after.value / before.value},
            calibration={"text": calib_label, "protocol": f"{calib_label}, {samples} windows of {length} tokens"},
            layers=layer_reports,
            phases=phases.results,
            seconds=round(time.perf_counter() - began, 2),
            checksums=writer.checksums(),
            notes=notes,
            out=out,
        )  # fmt: skip
        finish(source, tokenizer, job, writer, result)
    return result


def finish(source: Source, tokenizer: Any, job: layers.LayerJob, writer: output.Writer, result: report.Report) -> None:
    """Write what stands beside the weights, then give the folder its name."""
    folder = writer.folder
    for file in source.copied_files():
        shutil.copyfile(file, folder / file.name)
    if not (folder / "tokenizer_config.json").exists():
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        source.generation_config().save_pretrained(folder)
    layers.write_config(job, folder)
    writer.write_index()
    write_card(result, folder, source.license())
    result.write(folder)
    writer.publish()

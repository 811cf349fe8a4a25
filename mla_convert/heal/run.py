"""A healing run from start to end: measure, train, write, measure again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from mla_convert.core import runtime
from mla_convert.core.errors import InputError, MlaConvertError, ResourceError, UsageError
from mla_convert.core.files import write_file
from mla_convert.core.progress import Progress
from mla_convert.core.report_schema import Measurement, Report, SelfCheckSection
from mla_convert.core.settings import ConvertConfig
from mla_convert.evaluate.quality.evaluation import Evaluation, evaluate_model
from mla_convert.evaluate.quality.probes import ProbeSettings
from mla_convert.heal import data
from mla_convert.heal.checks import check_apart, conversion_text, find_teacher, open_converted, with_length
from mla_convert.heal.fingerprint import measurement_key, run_identity
from mla_convert.heal.loop import Run, Trainer
from mla_convert.heal.output import write_report, write_weights
from mla_convert.heal.prepare_text import prepare_corpus
from mla_convert.heal.record import healed_report, run_record, text_label
from mla_convert.heal.settings import HealConfig, HealSettings, conversion_healing
from mla_convert.heal.state import StateFolder, state_folder
from mla_convert.heal.step_back import step_back
from mla_convert.heal.teacher_student import TeacherStudent
from mla_convert.modeling.attention_backends import without_cudnn_attention
from mla_convert.source.load_model import check_same_sizes, find_model, load_model, load_tokenizer, model_config
from mla_convert.source.place import SourceLocation
from mla_convert.source.tokens import ordinary_tokens
from mla_convert.write import writer as output
from mla_convert.write.intact import check_input
from mla_convert.write.known_files import outdated
from mla_convert.write.selfcheck import self_check

BEFORE = "before-{}.json"


@dataclass(frozen=True)
class _Job:
    """The inputs of a run, all of them checked."""

    config: HealConfig
    settings: HealSettings  # with all window lengths
    accelerator: Accelerator
    progress: Progress
    folder: Path  # of the converted model
    report: Report
    origin: SourceLocation
    out: Path

    @property
    def place(self) -> SourceLocation:
        """The converted model."""
        return find_model(str(self.folder))

    @property
    def shards(self) -> list[str]:
        """Names of the converted model's weight files."""
        return sorted(self.report.checksums)


def heal(config: HealConfig, progress: Progress | None = None) -> Report | None:
    """Distil the original into a converted model, and write the healed folder.

    With several processes (`accelerate launch`) all call this with equal arguments. A run that died resumes from its last
    checkpoint when it is called again with the same ones.

    Args:
        config: models, text and settings.
        progress: shows the run; by default on the terminal.

    Returns:
        The healed model's report; None in other processes than the first.

    Raises:
        InputError: model, original or text cannot be used, or nothing was gained; nothing is written.
        UsageError: settings contradict each other, or the original has to be named.
        ResourceError: disk, device or network did not suffice.
    """
    accelerator = _accelerator(config)
    main = accelerator.is_main_process
    phases = runtime.Phases(accelerator.device)
    job = _open(config, accelerator, (progress or Progress()) if main else Progress(quiet=True))
    result = None
    # Only the main process compares it, and the hashes of all weights take long.
    identity = run_identity(accelerator, job.settings, job.folder, job.origin) if main else {}
    real_out = Path(os.path.realpath(job.out))
    with StateFolder(state_folder(real_out), identity, accelerator, job.progress.note) as state:
        labels = prepare_corpus(state, accelerator, job.settings, job.place, job.origin, job.progress)
        before = state.remember(
            BEFORE.format(measurement_key(config)), lambda: _measurement(_measure(job, job.folder, labels)).as_dict()
        )
        with phases.phase("heal"):
            run, best = _train(job, state)
        # The state goes too: from it the same command would come to the same error.
        if best is None:
            state.remove()
            why = f" ({run.stopped})" if run.stopped else ""
            raise InputError(
                f"healing found nothing better than the start on held-out text{why}: nothing is written; lower --lr, or "
                f"give more --tokens or other --data"
            )
        if main:
            with output.Writer(real_out, {"heal": job.report.checksums}) as writer:
                write_weights(writer, job.folder, job.shards, best)
                job.report.write(writer.folder)  # names the evaluation's text and windows
                measured = _measure(job, writer.folder, labels, config.original_cache or ())
                label = text_label(job.settings, labels)
                record = run_record(job.settings, job.origin, label, run, accelerator)
                start, after = Measurement.model_validate(before), _measurement(measured)
                result = healed_report(job.report, record, start, after, phases)
                result.original_cache = measured.original_cache or result.original_cache
                _finish(result, writer, accelerator.device)
        accelerator.wait_for_everyone()
        state.remove()
    return result


def heal_conversion(config: ConvertConfig, report: Report, progress: Progress) -> Report:
    """Heal a model that was just converted, in place, with the conversion's settings.

    Args:
        config: of the conversion.
        report: of the conversion.
        progress: of the conversion.

    Returns:
        The healed model's report.

    Raises:
        MlaConvertError: as `heal`; the conversion stays as it is.
    """
    settings = conversion_healing(config)
    assert settings is not None
    given = {**settings.model_dump(exclude_unset=True), "data": conversion_text(config), "eval": config.eval}
    windows = report.evaluation.before
    try:
        healed = heal(
            HealConfig(
                folder=report.out, teacher=config.source, teacher_revision=config.revision, device=config.device,
                eval_windows=windows.windows, eval_length=windows.length,
                **{key: value for key, value in given.items() if value is not None},
            ),
            progress,
        )  # fmt: skip
    except (MlaConvertError, KeyboardInterrupt) as error:
        error.args = (": ".join([*map(str, error.args), f"the converted model, not healed, is in {report.out}"]),)
        raise
    healed.out, healed.seconds = report.out, round(report.seconds + healed.phases["heal"].seconds, 2)
    return healed


def _accelerator(config: HealConfig) -> Accelerator:
    device = runtime.pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        # accelerate runs on the current device and takes no index.
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if on_gpu else "no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # one process measures and writes, the others wait
            # Buffers are tables that no step changes, so they need not be sent; views of the buckets save a copy of all
            # gradients.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def _open(config: HealConfig, accelerator: Accelerator, progress: Progress) -> _Job:
    """Check the inputs of a run."""
    folder, report = open_converted(config.folder, config.out)
    if accelerator.is_main_process and (note := check_input(folder)):
        progress.note(note)
    place, origin = find_model(str(folder)), find_teacher(config, report)
    check_same_sizes(model_config(origin), model_config(place), origin.label)
    out = config.out or folder
    output.check_output(out, origin.folder, config.overwrite)
    settings = HealSettings.model_validate(config.model_dump(include=set(HealSettings.model_fields)))
    job = _Job(config, settings, accelerator, progress, folder, report, origin, out)
    output.check_space(out, sum((folder / shard).stat().st_size for shard in job.shards))
    check_apart(config.data, config.eval)
    settings = with_length(settings, getattr(model_config(place), "max_position_embeddings", None))
    return _Job(config, settings, accelerator, progress, folder, report, origin, out)


def _measure(job: _Job, folder: Path, labels: list[str], original_cache: Sequence[str] = ()) -> Evaluation:
    """Evaluate a model against the original.

    Args:
        job: the run.
        folder: of the model.
        labels: of the texts that are trained on.
        original_cache: formats in which the original's own cache is quantised and measured too.
    """
    config = job.config
    probes = ProbeSettings(
        passkey=config.passkey or config.passkey_length is not None, passkey_length=config.passkey_length
    )
    device = "cpu" if job.accelerator.device.type == "cpu" else str(job.accelerator.device)
    measured = evaluate_model(
        str(folder), job.origin, text=config.eval, windows=config.eval_windows, length=config.eval_length,
        device=device, probes=probes, original_cache=original_cache, progress=Progress(quiet=True),
    )  # fmt: skip
    if measured.text in labels:
        raise UsageError(f"{measured.text} is a text to train on: give another text as --eval, or to train on")
    job.progress.note(f"perplexity ×{measured.ratio.value:.4f}, KL {measured.kl.value:.4f} on {measured.text}")
    return measured


def _measurement(evaluation: Evaluation) -> Measurement:
    """The parts of an evaluation that a report keeps."""
    content = evaluation.as_dict()
    return Measurement.model_validate({key: content[key] for key in ("evaluation", "probes", "dtype", "device")})


def _train(job: _Job, state: StateFolder) -> tuple[Run, dict[str, Tensor] | None]:
    """Train; returns the run and the best state, None if that is the start.

    Its end is kept, so that what comes after it, such as measuring, can be repeated without it.
    """
    accelerator, settings = job.accelerator, job.settings
    if state.trained():
        return Run(**(state.last() or {})), state.best()
    torch.manual_seed(settings.seed)  # adapters start at random
    on_gpu, host = accelerator.device.type == "cuda", torch.device("cpu")
    frozen = torch.bfloat16 if on_gpu else torch.float32
    # Both on the host: the device has to hold them only after their weights are cast and, where equal, shared.
    student = load_model(job.place, "auto" if settings.train != "all" else torch.float32, host)
    pair = TeacherStudent.build(student, load_model(job.origin, frozen, host), settings, frozen)
    pair.place(accelerator.device)
    vocabulary = (
        ordinary_tokens(load_tokenizer(job.place), model_config(job.place).vocab_size) if settings.noise else None
    )
    trainer = Trainer(accelerator, pair, data.open_corpus(state.folder), settings, state, job.progress, vocabulary)
    with without_cudnn_attention():
        run = trainer.train()
        step_back(trainer, job.folder, job.shards)
    best = trainer.best
    accelerator.free_memory(trainer.model, trainer.optimizer)
    if best is not None:
        with contextlib.suppress(ResourceError):  # without the room for it the run goes on
            state.save(vars(run), best, trained=True)
    return run, best


def _finish(result: Report, writer: output.Writer, device: torch.device) -> None:
    """Complete the report, try the model that was written, and give the folder its name."""
    result.checksums = writer.checksums()
    # Before the self-check, which tries the folder as it is published.
    for name, content in outdated(writer.folder).items():
        write_file(writer.folder / name, content)
    result.self_check = SelfCheckSection(**self_check(writer.folder, device))
    write_report(result, writer.folder)
    writer.publish()

"""The story of a healing run: measure, train, write, measure again."""

from __future__ import annotations

import hashlib
import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from mla_convert.core import runtime as environment
from mla_convert.core.errors import InputError, MlaConvertError, UsageError
from mla_convert.core.files import on_disk, write_file
from mla_convert.core.progress import Progress
from mla_convert.core.report_file import read_content
from mla_convert.core.report_schema import (
    EvaluationSection,
    HealingSettings,
    HealSection,
    Measurement,
    PhaseEntry,
    Report,
    SelfCheckSection,
    parse_report,
)
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.words import expanded
from mla_convert.evaluate.quality.evaluation import Evaluation, evaluate_model
from mla_convert.evaluate.quality.probes import ProbeSettings
from mla_convert.heal import data
from mla_convert.heal.fingerprint import content_of, text_content
from mla_convert.heal.loop import Run, Trainer, step_sizes
from mla_convert.heal.output import write_report, write_weights
from mla_convert.heal.settings import HealConfig, HealSettings
from mla_convert.heal.state import StateFolder, state_folder
from mla_convert.heal.teacher_student import TeacherStudent, peft
from mla_convert.method.calibrate import self_generated as selfwritten
from mla_convert.source import mixture, texts
from mla_convert.source.load_model import (
    find_model,
    find_original,
    is_converted,
    load_model,
    load_tokenizer,
    model_config,
)
from mla_convert.source.place import SourceLocation
from mla_convert.source.tokens import ordinary_tokens
from mla_convert.write import writer as output
from mla_convert.write.intact import check_input
from mla_convert.write.known_files import check_unknown, outdated
from mla_convert.write.selfcheck import self_check

LABEL, BEFORE = "text.json", "before-{}.json"
ERRORS_NOTE = "the errors of single layers are those of the conversion, before healing"
ADAPTED_NOTE = (
    "healed with the text's cross-entropy too: what that takes off the perplexity is adaptation to the text; the KL divergence "
    "says how far the model is from its original"
)


def heal(config: HealConfig, progress: Progress | None = None) -> Report | None:
    """Distil the original into a converted model, write the healed folder, and return its report (None in other processes
    than the first).

    With several processes (`accelerate launch`) all call this with equal arguments. A run that died goes on from its last
    checkpoint when it is called again with the same ones.

    Raises:
        InputError: no converted model, original or text that can be used, or nothing gained; nothing is written.
        UsageError: settings that contradict each other, or an original that has to be named.
        ResourceError: disk, device or network did not suffice.
    """
    accelerator = _accelerator(config)
    main = accelerator.is_main_process
    progress = (progress or Progress()) if main else Progress(quiet=True)
    phases = environment.Phases(accelerator.device)
    folder, report = _folder(config)
    if main and (note := check_input(folder)):
        progress.note(note)
    place, origin = find_model(str(folder)), _original(config, report)
    out = config.out or folder
    output.check_output(out, origin.folder, config.overwrite)
    shards = sorted(report.checksums)
    output.check_space(out, sum((folder / shard).stat().st_size for shard in shards))
    settings = HealSettings.model_validate(config.model_dump(include=set(HealSettings.model_fields)))

    _check_apart(config.data, config.eval)
    settings = _with_length(settings, getattr(model_config(place), "max_position_embeddings", None))

    result = None
    identity = _identity(accelerator, settings, folder, origin) if main else {}
    with StateFolder(state_folder(Path(os.path.realpath(out))), identity, accelerator, progress.note) as state:
        label = _corpus(state, accelerator, settings, place, origin, progress)
        before = state.remember(
            BEFORE.format(_measured_by(config)),
            lambda: _figures(_measure(config, folder, origin, accelerator, progress, label)).as_dict(),
        )
        with phases.phase("heal"):
            run, best = _train(accelerator, settings, place, origin, state, progress)
        if best is None:
            state.remove()
            why = f" ({run.stopped})" if run.stopped else ""
            raise InputError(
                f"healing found nothing better than the start on held-out text{why}: nothing is written; lower --lr, or "
                f"give more --tokens or other --data"
            )
        if main:
            with output.Writer(Path(os.path.realpath(out)), {"heal": report.checksums}) as writer:
                write_weights(writer, folder, shards, best)
                report.write(writer.folder)  # says how to measure it
                after = _measure(config, writer.folder, origin, accelerator, progress, label)
                record = _record(settings, origin, label, run, accelerator)
                result = _healed(report, record, Measurement.model_validate(before), _figures(after), phases)
                result.checksums = writer.checksums()
                for name, content in outdated(writer.folder).items():
                    write_file(writer.folder / name, content)
                result.self_check = SelfCheckSection(**self_check(writer.folder, accelerator.device))
                write_report(result, writer.folder)
                writer.publish()
        accelerator.wait_for_everyone()
        state.remove()
    return result


def heal_conversion(config: ConvertConfig, report: Report, progress: Progress) -> Report:
    """Heal what was just converted, in place, as its settings say; returns the healed model's report.

    Raises:
        MlaConvertError: as `heal`; the conversion stays as it is.
    """
    given = {"data": _heal_text(config), "length": config.heal_length, "train": config.heal_train,
             "lr": config.heal_lr, "self_share": config.heal_self_share,
             "eval": config.eval, "seed": config.seed, "teacher_revision": config.revision}  # fmt: skip
    windows = report.evaluation.before
    try:
        healed = heal(
            HealConfig(
                folder=report.out, teacher=config.source, device=config.device, tokens=config.heal_tokens,
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
    device = environment.pick_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if on_gpu else "no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),  # one process measures and writes, the others wait
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def _folder(config: HealConfig) -> tuple[Path, Report]:
    folder = Path(os.path.realpath(expanded(config.folder)))
    if not folder.is_dir():
        raise InputError(f"{config.folder} is not a folder: give the folder of a converted model")
    content = read_content(folder)
    if not isinstance(content.get("checksums"), dict) or not is_converted(model_config(find_model(str(folder)))):
        raise InputError(f"{config.folder} is not the folder of a converted model")
    if config.out is None or os.path.realpath(config.out) == str(folder):
        check_unknown(folder, content["checksums"])  # what is not written again would be lost
    return folder, parse_report(content)


def _heal_text(config: ConvertConfig) -> str | None:
    """The text that a conversion's healing trains on: one, as it is read from its beginning.

    Raises:
        UsageError: the calibration texts are several, and none was named for healing.
    """
    if config.heal_data or not config.calib:
        return config.heal_data
    several = mixture.parts(config.calib)
    if len(several) > 1:
        raise UsageError("healing trains on one text and calibration has several: name one with --heal-data")
    return several[0].spec


def check_conversion(config: ConvertConfig, limit: int | None) -> None:
    """Refuse before a conversion what would fail when it is healed. `limit` is the model's context, if it has one.

    Raises:
        InputError: a text that is not there.
        UsageError: windows longer than the model's context, or LoRA without peft.
    """
    if not config.heal_tokens:
        return
    spec = _heal_text(config)
    _check_apart(spec, config.eval)
    texts.load_documents(spec)
    _with_length(HealSettings(tokens=config.heal_tokens, length=config.heal_length), limit)
    if config.heal_train == "lora":
        peft()


def _check_apart(trained: str | None, measured: str | None) -> None:
    if trained is not None and trained == measured:
        raise UsageError(f"{measured} is what is trained on: give another text as --eval, or to train on")


def _with_length(settings: HealSettings, limit: int | None) -> HealSettings:
    """Window lengths spelled out, none above what the model can read.

    Raises:
        UsageError: one is.
    """
    mix = settings.mix(limit)
    longest = max(length for length, _ in mix)
    if limit and longest > limit:
        raise UsageError(f"windows of {longest} tokens are longer than the model's context of {limit}: lower --length")
    words = ",".join(f"{length}:{share:g}" for length, share in mix) if len(mix) > 1 else str(longest)
    return settings.model_copy(update={"length": words})


def _original(config: HealConfig, report: Report) -> SourceLocation:
    origin = find_model(config.teacher, config.teacher_revision) if config.teacher else find_original(report)
    if origin is None:
        raise UsageError("the original is not where the report says: give --teacher")
    if is_converted(model_config(origin)):
        raise InputError(f"{origin.label} is a converted model: --teacher is for the original")
    return origin


def _identity(accelerator: Accelerator, settings: HealSettings, folder: Path, origin: SourceLocation) -> dict[str, Any]:
    """What a checkpoint must agree on. How often to write one, and how large a forward pass is, are not of that kind."""
    same = settings.model_dump(exclude={"checkpoint_minutes", "micro_tokens", "patience"})
    return {"settings": same, "converted": content_of(folder),
            "original": [origin.label, origin.revision, content_of(origin.folder, origin.gguf)],
            "text": text_content(settings.data),
            "engine": [str(accelerator.distributed_type), accelerator.num_processes, accelerator.device.type],
            "versions": environment.versions()}  # fmt: skip


def _measured_by(config: HealConfig) -> str:
    """What tells one way to measure from another: figures of the two are not compared."""
    how = [
        config.eval,
        text_content(config.eval),
        config.eval_windows,
        config.eval_length,
        config.passkey,
        config.passkey_length,
    ]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]


def _corpus(
    state: StateFolder,
    accelerator: Accelerator,
    settings: HealSettings,
    place: SourceLocation,
    origin: SourceLocation,
    progress: Progress,
) -> str:
    """Tokenised once, by the first process; the label of its text."""

    def make() -> dict[str, str]:
        with on_disk("the text's tokens", state.folder.parent):
            return tokenised()

    def tokenised() -> dict[str, str]:
        tokenizer = load_tokenizer(place)
        label = data.make_corpus(
            settings.data, tokenizer, data.wanted_tokens(settings.tokens), state.folder, settings.joined,
            texts.reach(model_config(place), learned=False),
        )  # fmt: skip
        data.check_enough(data.open_corpus(state.folder), settings.mix(None))
        if settings.self_share:
            data.add_written(state.folder, _written(accelerator, settings, origin, tokenizer, progress))
        return {"label": label}

    return state.remember(LABEL, make)["label"]


def _written(
    accelerator: Accelerator, settings: HealSettings, origin: SourceLocation, tokenizer: Any, progress: Progress
) -> np.ndarray:
    """Token ids (N,) of texts that the original wrote, each behind the token that it continued."""
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    original = load_model(origin, dtype, accelerator.device)
    limit = getattr(original.config, "max_position_embeddings", None) or selfwritten.TEXT_TOKENS
    whole = min(selfwritten.TEXT_TOKENS, limit)
    count = math.ceil(settings.written_tokens(limit) / whole)
    first = selfwritten.first_token(tokenizer, original.config.vocab_size)
    progress.note(f"the original writes {count:,} texts of {whole} tokens")
    progress.begin("write", count * (whole - 1))
    try:
        rows = selfwritten.write(original, count, whole - 1, first, settings.seed, progress.advance)
    finally:
        progress.stop()
    return F.pad(rows, (1, 0), value=first).flatten().numpy()


def _measure(
    config: HealConfig, folder: Path, origin: SourceLocation, accelerator: Accelerator, progress: Progress, label: str
) -> Evaluation:
    probes = ProbeSettings(
        passkey=config.passkey or config.passkey_length is not None, passkey_length=config.passkey_length
    )
    device = "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)
    found = evaluate_model(str(folder), origin, text=config.eval, windows=config.eval_windows, length=config.eval_length,
                           device=device, probes=probes, progress=Progress(quiet=True))  # fmt: skip
    if found.text == label:
        raise UsageError(f"{label} is what is trained on: give another text as --eval, or to train on")
    progress.note(f"perplexity ×{found.ratio.value:.4f}, KL {found.kl.value:.4f} on {found.text}")
    return found


def _figures(found: Evaluation) -> Measurement:
    """A measurement as a report holds it."""
    content = found.as_dict()
    return Measurement.model_validate({key: content[key] for key in ("evaluation", "probes", "dtype", "device")})


def _train(
    accelerator: Accelerator,
    settings: HealSettings,
    place: SourceLocation,
    origin: SourceLocation,
    state: StateFolder,
    progress: Progress,
) -> tuple[Run, dict[str, torch.Tensor] | None]:
    torch.manual_seed(settings.seed)  # adapters start at random
    on_gpu, host = accelerator.device.type == "cuda", torch.device("cpu")
    frozen = torch.bfloat16 if on_gpu else torch.float32
    student = load_model(place, "auto" if settings.train != "all" else torch.float32, host)
    pair = TeacherStudent(student, load_model(origin, frozen, host), settings, frozen).place(accelerator.device)
    vocabulary = ordinary_tokens(load_tokenizer(place), model_config(place).vocab_size) if settings.noise else None
    trainer = Trainer(accelerator, pair, data.open_corpus(state.folder), settings, state, progress, vocabulary)
    run = trainer.train()
    best = trainer.best
    accelerator.free_memory(trainer.model, trainer.optimizer)
    return run, best


def _record(
    settings: HealSettings, origin: SourceLocation, label: str, run: Run, accelerator: Accelerator
) -> HealSection:
    """The run in a report. Its text is named by a label: a report holds no paths."""
    step, micro = step_sizes(settings, settings.mix(None), accelerator.device.type == "cuda")
    return HealSection(
        settings=HealingSettings(
            **{**settings.model_dump(exclude={"data"}), "step_tokens": step, "micro_tokens": micro}
        ),
        text=label,
        against=origin.label,
        tokens=run.tokens,
        steps=run.step,
        seconds=run.seconds,
        tokens_per_second=round(run.tokens / run.seconds) if run.seconds else None,
        best_tokens=run.best_tokens,
        stopped=run.stopped,
        device=environment.device_name(accelerator.device),
        processes=accelerator.num_processes,
        curve=run.curve,
    )


def _healed(
    report: Report, record: HealSection, before: Measurement, after: Measurement, phases: environment.Phases
) -> Report:
    """The conversion's report with the healed model's figures; those that they replace are kept under `heal`."""
    figures = after.evaluation.entries()
    evaluation = EvaluationSection(**{key: value for key, value in figures.items() if key not in ("kl", "agreement")})
    notes = [ERRORS_NOTE, *([ADAPTED_NOTE] if record.settings.ce_weight else [])]
    record.before = before
    record.conversion = Measurement(evaluation=report.evaluation, probes=report.probes)
    return report.model_copy(
        update={
            "evaluation": evaluation,
            "probes": after.probes,
            "phases": {**report.phases, **{name: PhaseEntry(**entry) for name, entry in phases.results.items()}},
            "notes": [*(note for note in report.notes or [] if note not in notes), *notes],
            "heal": record,
        }
    )

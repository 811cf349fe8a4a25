"""Checks of a healing run's inputs, made before anything is measured or trained."""

from __future__ import annotations

import os
from pathlib import Path

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.report_file import read_content
from mla_convert.core.report_schema import Report, parse_report
from mla_convert.core.settings import ConvertConfig
from mla_convert.core.words import expanded
from mla_convert.heal.settings import HealConfig, HealSettings
from mla_convert.heal.teacher_student import peft
from mla_convert.source import mixture, texts
from mla_convert.source.load_model import find_model, find_original, is_converted, model_config
from mla_convert.source.place import SourceLocation
from mla_convert.write.known_files import check_unknown


def open_converted(given: Path, out: Path | None) -> tuple[Path, Report]:
    """Folder of the converted model, and its report.

    Args:
        given: the folder as it was given.
        out: where the result is written; None: in place.

    Raises:
        InputError: it is no converted model, or holds files that writing in place would delete.
    """
    # Through links, so that an --out that names this folder in another way is known to be in place.
    folder = Path(os.path.realpath(expanded(given)))
    if not folder.is_dir():
        raise InputError(f"{given} is not a folder: give the folder of a converted model")
    content = read_content(folder)
    if not isinstance(content.get("checksums"), dict) or not is_converted(model_config(find_model(str(folder)))):
        raise InputError(f"{given} is not the folder of a converted model")
    if out is None or os.path.realpath(out) == str(folder):
        check_unknown(folder, content["checksums"])
    return folder, parse_report(content)


def find_teacher(config: HealConfig, report: Report) -> SourceLocation:
    """The original: as it was given, or the source that the report names.

    Raises:
        InputError: it is a converted model.
        UsageError: it is not where the report says.
    """
    origin = find_model(config.teacher, config.teacher_revision) if config.teacher else find_original(report)
    if origin is None:
        raise UsageError("the original is not where the report says: give --teacher")
    # A converted model in the original's place would pass on its own losses.
    if is_converted(model_config(origin)):
        raise InputError(f"{origin.label} is a converted model: --teacher is for the original")
    return origin


def check_apart(trained: str | list[str] | None, measured: str | None) -> None:
    """Refuse to evaluate on a text that is trained on.

    Raises:
        UsageError: `measured` is one of the texts in `trained`.
    """
    # Names alone are compared here. Labels, which also tell the same text under another name, are known once it is read
    # (`run._measure`).
    if measured in (part.spec for part in mixture.parts(trained, "training")):
        raise UsageError(f"{measured} is the text to train on: give another text as --eval, or to train on")


def with_length(settings: HealSettings, limit: int | None) -> HealSettings:
    """The settings with their window lengths spelled out.

    Args:
        settings: of the run.
        limit: longest context of the model in tokens, if it has one.

    Raises:
        UsageError: a window is longer.
    """
    mix = settings.mix(limit)
    longest = max(length for length, _ in mix)
    if limit and longest > limit:
        raise UsageError(f"windows of {longest} tokens are longer than the model's context of {limit}: lower --length")
    # Spelled out, because later readers (`settings.mix(None)`, the checkpoint's identity, the report) do not know the
    # model's limit.
    words = ",".join(f"{length}:{fraction:g}" for length, fraction in mix) if len(mix) > 1 else str(longest)
    return settings.model_copy(update={"length": words})


def conversion_text(config: ConvertConfig) -> str | list[str] | None:
    """The texts that a conversion's healing trains on: `heal_data`, or the calibration's."""
    return config.heal_data or config.calib


def check_conversion(config: ConvertConfig, limit: int | None) -> None:
    """Refuse, before a conversion, settings with which its healing would fail.

    Args:
        config: of the conversion.
        limit: longest context of the model in tokens, if it has one.

    Raises:
        InputError: the text cannot be read.
        UsageError: windows are longer than the model's context, or LoRA lacks peft.
    """
    if not config.heal_tokens:
        return
    spec = conversion_text(config)
    check_apart(spec, config.eval)
    for part in mixture.parts(spec, "training"):
        texts.load_documents(part.spec)
    with_length(HealSettings(tokens=config.heal_tokens, length=config.heal_length), limit)
    if config.heal_train == "lora":
        peft()

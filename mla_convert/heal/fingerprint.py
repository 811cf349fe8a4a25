"""Identity of a healing run by the content of its inputs: a checkpoint from other weights or another text is of no use."""

from __future__ import annotations

import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mla_convert.core import runtime
from mla_convert.core.errors import InputError
from mla_convert.core.sums import sha256
from mla_convert.core.words import expanded
from mla_convert.heal.settings import HealConfig, HealSettings
from mla_convert.source import mixture
from mla_convert.source.place import SourceLocation
from mla_convert.source.texts import PACKAGE

# Files of a model's folder that change its output: weights, configuration, tokenizer; and reports, which do not.
KINDS = (".safetensors", ".json", ".model", ".txt", ".jinja")
REPORTS = ("report.json", "export.json")


def content_of(folder: Path, gguf: str | None = None) -> dict[str, str]:
    """sha256, by name, of the files that a model is loaded from.

    Args:
        folder: of the model.
        gguf: name of the one file that holds it, if it is a GGUF file.

    Raises:
        InputError: one of them cannot be read.
    """
    names = (
        [gguf]
        if gguf
        else [entry.name for entry in os.scandir(folder) if entry.name.endswith(KINDS) and entry.is_file()]
    )
    sums = {}
    for name in sorted(names):
        if name not in REPORTS:
            try:
                sums[name] = sha256(folder / name)
            except OSError as error:
                raise InputError(f"{name} in {folder} cannot be read ({error.strerror})") from error
    return sums


def text_content(spec: str | None) -> str | None:
    """sha256 of a text file; None for a data set, which its name identifies."""
    if spec is None:
        return None
    if spec.startswith(PACKAGE):
        package, _, name = spec.removeprefix(PACKAGE).partition("/")
        return hashlib.sha256(resources.files(package).joinpath(name).read_bytes()).hexdigest()
    path = expanded(spec)
    return sha256(path) if path.is_file() else None


def run_identity(
    accelerator: Accelerator, settings: HealSettings, folder: Path, origin: SourceLocation
) -> dict[str, Any]:
    """Everything that a checkpoint must agree on; not how often one is written, or the size of a forward pass."""
    # Device and libraries count too: a resumed run has to give the bytes of an uninterrupted one, and other kernels
    # round in another way.
    same = settings.model_dump(exclude={"checkpoint_minutes", "micro_tokens", "patience"})
    return {"settings": same, "converted": content_of(folder),
            "original": [origin.label, origin.revision, content_of(origin.folder, origin.gguf)],
            "text": [text_content(part.spec) for part in mixture.parts(settings.data, "training")],
            "task": [text_content(part.spec) for part in mixture.parts(settings.for_task, "task")] if settings.for_task else [],
            "engine": [str(accelerator.distributed_type), accelerator.num_processes, accelerator.device.type],
            "versions": runtime.versions()}  # fmt: skip


def measurement_key(config: HealConfig) -> str:
    """Name of the evaluation's settings and text: only values measured in the same way are compared."""
    how = [
        config.eval,
        text_content(config.eval),
        config.eval_windows,
        config.eval_length,
        config.passkey,
        config.passkey_length,
    ]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]

"""recipe.yaml of a converted folder: every setting of the run, so that it can be run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mla_convert.core.settings import PACKAGE, Settings
from mla_convert.method.factorise.sizes import DEFAULT_RATIO
from mla_convert.pipeline.resolve import ResolvedConversion
from mla_convert.report.report import Report
from mla_convert.source import mixture
from mla_convert.source.texts import Windows, repeatable

RECIPE = "recipe.yaml"
HEAD = """\
# Every setting of the run that wrote this folder, on {device} with torch {torch} and transformers {transformers}.
# `mla-convert --recipe {file}` runs it again: the same source, texts, versions and device give the same bytes.
"""


def write_recipe(folder: Path, resolved: ResolvedConversion, windows: Windows, report: Report) -> None:
    """Write recipe.yaml: the settings that were given, and those that were resolved for the others.

    Local files and folders are written by their names alone, because a converted folder is made to be published; a comment
    names each of them.

    Args:
        folder: Where to write.
        resolved: The conversion, with the calibration windows that its text filled.
        windows: Its texts.
        report: Its report.
    """
    source, config, plan = resolved.source, resolved.settings, resolved.plan
    settings, local = _settings(resolved, windows, report)
    packaged = config.source.startswith(PACKAGE)
    if not packaged and source.revision is None:
        local.insert(0, ("SOURCE", source.name))
    content = {
        "description": f"{source.name}, rank {plan.rank} + {plan.rope_dim} rotary.",
        "source": config.source if packaged else source.name,
        **({"revision": source.revision} if source.revision else {}),
        "settings": settings,
    }
    text = HEAD.format(device=report.device, file=RECIPE, **report.versions)
    for option, name in local:
        text += f"# {name} was a local file or folder: have it in the working folder, or give its path as {option}.\n"
    text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    (folder / RECIPE).write_text(text, encoding="utf-8")


def _settings(
    resolved: ResolvedConversion, windows: Windows, report: Report
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The recipe's settings, and the options that name local files, with those names."""
    config = resolved.settings
    # a budget and kv_ratio are replaced by what follows from them; kv_ratio stays where layers share out its bytes
    by_bytes = resolved.plan.budget is not None
    sizes = {"rank": resolved.plan.rank, "rope_dim": resolved.plan.rope_dim}
    if by_bytes:
        sizes = {"kv_ratio": DEFAULT_RATIO if config.kv_ratio is None else config.kv_ratio}
    left_out = {"budget", "kv_ratio", *({"rank"} if by_bytes else ())}
    settings = config.model_dump(mode="json", include=set(Settings.model_fields) - left_out)
    settings |= resolved.chosen | sizes
    settings |= {
        "calib_samples": resolved.calibration[0],
        "calib_length": windows.calib.shape[1],
        # Without an evaluation, `windows.evaluation` is a window of the calibration text.
        "eval_length": windows.evaluation.shape[1] if windows.evaluated else config.eval_length,
        "suite_windows": report.measured.suite.windows if report.measured and report.measured.suite else 0,
    }
    optional = {
        "engine",
        "held_out",
        "original_cache",
        "cache_group",
        "cache_rope",
        "nope_dim",
        *(key for key in settings if key.startswith("heal_")),
    }
    settings = {key: value for key, value in settings.items() if key not in optional or value is not None}
    local: list[tuple[str, str]] = []
    for key, given in (("calib", config.calib), ("heal_data", config.heal_data)):
        if key == "heal_data" and not given:
            continue
        names = []
        for part in mixture.parts(given):
            name, is_file = repeatable(part.spec, "", "calibration")
            names.append(str(replace(part, spec=name)))
            if is_file:
                local.append((f"--{key.replace('_', '-')}", name))
        settings[key] = names[0] if len(names) == 1 else names
    texts = [("eval", windows.eval_text, "evaluation")]
    if config.held_out:
        texts.append(("held_out", windows.held_out_text or "", "held-out"))
    for key, label, purpose in texts:
        settings[key], is_file = repeatable(getattr(config, key), label, purpose)
        if is_file:
            local.append((f"--{key.replace('_', '-')}", settings[key]))
    return settings, local

"""recipe.yaml of a converted folder: every setting of the run, so that it can be run again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from mla_convert.core.settings import PACKAGE, ConvertConfig, Settings
from mla_convert.method.factorise.sizes import Plan
from mla_convert.method.refine.optimise import RefineSettings
from mla_convert.report.report import Report
from mla_convert.source import mixture
from mla_convert.source.source import Source
from mla_convert.source.texts import Windows, repeatable

RECIPE = "recipe.yaml"
HEAD = """\
# Every setting of the run that wrote this folder, on {device} with torch {torch} and transformers {transformers}.
# `mla-convert --recipe {file}` runs it again: the same source, texts, versions and device give the same bytes.
"""


def write_recipe(
    folder: Path,
    config: ConvertConfig,
    source: Source,
    plan: Plan,
    windows: Windows,
    refine: RefineSettings,
    self_written: float,
    report: Report,
) -> None:
    """Write recipe.yaml: what was given, and what stood in for what was not.

    Local files and folders are written by their names alone, as a converted folder is made to be published; a comment
    says which.
    """
    settings = config.model_dump(mode="json", include=set(Settings.model_fields) - {"kv_ratio", "engine"})
    settings |= {
        "rank": plan.rank,
        "rope_dim": plan.rope_dim,
        "calib_samples": windows.calib.shape[0],
        "calib_length": windows.calib.shape[1],
        "calib_self": self_written,
        "eval_length": windows.evaluation.shape[1] if windows.evaluated else config.eval_length,
        "refine_steps": refine.steps,
        "refine_batch": refine.batch,
        "refine_block": refine.block,
        "block_steps": refine.block_steps,
        "output_steps": refine.output_steps,
        "output_layers": refine.output_layers,
        "suite_windows": report.measured.suite.windows if report.measured and report.measured.suite else 0,
    }
    settings = {key: value for key, value in settings.items() if not key.startswith("heal_") or value is not None}
    local = []
    named = []
    for part in mixture.parts(config.calib):
        name, is_file = repeatable(part.spec, "", "calibration")
        named.append(str(replace(part, spec=name)))
        if is_file:
            local.append(("--calib", name))
    settings["calib"] = named[0] if len(named) == 1 else named
    texts = [("eval", windows.eval_text, "evaluation")]
    if config.held_out:
        texts.append(("held_out", windows.held_out_text, "held-out"))
    else:
        del settings["held_out"]  # nothing stood in for it
    if config.heal_data:
        texts.append(("heal_data", "", "calibration"))
    for key, label, purpose in texts:
        settings[key], is_file = repeatable(getattr(config, key), label, purpose)
        if is_file:
            local.append((f"--{key.replace('_', '-')}", settings[key]))
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

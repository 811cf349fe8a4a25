"""The model card (README.md) of a converted model, made from its report alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mla_convert.core.files import write_file
from mla_convert.core.report_schema import (
    EvaluationSection,
    HealSection,
    LayerEntry,
    ProbesSection,
    Report,
    SelfCheckSection,
    SourceSection,
    SuiteSection,
)
from mla_convert.report import format, frontier
from mla_convert.report.quality_rows import (
    compared,
    kinds_table,
    probe_conditions,
    probe_rows,
    suite_conditions,
    suite_headline,
)
from mla_convert.report.table import Table
from mla_convert.report.tables import report_table
from mla_convert.source.families import WHOLES
from mla_convert.source.licence import CARD

BODY = """
# {name} with Multi-head Latent Attention

{base} with its {before} key/value numbers per token and layer replaced by a latent of {rank} and a rotary key of
{rope}{cached}: **{saved:.1%} less KV cache**, perplexity {ratio}{headline}. Converted by mla_convert {version}; {untouched}

{table}

{measured} Calibrated on {calibration}. {worst}`report.json` has every
figure, `report.html` shows them, and `recipe.yaml` repeats the run.
{kinds}{caches}{probes}
## Load

```python
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("{folder}", trust_remote_code=True)
{variable} = {reader}.from_pretrained("{folder}", trust_remote_code=True)
```

With `import mla_convert` neither needs the flag. {tried}`generate` caches {after} numbers per token and layer{packed}, in
transformers' own dynamic and static caches.

## Limits

Cached decoding runs on the CUDA and Triton kernels of `mla_attention` where they are installed, all other attention on
PyTorch's SDPA or eager attention; flash and flex attention are not supported. Serving engines load an export
(`mla-convert export`), not this folder. {yours}What the original was made for,
and what it gets wrong, holds for this model too.

## Licence

{licence}
"""
# A data set as reports name it: NAME:CONFIG@SPLIT, perhaps with a remark in brackets on why it was chosen.
DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?@(?P<split>[\w.-]+)")


def write_card(report: Report, folder: Path) -> None:
    """Write README.md into the folder of a converted model."""
    write_file(folder / CARD, card_text(report))


def card_text(report: Report) -> str:
    """The content of README.md."""
    source, evaluation, cache = report.source, report.measured, report.cache
    # A folder's name may be that of nothing, or of something else, on the Hub.
    on_hub, whole = source.revision is not None, source.model_type in WHOLES
    link = f"[{source.name}](https://huggingface.co/{source.name}), at revision `{source.revision}`,"
    suite = evaluation.suite if evaluation else None
    body = BODY.format(
        name=source.name,
        base=link if on_hub else source.name,
        before=cache.numbers_per_token_per_layer.before,
        after=cache.numbers_per_token_per_layer.after,
        rank=cache.kv_lora_rank,
        rope=cache.qk_rope_head_dim,
        saved=cache.share_saved,
        cached=format.latent_words(cache.latent_cache),
        packed=" as packed rows of bytes" if cache.latent_cache else "",
        ratio=f"**{format.times(evaluation.ratio, 4)}**" if evaluation else "not evaluated",
        headline=f", **{suite_headline(suite)}**" if suite and compared(suite) else "",
        kinds=_kinds(suite),
        caches=_caches(report),
        version=report.versions.get("mla_convert", ""),
        untouched=_untouched(report.heal),
        table=report_table(report).markdown(),
        measured=_measured(evaluation),
        yours="The perplexity above is for the text named; measure yours. " if evaluation else "",
        calibration=format.calibration_text(report.calibration),
        worst=_content(report.layers) + _worst(report.layers),
        probes=_probes(report.probes),
        # `push` replaces it by the repository's name (publish/hub.py).
        folder=".",
        auto="AutoModelForImageTextToText" if whole else "AutoModelForCausalLM",
        reader="AutoProcessor" if whole else "AutoTokenizer",
        variable="processor" if whole else "tokenizer",
        tried=_tried(report.self_check),
        licence=_licence(source),
    )
    return str(ModelCard(f"---\n{_metadata(report, on_hub).to_yaml()}\n---\n{body}"))


def _measured(evaluation: EvaluationSection | None) -> str:
    """The text of the perplexity, in a sentence."""
    if evaluation is None:
        return "Perplexity was not evaluated (`--eval none`): measure it with `mla-convert eval` before you use this model."
    return f"Perplexity on {evaluation.text}: {evaluation.protocol}."


def _metadata(report: Report, on_hub: bool) -> ModelCardData:
    source = report.source
    return ModelCardData(
        model_name=f"{source.name} MLA",
        base_model=source.name if on_hub else None,
        # Of the Hub's relations this is the one for compressed models.
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if source.model_type in WHOLES else "text-generation",
        license=source.license or "unknown",  # type: ignore[arg-type]  # a list of names is valid, too
        tags=["mla", "multi-head-latent-attention", "kv-cache", "mla_convert"],
        eval_results=_results(report.measured) or None,
        **{key: source.get(key) for key in ("license_name", "license_link") if source.get(key)},
    )


def _results(evaluation: EvaluationSection | None) -> list[EvalResult]:
    """Perplexities for the metadata; a value that is not finite cannot be a result on the Hub."""
    if evaluation is None:
        return []
    dataset = DATASET.match(evaluation.text)
    where: dict[str, Any] = {"dataset_type": "text"}
    if dataset:
        where = {
            "dataset_type": dataset["name"],
            "dataset_config": dataset["config"],
            "dataset_split": dataset["split"],
        }
    sides = (("perplexity", evaluation.after), ("perplexity of the original", evaluation.before))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_name=evaluation.text,
            metric_type="perplexity",
            metric_name=name,
            metric_value=side.value,
            **where,
        )
        for name, side in sides
        if math.isfinite(side.value)
    ]


def _untouched(heal: HealSection | None) -> str:
    """Which weights are the original's, and which were trained end to end, in a sentence."""
    if heal is None or heal.settings is None or heal.tokens is None:
        return "everything but the\nattention is the original's."
    every, weight = heal.settings.train == "all", heal.settings.ce_weight
    adapted = f", and trained on the text itself (cross-entropy, weight {weight:g})," if weight else ""
    return (
        f"then {'all weights were' if every else 'the attention was'}\ndistilled from the original{adapted} on {heal.tokens:,} "
        f"tokens of {heal.text}{'' if every else '; everything else is the original' + chr(39) + 's'}."
    )


def _tried(check: SelfCheckSection | None) -> str:
    """The versions of the self-check, in a sentence."""
    if check is None:
        return ""
    part = "" if check.layers == check.of_layers else f" (the first {check.layers} of {check.of_layers} layers)"
    versions = check.versions
    return (
        f"Tried{part} with transformers {versions.get('transformers')} and torch {versions.get('torch')}: greedy text with a "
        f"dynamic and a static cache is that without one. "
    )


def _worst(layers: list[LayerEntry]) -> str:
    """The layer whose attention output lost most, in a sentence."""
    errors = [(entry.output_error, entry.layer or 0) for entry in layers if math.isfinite(entry.output_error)]
    if not errors:
        return ""
    error, layer = max(errors)
    return f"The attention output of layer {layer} lost most: a mean square error of {error:.1%}, on held-out windows. "


def _content(layers: list[LayerEntry]) -> str:
    """The content dims of narrower heads, in a sentence."""
    words = format.content_words(layers)
    return f"It has {words}. " if words else ""


def _kinds(suite: SuiteSection | None) -> str:
    """A section with every kind of text, where these were measured."""
    if suite is None:
        return ""
    table = kinds_table(suite)
    # The section's heading names the column already.
    named = Table(["", *table.columns[1:]], table.rows)
    return f"\n## Kinds of text\n\n{named.markdown()}\n\n{suite_conditions(suite)}\n"


def _caches(report: Report) -> str:
    """A section on the original with quantised caches beside this model, where these were measured."""
    found = frontier.points(report)
    if not (sentence := frontier.verdict(found)):
        return ""
    words = "KL(original ‖ model) of the next token and perplexity over the original's, on the text above; bytes with their scales"
    return f"\n## Quality at equal bytes\n\n{frontier.table(found).markdown()}\n\n{sentence} {words}.\n"


def _probes(probes: ProbesSection | None) -> str:
    """A section on the quality probes, where any was run."""
    if probes is None or not (rows := probe_rows(probes)):
        return ""
    table = Table(("", "original", "this model"), rows).markdown()
    return f"\n## Quality probes\n\n{table}\n\n{' '.join(probe_conditions(probes))}\n"


def _licence(source: SourceSection) -> str:
    stated = source.license
    if not stated:
        return "That of the original, whose files did not say which one it is: look it up before you use or share this model."
    name = source.license_name or ", ".join([stated] if isinstance(stated, str) else stated)
    terms = f"[{name}]({source.license_link})" if source.license_link else f"`{name}`"
    return f"That of the original: {terms}. Its terms bind this model as well."

"""The model card (README.md) of a converted model, made from its report and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mla_convert.core.files import write_file
from mla_convert.core.report_file import calibration_words, finite, is_evaluated
from mla_convert.evaluate.quality import kinds
from mla_convert.report import quality_rows
from mla_convert.report.report import Report
from mla_convert.report.tables import report_rows
from mla_convert.source.licence import CARD

BODY = """
# {name} with Multi-head Latent Attention

{base} with its {before} key/value numbers per token and layer replaced by a latent of {rank} and a rotary key of
{rope}: **{saved:.1%} less KV cache**, perplexity {ratio}{headline}. Converted by mla_convert {version}; {untouched}

| | before | after | change |
|---|---:|---:|---:|
{table}

{measured} Calibrated on {calibration}. {worst}`report.json` has every
figure, `report.html` shows them, and `recipe.yaml` repeats the run.
{kinds}{beyond}
## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
```

With `import mla_convert` neither needs the flag. {tried}`generate` caches {after} numbers per token and layer, in transformers'
own dynamic and static caches.

## Limits

Cached decoding runs on the CUDA and Triton kernels of `mla_attention` where they are installed, all other attention on
PyTorch's SDPA or eager attention; flash and flex attention are not supported. Serving engines load an export
(`mla-convert export`), not this folder. {yours}What the original was made for,
and what it gets wrong, holds for this model too.

## Licence

{licence}
"""
# A data set as reports name it: NAME:CONFIG@SPLIT, and a remark in brackets on how it was come by.
DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?@(?P<split>[\w.-]+)")


def write_card(report: Report, folder: Path) -> None:
    """Write README.md into the folder of a converted model."""
    write_file(folder / CARD, card_text(report))


def card_text(report: Report) -> str:
    """The content of README.md."""
    source, evaluation, cache = report.source, report.evaluation, report.cache
    on_hub = source.get("revision") is not None
    link = f"[{source['name']}](https://huggingface.co/{source['name']}), at revision `{source.get('revision')}`,"
    body = BODY.format(
        name=source["name"],
        base=link if on_hub else source["name"],
        before=cache["numbers_per_token_per_layer"]["before"],
        after=cache["numbers_per_token_per_layer"]["after"],
        rank=cache["kv_lora_rank"],
        rope=cache["qk_rope_head_dim"],
        saved=cache["share_saved"],
        ratio=f"**×{evaluation['ratio']:.4f}**" if is_evaluated(evaluation) else "not evaluated",
        headline=_headline(evaluation.get("suite")),
        kinds=_kinds(finite(evaluation.get("suite"))),
        version=report.versions.get("mla_convert", ""),
        untouched=_untouched(report.heal),
        table="\n".join(f"| {' | '.join(row)} |" for row in report_rows(report)),
        measured=_measured(evaluation),
        yours="The perplexity above is for the text named; measure yours. " if is_evaluated(evaluation) else "",
        calibration=calibration_words(report.calibration),
        worst=_worst(report.layers),
        beyond=_beyond(report.beyond),
        folder=".",
        tried=_tried(report.self_check),
        licence=_licence(source),
    )
    return str(ModelCard(f"---\n{_metadata(report, on_hub).to_yaml()}\n---\n{body}"))


def _measured(evaluation: dict[str, Any]) -> str:
    """What perplexity was measured on, in a sentence."""
    if not is_evaluated(evaluation):
        return "Perplexity was not evaluated (`--eval none`): measure it with `mla-convert eval` before you use this model."
    return f"Perplexity on {evaluation['text']}: {evaluation['protocol']}."


def _metadata(report: Report, on_hub: bool) -> ModelCardData:
    source, evaluation = report.source, report.evaluation
    dataset = DATASET.match(evaluation["text"] or "")
    where = (
        {"dataset_type": dataset["name"], "dataset_config": dataset["config"], "dataset_split": dataset["split"]}
        if dataset
        else {"dataset_type": "text"}
    )
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_name=evaluation["text"],
            metric_type="perplexity",
            metric_name=name,
            metric_value=evaluation[key]["value"],
            **where,
        )
        for name, key in (("perplexity", "after"), ("perplexity of the original", "before"))
        if is_evaluated(evaluation)
    ]
    return ModelCardData(
        model_name=f"{source['name']} MLA",
        base_model=source["name"] if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=source.get("license") or "unknown",
        tags=["mla", "multi-head-latent-attention", "kv-cache", "mla_convert"],
        eval_results=results or None,
        **{key: source[key] for key in ("license_name", "license_link") if source.get(key)},
    )


def _untouched(heal: dict[str, Any]) -> str:
    """What is still the original's, and what was trained end to end, in a sentence."""
    if not heal:
        return "everything but the\nattention is the original's."
    every, weight = heal["settings"]["train"] == "all", heal["settings"].get("ce_weight")
    adapted = f", and trained on the text itself (cross-entropy, weight {weight:g})," if weight else ""
    return (
        f"then {'all weights were' if every else 'the attention was'}\ndistilled from the original{adapted} on {heal['tokens']:,} "
        f"tokens of {heal['text']}{'' if every else '; everything else is the original' + chr(39) + 's'}."
    )


def _tried(check: dict[str, Any]) -> str:
    """With which versions the folder was tried, in a sentence."""
    if not check:
        return ""
    found = check["versions"]
    part = (
        ""
        if check["layers"] == check["of_layers"]
        else f" (the first {check['layers']} of {check['of_layers']} layers)"
    )
    return (
        f"Tried{part} with transformers {found.get('transformers')} and torch {found.get('torch')}: greedy text with a dynamic "
        f"and a static cache is that without one. "
    )


def _worst(layers: list[dict[str, Any]]) -> str:
    """The layer whose attention output lost most, in a sentence."""
    found = [(layer["output_error"], layer["layer"]) for layer in layers if layer.get("output_error") is not None]
    if not found:
        return ""
    error, layer = max(found)
    return f"The attention output of layer {layer} lost most: a mean square error of {error:.1%}, on held-out windows. "


def _headline(suite: dict[str, Any] | None) -> str:
    """The worst kind of text, beside the perplexity of one."""
    return f", **{kinds.headline(finite(suite))}**" if kinds.compared(suite) else ""


def _kinds(suite: dict[str, Any] | None) -> str:
    """A section with every kind of text, where they were measured."""
    if not suite:
        return ""
    head = "| " + " | ".join(("", *kinds.COLUMNS[1:])) + " |\n|---|" + "---:|" * (len(kinds.COLUMNS) - 1)
    table = "\n".join(f"| {' | '.join(row)} |" for row in kinds.rows(suite))
    return f"\n## Kinds of text\n\n{head}\n{table}\n\n{kinds.conditions(suite)}\n"


def _beyond(content: dict[str, Any]) -> str:
    """A section on quality beyond perplexity, where that was measured."""
    if not content:
        return ""
    table = "\n".join(f"| {' | '.join(row)} |" for row in quality_rows.rows(content))
    words = " ".join(quality_rows.conditions(content))
    return f"\n## Beyond perplexity\n\n| | original | this model |\n|---|---:|---:|\n{table}\n\n{words}\n"


def _licence(source: dict[str, Any]) -> str:
    named = source.get("license")
    if not named:
        return "That of the original, whose files did not say which one it is: look it up before you use or share this model."
    name = source.get("license_name") or ", ".join([named] if isinstance(named, str) else named)
    terms = f"[{name}]({source['license_link']})" if source.get("license_link") else f"`{name}`"
    return f"That of the original: {terms}. Its terms bind this model as well."

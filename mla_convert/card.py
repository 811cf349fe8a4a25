"""The model card (README.md) of a converted model, made from its report."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mla_convert.report import Report, rows

BODY = """
# {name} with Multi-head Latent Attention

[{base}]({link}) with its {before} key/value numbers per token and layer replaced by a latent of {rank} and a rotary key of
{rope}: **{saved:.1%} less KV cache**, perplexity **×{ratio:.4f}**. Converted by mla_convert {version}; everything but the
attention is the original's.

| | before | after | change |
|---|---:|---:|---:|
{table}

Perplexity on {text}: {protocol}. Calibrated on {calibration}.

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
```

With `import mla_convert` neither needs the flag. `generate` caches {after} numbers per token and layer, in transformers'
own dynamic and static caches.

## Limits

Attention runs through PyTorch's SDPA (or eager); flash and flex attention are not supported, nor are serving engines that
do not load transformers models. The perplexity above is for the text named; measure yours.
"""


def write_card(report: Report, folder: Path, license_name: str | None) -> None:
    """Write README.md into the folder of a converted model."""
    source, evaluation, cache = report.source, report.evaluation, report.cache
    on_hub = source["revision"] is not None
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=evaluation["text"],
            metric_type="perplexity",
            metric_name=name,
            metric_value=evaluation[key]["value"],
        )
        for name, key in (("perplexity", "after"), ("perplexity of the original", "before"))
    ]
    data = ModelCardData(
        model_name=f"{source['name']} MLA",
        base_model=source["name"] if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license_name,
        tags=["mla", "multi-head-latent-attention", "kv-cache", "mla_convert"],
        eval_results=results,
    )
    body = BODY.format(
        name=source["name"],
        base=source["name"],
        link=f"https://huggingface.co/{source['name']}" if on_hub else "config.json",
        before=cache["numbers_per_token_per_layer"]["before"],
        after=cache["numbers_per_token_per_layer"]["after"],
        rank=cache["kv_lora_rank"],
        rope=cache["qk_rope_head_dim"],
        saved=cache["share_saved"],
        ratio=evaluation["ratio"],
        version=report.versions.get("mla_convert", ""),
        table="\n".join(f"| {' | '.join(row)} |" for row in rows(report)),
        text=evaluation["text"],
        protocol=evaluation["protocol"],
        calibration=report.calibration["protocol"],
        folder=".",
    )
    (folder / "README.md").write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")), encoding="utf-8")

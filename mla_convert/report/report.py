"""The report of a conversion: report.json is the truth, everything else is made from it."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mla_convert.core.files import write_file
from mla_convert.core.report_file import REPORT, finite, is_evaluated, mean
from mla_convert.evaluate.quality import kinds
from mla_convert.method.factorise.sizes import AttentionShape, Plan

SCHEMA = 1
CONTEXTS = (4096, 32768, 131072)


@dataclass
class Report:
    """Everything measured in one conversion. `report.json` is this, field by field."""

    source: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    cache: dict[str, Any]
    evaluation: dict[str, Any]
    calibration: dict[str, Any]
    layers: list[dict[str, Any]]
    phases: dict[str, dict[str, float]]
    seconds: float
    checksums: dict[str, str]
    schema: int = SCHEMA
    notes: list[str] = field(default_factory=list)
    beyond: dict[str, Any] = field(default_factory=dict)  # added by `eval --into-report`
    heal: dict[str, Any] = field(default_factory=dict)  # added by `heal`
    self_check: dict[str, Any] = field(default_factory=dict)  # what `selfcheck` says of the folder
    out: Path | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity after conversion over the original's; None where it was not evaluated."""
        return self.evaluation["ratio"]

    def as_dict(self) -> dict[str, Any]:
        """As written to report.json: without the local output path, NaN and infinity as null."""
        content = asdict(self)
        content.pop("out")
        for added in ("beyond", "heal", "self_check"):
            if not content[added]:
                content.pop(added)
        return finite(content)

    def write(self, folder: Path) -> None:
        """Write report.json."""
        write_file(folder / REPORT, json.dumps(self.as_dict(), indent=2) + "\n")


def source_figures(
    name: str, revision: str | None, model_type: str, shape: AttentionShape, license_data: dict[str, Any]
) -> dict[str, Any]:
    """What a report says of its source: enough to name it, to draw its attention and to carry its licence over."""
    return {
        "name": name,
        "revision": revision,
        "model_type": model_type,
        "layers": shape.layers,
        "attention_heads": shape.num_heads,
        "key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        **license_data,
    }


def cache_figures(plan: Plan, itemsize: int, windows: list[int | None]) -> dict[str, Any]:
    """KV-cache bytes before and after, for numbers of `itemsize` bytes.

    `windows` are the layers' sliding windows (None: none). A layer with a window holds at most that many tokens.
    """
    numbers = {"before": [plan.shape.cache_numbers] * len(windows), "after": [size.numbers for size in plan.layers]}

    def held(context: int) -> dict[str, int]:
        tokens = [min(context, window) if window else context for window in windows]
        return {side: sum(map(operator.mul, tokens, each)) * itemsize for side, each in numbers.items()}

    before, after = (mean(each) for each in numbers.values())
    return {
        "kv_lora_rank": mean(size.rank for size in plan.layers),
        "qk_rope_head_dim": mean(size.rope_dim for size in plan.layers),
        "numbers_per_token_per_layer": {"before": before, "after": after},
        "bytes_per_number": itemsize,
        "bytes_per_token": held(1),
        "bytes_at_context": {str(context): held(context) for context in CONTEXTS},
        "share_saved": 1 - sum(numbers["after"]) / sum(numbers["before"]),
    }


def human_bytes(number: float) -> str:
    """1234567 -> '1.2 MB' (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """The result in rows of (what, before, after, change)."""
    cache, evaluation = report.cache, report.evaluation
    saved = f"-{cache['share_saved']:.1%}"
    per_token = cache["bytes_per_token"]
    table = [("KV cache per token", human_bytes(per_token["before"]), human_bytes(per_token["after"]), saved)]
    for context, size in cache["bytes_at_context"].items():
        table.append((f"KV cache at {int(context) // 1024}k context", human_bytes(size["before"]),
                      human_bytes(size["after"]), f"-{1 - size['after'] / size['before']:.1%}"))  # fmt: skip
    if not is_evaluated(evaluation):
        return [*table, ("perplexity", "not evaluated", "not evaluated", "")]
    before, after = evaluation["before"]["value"], evaluation["after"]["value"]
    if unhealed := report.heal.get("before"):
        value = unhealed["evaluation"]["after"]["value"]
        table.append(("perplexity, not healed", f"{before:.3f}", _number(value), ratio_words(unhealed["evaluation"])))
    table.append(("perplexity", f"{before:.3f}", f"{after:.3f}", ratio_words(evaluation)))
    if held_out := evaluation.get("held_out"):
        before, after = held_out["before"]["value"], held_out["after"]["value"]
        table.append(("perplexity, held-out text", f"{before:.3f}", f"{after:.3f}", ratio_words(held_out)))
    return table + kinds.summary_rows(finite(evaluation.get("suite")))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def ratio_words(evaluation: dict[str, Any]) -> str:
    """A perplexity ratio with its standard error over windows, if there is one: ×1.0110 ± 0.0012."""
    if evaluation["ratio"] is None:
        return "not finite"
    error = ratio_error(evaluation)
    return f"×{evaluation['ratio']:.4f}" + (f" ± {error:.4f}" if error else "")


def ratio_error(evaluation: dict[str, Any]) -> float | None:
    """Standard error of a perplexity ratio over windows, paired; None for a single window and in older reports."""
    ratio, error = evaluation.get("ratio"), evaluation.get("ratio_log_error")
    return ratio * error if ratio is not None and error is not None and math.isfinite(error) else None


def print_summary(report: Report, console: Console) -> None:
    """The compact table at the end of a run."""
    rank, rope = report.cache["kv_lora_rank"], report.cache["qk_rope_head_dim"]
    table = Table(title=f"{report.source['name']} → MLA, rank {rank} + {rope} rotary", title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(column, justify=justify)
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    evaluation = report.evaluation
    if suite := finite(evaluation.get("suite")):
        console.print(kinds.table(suite))
    spread = "; ± is one standard error over windows" if ratio_error(evaluation) else ""
    texts = ["perplexity was not evaluated, as --eval none asked: `mla-convert eval` does it later"]
    if is_evaluated(evaluation):
        texts = [f"perplexity on {evaluation['text']}: {evaluation['protocol']}{spread}"]
    if held_out := evaluation.get("held_out"):
        texts.append(f"held-out text is {held_out['text']}: {held_out['protocol']}")
    if suite:
        texts.append(kinds.conditions(suite))
    for text in texts:
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"took {report.seconds:.0f} s on {report.device}; written to {report.out}", highlight=False, soft_wrap=True
    )

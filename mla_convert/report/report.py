"""The report of a conversion: report.json is the truth, everything else is made from it."""

from __future__ import annotations

import json
import operator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mla_convert.core.files import write_file
from mla_convert.core.report_file import REPORT, finite, mean
from mla_convert.method.factorise.sizes import Plan
from mla_convert.source.shape import AttentionShape

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
    def perplexity_ratio(self) -> float | None:
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


def source_section(
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


def cache_section(plan: Plan, itemsize: int, windows: list[int | None]) -> dict[str, Any]:
    """KV-cache bytes before and after, for numbers of `itemsize` bytes.

    `windows` are the layers' sliding windows (None: none). A layer with a window holds at most that many tokens.
    """
    numbers = {"before": [plan.shape.cache_width] * len(windows), "after": [size.width for size in plan.layers]}

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

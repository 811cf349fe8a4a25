"""Make docs/reference/families.md from the families and from conversions of their tiny test models (about five minutes).

python scripts/make_families_page.py
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mla_convert.source.families import FAMILIES, REFUSED, Family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "families.md"
TEMPLATE = ROOT / "scripts" / "families_page.md"
HEADER = """| family | checkpoints | attention | variants tested | error | at half | at a quarter |
|---|---|---|---|---:|---:|---:|"""


@dataclass(frozen=True)
class Measured:
    """A family's worst figures over its variants, as fractions (the template defines them)."""

    error: float
    loss_at_half: float
    loss_at_quarter: float


def page(measure: Callable[[Family], Measured]) -> str:
    """The page's text, with the figures that `measure` gives."""
    rows = []
    for name, family in FAMILIES.items():
        worst = measure(family)
        figures = f"{worst.error:.1e} | {worst.loss_at_half:.0%} | {worst.loss_at_quarter:.0%}"
        variants = ", ".join(family.tested)
        rows.append(f"| `{name}` | {family.checkpoints} | {family.traits} | {variants} | {figures} |")
    refused = "\n".join(f"- `{name}`: {reason}." for name, reason in REFUSED.items())
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{table}", "\n".join([HEADER, *rows])).replace("{refused}", refused)


def measure_by_conversion(family: Family) -> Measured:
    """Convert every variant of a family at full rank, at half and at a quarter of its cache."""
    # The tiny models are those of the tests, which are no package.
    sys.path.insert(0, str(ROOT / "tests"))
    import pico

    errors, half, quarter = [], [], []
    for name in family.tested:
        with tempfile.TemporaryDirectory() as folder:
            source = pico.save(name, Path(folder) / "source")
            pico.convert(source, Path(folder) / "full", rank="full", rope_dim="full")
            errors.append(_logit_error(pico.model(name), Path(folder) / "full", pico.VOCAB))
            for losses, budget in ((half, pico.HALF), (quarter, pico.QUARTER)):
                report = pico.convert(source, Path(folder) / f"at {budget['kv_ratio']}", **budget)
                losses.append(max(layer["output_error_closed_form"] for layer in report.layers))
    return Measured(max(errors), max(half), max(quarter))


@torch.no_grad()
def _logit_error(original: torch.nn.Module, converted: Path, vocabulary: int) -> float:
    """Largest difference of a logit, divided by the range of the original's logits."""
    ids = torch.randint(3, vocabulary, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = original(ids).logits
    # In float32, so that the difference is the conversion's and not that of a narrow type.
    logits = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()(ids).logits
    return float((expected - logits).abs().max() / (expected.max() - expected.min()))


if __name__ == "__main__":
    PAGE.write_text(page(measure_by_conversion), encoding="utf-8")

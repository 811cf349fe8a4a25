"""Make docs/reference/families.md from the families and from conversions of their tiny test models (about ten minutes).

python scripts/make_families_page.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mla_convert.source.families import FAMILIES, LATENT, REFUSED, Family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "families.md"
TEMPLATE = ROOT / "scripts" / "families_page.md"
HEADER = """| family | checkpoints | attention | variants tested | error | at half | at a quarter |
|---|---|---|---|---:|---:|---:|"""
# Types of the most downloaded models for text generation. The Hub counts downloads by model, not by type: chosen by hand.
POPULAR = ("qwen3", "qwen2", "llama", "gpt2", "opt", "qwen3_moe", "gemma3_text", "gpt_oss", "mistral", "phi3", "deepseek_v3",
           "qwen3_next", "qwen3_5_text", "gemma2", "gpt_neox", "llama4_text", "gemma4_text", "glm4_moe", "minimax_m2",
           "bloom")  # fmt: skip


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
    parts = {
        "table": "\n".join([HEADER, *rows]),
        "popular": "\n".join(["| type | |", "|---|---|", *(f"| `{name}` | {verdict(name)} |" for name in POPULAR)]),
        "popular_count": str(len(POPULAR)),
        "popular_refused": str(sum(name in REFUSED for name in POPULAR)),
        "supported_count": str(len(FAMILIES)),
        "latent_count": str(len(LATENT)),
        "refused_count": str(len(REFUSED)),
        "refused": "\n".join(
            f"- {', '.join(f'`{name}`' for name in names)}: {reason}." for reason, names in refusals().items()
        ),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    for name, text in parts.items():
        template = template.replace(f"{{{name}}}", text)
    return template


def verdict(name: str) -> str:
    """One cell about a popular type."""
    if name in FAMILIES:
        return f"converted: {FAMILIES[name].checkpoints}"
    return "has latent attention already" if name in LATENT else f"refused: {REFUSED[name]}"


def refusals() -> dict[str, list[str]]:
    """Refused types by their reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def figures_of_page(text: str) -> dict[str, Measured]:
    """The figures that a page has, by family."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {
        row[0].strip("`"): Measured(float(row[4]), float(row[5].strip("%")) / 100, float(row[6].strip("%")) / 100)
        for row in rows
        if len(row) == len(HEADER.splitlines()[0].strip("|").split("|"))
    }


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


def main() -> None:
    """Measure every family, or those of --only, and write the page."""
    parser = argparse.ArgumentParser(description="Make docs/reference/families.md.")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=sorted(FAMILIES),
        help="families to measure: the others keep their figures",
    )
    only = parser.parse_args().only
    known = figures_of_page(PAGE.read_text(encoding="utf-8")) if only else {}
    missing = [name for name in FAMILIES if only and name not in known and name not in only]
    if missing:
        parser.error(f"the page has no figures of {', '.join(missing)}: name these too")

    def measure(family: Family) -> Measured:
        name = family.model_type
        return known[name] if only and name not in only else measure_by_conversion(family)

    PAGE.write_text(page(measure), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the report and the terminal show of a healing run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from mla_convert.core import runtime
from mla_convert.heal.loop import Run, step_sizes, tokens_words
from mla_convert.heal.settings import HealSettings
from mla_convert.report.quality_rows import heal_rows
from mla_convert.source.place import SourceLocation

ERRORS_NOTE = "the errors of single layers are those of the conversion, before healing"
ADAPTED_NOTE = (
    "healed with the text's cross-entropy too: what that takes off the perplexity is adaptation to the text; the KL divergence "
    "says how far the model is from its original"
)


def run_record(
    settings: HealSettings, origin: SourceLocation, label: str, run: Run, accelerator: Accelerator
) -> dict[str, Any]:
    """The run's part of the report's section `heal`. It names the text by its label: a report holds no paths."""
    step, micro = step_sizes(settings, settings.mix(None), accelerator.device.type == "cuda")
    return {
        "settings": {**settings.model_dump(exclude={"data"}), "step_tokens": step, "micro_tokens": micro},
        "text": label,
        "against": origin.label,
        "tokens": run.tokens,
        "steps": run.step,
        "seconds": run.seconds,
        "tokens_per_second": round(run.tokens / run.seconds) if run.seconds else None,
        "best_tokens": run.best_tokens,
        "stopped": run.stopped,
        "device": runtime.device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "curve": run.curve,
    }


def healed_report(
    report: dict[str, Any],
    record: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    phases: runtime.Phases,
) -> dict[str, Any]:
    """The conversion's report with the healed model's values; those that they replace are kept under `heal`.

    Args:
        report: of the conversion.
        record: from `run_record`.
        before: sections `evaluation` and `beyond` of the model that was not healed.
        after: the same of the healed model.
        phases: of the run.
    """
    evaluation = {key: value for key, value in after["evaluation"].items() if key not in ("kl", "agreement")}
    notes = [ERRORS_NOTE, *([ADAPTED_NOTE] if record["settings"]["ce_weight"] else [])]
    return {
        **report,
        "evaluation": evaluation,
        "beyond": after["beyond"],
        "phases": {**report["phases"], **phases.results},
        "notes": [*(note for note in report.get("notes") or [] if note not in notes), *notes],
        "heal": {
            **record,
            "before": before,
            "conversion": {"evaluation": report["evaluation"], "beyond": report.get("beyond")},
        },
    }


def print_summary(report: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the healed model's values beside those before healing, as a table."""
    record, after = report["heal"], {"evaluation": report["evaluation"], "beyond": report["beyond"]}
    table = Table(title=f"{report['source']['name']} → MLA, healed", title_justify="left")
    for column, justify in (("", "left"), ("not healed", "right"), ("healed", "right")):
        table.add_column(column, justify=justify)
    for label, *cells in heal_rows(record["before"], after):
        table.add_row(label, *cells)
    console.print(table)
    stopped = f"; stopped early: {record['stopped']}" if record["stopped"] else ""
    for line in (
        f"on {report['evaluation']['text']}: {report['evaluation']['protocol']}; against {record['against']}",
        f"{tokens_words(record['tokens'])} tokens of {record['text']}, windows of {record['settings']['length']}, "
        f"{record['settings']['train']} trained, best after {tokens_words(record['best_tokens'])}{stopped}",
        f"took {record['seconds']:.0f} s on {record['device']} ({tokens_words(record['tokens_per_second'])} tokens/s); "
        f"written to {folder}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)

"""Makes the report of a healed model, with the run in its section `heal`."""

from __future__ import annotations

from accelerate import Accelerator

from mla_convert.core import runtime
from mla_convert.core.report_schema import (
    EvaluationSection,
    HealingSettings,
    HealSection,
    Measurement,
    PhaseEntry,
    Report,
)
from mla_convert.heal.loop import Run, step_sizes
from mla_convert.heal.settings import HealSettings
from mla_convert.report.frontier import state_of
from mla_convert.report.quality_rows import healed_worse
from mla_convert.source import mixture
from mla_convert.source.place import SourceLocation

ERRORS_NOTE = "the errors of single layers are those of the conversion, before healing"
ADAPTED_NOTE = (
    "healed with the text's cross-entropy too: what that takes off the perplexity is adaptation to the text; the KL divergence "
    "says how far the model is from its original"
)


def text_label(settings: HealSettings, labels: list[str]) -> str:
    """The texts that were trained on, in words."""
    parts = mixture.parts(settings.data, "training")
    count = len(parts)
    label = mixture.label(labels[:count], parts) if settings.data else mixture.PACKAGED_LABEL
    if settings.for_task:
        label += f"; answers of {mixture.label(labels[count:], mixture.parts(settings.for_task, 'task'))}"
    return label


def run_record(
    settings: HealSettings, origin: SourceLocation, label: str, run: Run, accelerator: Accelerator
) -> HealSection:
    """The run's part of the report's section `heal`. It names the text by its label: a report holds no paths."""
    step, micro = step_sizes(settings, settings.mix(None), accelerator.device.type == "cuda")
    # With the sizes that were used where none were set.
    chosen = {**settings.model_dump(exclude={"data", "for_task"}), "step_tokens": step, "micro_tokens": micro}
    return HealSection(
        settings=HealingSettings(**chosen),
        text=label,
        against=origin.label,
        tokens=run.tokens,
        steps=run.step,
        seconds=run.seconds,
        tokens_per_second=round(run.tokens / run.seconds) if run.seconds else None,
        best_tokens=run.best_tokens,
        share=run.share,
        stopped=run.stopped,
        device=runtime.device_name(accelerator.device),
        processes=accelerator.num_processes,
        curve=run.curve,
    )


def healed_report(
    report: Report, record: HealSection, before: Measurement, after: Measurement, phases: runtime.Phases
) -> Report:
    """The conversion's report with the healed model's values; those that they replace are kept under `heal`.

    Args:
        report: of the conversion.
        record: from `run_record`.
        before: the model that was not healed.
        after: the healed model.
        phases: of the run.
    """
    values = after.evaluation.entries()
    evaluation = EvaluationSection(**{key: value for key, value in values.items() if key not in ("kl", "agreement")})
    adapted = record.settings is not None and record.settings.ce_weight
    notes = [ERRORS_NOTE, *([ADAPTED_NOTE] if adapted else []), *healed_worse(before, after)]
    record.before = before
    record.conversion = Measurement(evaluation=report.evaluation, probes=report.probes)
    return report.model_copy(
        update={
            "evaluation": evaluation,
            "probes": after.probes,
            "phases": {**report.phases, **{name: PhaseEntry(**entry) for name, entry in phases.results.items()}},
            # A model that is healed again already has these notes.
            "notes": [*(note for note in report.notes or [] if note not in notes), *notes],
            "heal": record,
            "earlier_states": state_of(report),
        }
    )

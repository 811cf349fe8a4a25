"""Sections of report.json on healing."""

from __future__ import annotations

import math

from pydantic import AliasChoices, Field

from mla_convert.core.report_schema.base import Amount, Count, Measured, Section
from mla_convert.core.report_schema.evaluation import Evaluation
from mla_convert.core.report_schema.probes import ProbesSection


class CurvePoint(Section):
    """Held-out KL divergence in nats after `tokens` tokens of training; `kinds`: by the kind of text, where there are several."""

    tokens: Amount
    kl: Measured = math.nan
    kinds: dict[str, Measured] | None = None


class HealingSettings(Section):
    """The settings of the run; entries without a field here are those of `HealSettings`."""

    train: str | None = None
    self_share: Amount | None = None
    ce_weight: Amount | None = None


class Measurement(Section):
    """Results of one model, as a report holds them."""

    evaluation: Evaluation
    # `beyond` is the name in reports of schema 1.
    probes: ProbesSection | None = Field(
        None, validation_alias=AliasChoices("probes", "beyond"), serialization_alias="probes"
    )
    dtype: str | None = None
    device: str | None = None


class HealSection(Section):
    """A healing run.

    Attributes:
        settings: of the run, without the path of its text.
        text: label of the text.
        against: the original.
        tokens: tokens trained on.
        steps: optimiser steps.
        seconds: time of training.
        tokens_per_second: speed of training.
        best_tokens: tokens after which the best state was reached.
        share: share of the way from the start to that state, at which the weights that were kept lie.
        stopped: why the run ended early; null if it did not.
        device: name of the device.
        processes: number of processes.
        curve: held-out KL divergence over tokens.
        before: the converted model before healing, measured as the healed model was.
        conversion: the conversion's own figures, which the healed model's replace.
    """

    settings: HealingSettings | None = None
    text: str | None = None
    against: str | None = None
    tokens: Amount | None = None
    steps: Count | None = None
    seconds: Amount | None = None
    tokens_per_second: Amount | None = None
    best_tokens: Amount | None = None
    share: Amount | None = None
    stopped: str | None = None
    device: str | None = None
    processes: Count | None = None
    curve: list[CurvePoint] | None = None
    before: Measurement | None = None
    conversion: Measurement | None = None

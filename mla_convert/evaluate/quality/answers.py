"""Asks a model to complete a Python function, by greedy decoding, and makes a program of its answer.

A model with a chat template is asked in a user turn, and the code is taken out of its answer; any other goes on with
the function itself, and its body ends where the indentation does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from mla_convert.core.errors import InputError
from mla_convert.source.chat import turns

MAX_NEW_TOKENS = 512
QUESTION = (
    "Complete the following Python function. Answer with one Python code block that holds the whole function, "
    "with the imports that it needs.\n\n```python\n{prompt}\n```"
)
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """One function: text that ends where its body is to follow, its name, and a test that defines `check(function)`."""

    task: str
    prompt: str
    entry: str
    test: str


def is_templated(tokenizer: Any) -> bool:
    """Whether the model is asked through a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer: Any, problem: Problem, templated: bool) -> list[int]:
    """The tokens that a model goes on from.

    Args:
        tokenizer: the model's.
        problem: the function to complete.
        templated: whether to ask for it in a user turn of the chat template.

    Raises:
        InputError: the chat template fails.
    """
    if not templated:
        return tokenizer(problem.prompt, verbose=False)["input_ids"]
    messages = [{"role": "user", "content": QUESTION.format(prompt=problem.prompt.strip("\n"))}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise InputError(f"the model's chat template cannot write a question: {type(error).__name__}") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@torch.no_grad()
def complete(
    model: nn.Module, tokenizer: Any, problems: list[Problem], batch: int, max_new_tokens: int = MAX_NEW_TOKENS,
    device: torch.device | None = None, templated: bool | None = None, tick: Tick | None = None,
) -> list[str]:  # fmt: skip
    """A model's answers by greedy decoding; problems of similar length share a batch.

    Args:
        model: a causal language model that `generate` works with.
        tokenizer: the model's.
        problems: what to complete.
        batch: problems that are decoded at once, padded on the left.
        max_new_tokens: tokens after which an answer ends.
        device: where the model lies; the device of its first parameter if not given.
        templated: whether to ask through the chat template; if not given, where there is one.
        tick: is told the problems done and all of them.

    Returns:
        The answers in the order of the problems, without what follows the end of a text.

    Raises:
        InputError: the chat template fails.
    """
    templated = is_templated(tokenizer) if templated is None else templated
    device = device or next(model.parameters()).device
    prompts = [prompt_tokens(tokenizer, problem, templated) for problem in problems]
    ends = _ends(model, tokenizer, templated)
    padding = next((each for each in (tokenizer.pad_token_id, *ends) if each is not None), 0)
    # Settings of their own: a model's may sample or penalise repetition, which would be part of the difference of two
    # models.
    settings = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens, pad_token_id=padding,
        eos_token_id=ends or None,
    )  # fmt: skip
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # what does not fit shows at once
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), padding)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            # Padding on the left, so that all prompts end where the answers begin.
            first = width - len(prompts[index])
            ids[row, first:], mask[row, first:] = torch.tensor(prompts[index]), 1
        written = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        for index, row in zip(chosen, written[:, width:].tolist(), strict=True):
            stop = next((at for at, token in enumerate(row) if token in ends), len(row))
            answers[index] = tokenizer.decode(row[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if tick:
            tick(min(start + batch, len(order)), len(order))
    return answers


def _ends(model: nn.Module, tokenizer: Any, templated: bool) -> list[int]:
    """Tokens that end a text, by the generation config, the tokenizer and, where it is used, the chat template."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {*(configured if isinstance(configured, list | tuple) else [configured]), tokenizer.eos_token_id}
    parts = turns(tokenizer, -1) if templated else None
    if parts and parts.after_assistant[0] in tokenizer.added_tokens_decoder:
        found.add(parts.after_assistant[0])
    return sorted(found - {None})


def program(problem: Problem, answer: str, templated: bool) -> str:
    """The whole program: the function as the model completed it, its test, and the call of the test."""
    return f"{_solution(problem, answer, templated)}\n\n{problem.test}\n\ncheck({problem.entry})\n"


def _solution(problem: Problem, answer: str, templated: bool) -> str:
    defined = re.compile(rf"^(?:async )?def {re.escape(problem.entry)}\b", re.MULTILINE)
    if templated:
        blocks = _FENCE.findall(answer) or [answer]
        code = next((block for block in blocks if defined.search(block)), blocks[0])
        if defined.search(code):  # imports and helpers of the prompt stay, for the model may take them for given
            head = problem.prompt[: defined.search(problem.prompt).start()] if defined.search(problem.prompt) else ""
            return f"{head}\n{code}"
        return problem.prompt + code
    # A body ends with the first line that is not indented, but for brackets that close.
    kept, (first, *rest) = [], answer.split("\n")
    for line in rest:
        if line[:1] not in ("", " ", "\t", ")", "]", "}"):
            break
        kept.append(line)
    return problem.prompt + "\n".join([first, *kept])

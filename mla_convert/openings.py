"""How the texts that a model writes itself begin, how freely it chooses their words, and whose turn it is in a dialogue.

From the start of a document alone a model writes mostly of what its training data began with most often. Its other sides
appear behind other beginnings: the chat template's user turn (an instruction-tuned model then writes questions as well as
answers; Magpie, arXiv 2406.08464), code, headings, licences' first words, other languages. And what it knows by heart appears
when likely words are preferred: at temperature 1 one unlikely word ends a recital.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of ten texts so many begin a document, a dialogue, or with one of the OPENINGS; without a chat template there are no dialogues.
DOCUMENTS, DIALOGUES = 3, 3
# Texts take these temperatures in turn, after FREE tokens at temperature 1, which make texts with equal openings differ.
TEMPERATURES, FREE = (1.0, 1.0, 0.8, 0.6), 8
# Tokens after which a user's turn ends if the model has not ended it.
LONGEST_TURN = 96

OPENINGS = (
    # prose, letters, notes
    "# ", "## Introduction\n\n", "Chapter 1\n\n", "Abstract\n\n", "The ", "In ", "A ", "When ",
    "Once upon a time", "How to ", "What is ",
    "Dear ", "Subject: Re: ", "From: ", "Q: ", "Question: ", "Title: ", "News\n\n", "1. ", "- ", "Act I\n\n",
    # files of code
    "#!/usr/bin/env python3\n", "import ", "from ", "from __future__ import annotations\n\n", "def ", "class ",
    '"""', "```python\n",
    "#include <", "#ifndef ", "/*\n * ", "// ", "/**\n * ", "static ", "package main\n\nimport ", "use std::", "pub fn ", "//! ",
    "'use strict'\n\n", "const ", "import React", "export ", "function ", "public class ", "package ", "using System;\n",
    "<?php\n",
    "<!DOCTYPE html>\n", "SELECT ", "CREATE TABLE ", "#!/bin/bash\n", "FROM ", "{\n  \"", "version: ", "module ", "require ",
    "library(",
    "\\documentclass", "diff --git a/", "@", "template <", "interface ", "[package]\nname = ",
    # what accompanies code
    "# Installation\n\n", "## Usage\n\n", "README\n\n", "CHANGELOG\n\n", "NAME\n", "Usage: ", "LICENSE\n\n", "Copyright (c) ",
    "# Copyright ",
    "Terms ", "Article 1\n\n", "Traceback (most recent call last):\n", "Error: ",
    # mathematics
    "Theorem 1. ", "Problem 1. ", "Let $", "Solve ", "Prove that ", "Find ", "Definition. ", "$$", "Example 1. ",
    # other languages
    "Le ", "La ", "Les ", "Der ", "Die ", "Das ", "El ", "Los ", "Il ", "De ", "В ", "На ", "Это ",
    "中国", "我", "这", "在", "日本",
    "これは",
    "한국", "이 ", "ال", "हिन्दी ", "Το ", "Bu ", "Trong ", "W ",
)  # fmt: skip


@dataclass(frozen=True)
class Turns:
    """A chat template in tokens: what comes before the user's first words, what ends a side's turn and begins the other's."""

    head: list[int]
    after_user: list[int]
    after_assistant: list[int]


def turns(tokenizer: Any, first: int) -> Turns | None:
    """The tokenizer's chat template taken apart; None where there is none, or one that does not come apart.

    `first` is a token that stands before every text already.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    marks = [f"zq{index}zq" for index in range(3)]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template raises what it likes
        return None
    pieces, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"])
    head, after_user, after_assistant = pieces
    if not (after_user and after_assistant):
        return None
    return Turns(head[1:] if head[:1] == [first] else head, after_user, after_assistant)


class Script:
    """Tells N texts that are written at once how they begin and go on, token by token, without a look at the device."""

    def __init__(self, prompts: list[list[int]], temperatures: Tensor, chats: Tensor, tails: Turns | None, length: int):
        """`prompts` are the texts' first tokens, `temperatures` and `chats` (N,) theirs and whether they are dialogues."""
        room = min(max(map(len, prompts), default=0), length)
        ids = torch.full((len(prompts), room), -1)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt[:room], dtype=torch.int64)
        self.ids, self.temperatures = ids, temperatures[:, None]
        self.free_until = torch.tensor([len(prompt) + FREE for prompt in prompts])[:, None]
        self.dialogue, self.tails = chats[:, None], tails

    def to(self, device: torch.device) -> Script:
        """On the device that writes, at the start of the texts."""
        self.ids, self.temperatures, self.free_until = (
            each.to(device) for each in (self.ids, self.temperatures, self.free_until)
        )
        self.dialogue = self.dialogue.to(device) & (self.tails is not None)
        if self.tails:
            user, assistant = self.tails.after_user, self.tails.after_assistant
            self._line = torch.tensor([*user, -1, *assistant, -1], device=device)
            self._starts = torch.tensor([0, len(user) + 1], device=device)
            zero = torch.zeros_like(self.free_until)
            # whose turn it is (0: the user's), tokens written in it, and where in the line the text is, or -1
            self._side, self._age, self._at = zero.clone(), zero.clone(), zero - 1
        return self

    def heat(self, step: int) -> Tensor:
        """Temperature (N, 1) of the token at `step`."""
        return torch.where(step < self.free_until, 1.0, self.temperatures)

    def direct(self, step: int, drawn: Tensor) -> Tensor:
        """The tokens (N, 1) that are written at `step` where `drawn` were drawn."""
        if step < self.ids.shape[1]:
            given = self.ids[:, step : step + 1]
            begun = given < 0
        else:
            given, begun = drawn, torch.ones_like(drawn, dtype=torch.bool)
        written = torch.where(begun, drawn, given)
        return self._talk(written, begun) if self.tails else written

    def _talk(self, written: Tensor, begun: Tensor) -> Tensor:
        """Dialogues: where a side ends its turn, the template's own tokens follow up to where the other's begins."""
        active = self.dialogue & begun
        ends = (written == self._line[self._starts[self._side]]) | ((self._side == 0) & (self._age >= LONGEST_TURN))
        self._at = torch.where(active & (self._at < 0) & ends, self._starts[self._side], self._at)
        forced = active & (self._at >= 0)
        written = torch.where(forced, self._line[self._at.clamp_min(0)], written)
        self._at = torch.where(forced, self._at + 1, self._at)
        done = forced & (self._line[self._at.clamp_min(0)] < 0)
        self._at = torch.where(done, -1, self._at)
        self._side = torch.where(done, 1 - self._side, self._side)
        self._age = torch.where(done, 0, self._age + active)
        return written


@dataclass(frozen=True)
class Openings:
    """How the texts of one model begin: made once, asked for any number of texts."""

    tokenizer: Any
    first: int
    seed: int

    def scripts(self, count: int, batch: int, length: int) -> list[Script]:
        """Scripts of `count` texts of `length` tokens, `batch` to each; the last one is filled up."""
        tails = turns(self.tokenizer, self.first)
        generator = torch.Generator().manual_seed(self.seed)
        total = math.ceil(count / batch) * batch
        encoded = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in OPENINGS]
        order = torch.cat([torch.randperm(len(encoded), generator=generator) for _ in range(total // len(encoded) + 1)])
        prompts: list[list[int]] = []
        chats = torch.zeros(total, dtype=torch.bool)
        for index in range(total):
            place = index * 7 % 10  # neighbours begin differently
            chats[index] = tails is not None and DOCUMENTS <= place < DOCUMENTS + DIALOGUES
            if chats[index]:
                prompts.append(tails.head)
            else:
                prompts.append([] if place < DOCUMENTS else encoded[int(order[index])])
        heats = torch.tensor(TEMPERATURES)[torch.randint(len(TEMPERATURES), (total,), generator=generator)]
        parts = (slice(start, start + batch) for start in range(0, total, batch))
        return [Script(prompts[part], heats[part], chats[part], tails, length) for part in parts]

"""How the texts that a model writes itself begin, how freely it chooses their tokens, and whose turn it is in a dialogue.

From the start of a document alone a model writes mostly of what its training data began with most often. Its other sides
appear behind other beginnings: the chat template's user turn (an instruction-tuned model then writes questions as well as
answers; Magpie, arXiv 2406.08464), code, headings, licences' first words, other languages. And what it knows by heart appears
when unlikely tokens are left out: one of them ends a recital. Lower temperatures do that too, but a small model then repeats
itself without end (docs/research/calibration-text.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of ten texts so many begin a document, a dialogue, or with one of the OPENINGS; without a chat template there are no dialogues.
DOCUMENTS, DIALOGUES = 3, 3
# Texts leave out, in turn, tokens that are less likely than this share of the likeliest one (min-p, arXiv 2407.01082).
FLOORS = (0.0, 0.05, 0.1)
# So many more texts are written than are wanted, and those that repeat themselves most are dropped.
SPARE = 1 / 4
# Tokens of a passage that counts as repeated when it occurs again in its text.
PASSAGE = 4
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

    def __init__(self, prompts: list[list[int]], floors: Tensor, chats: Tensor, tails: Turns | None, length: int):
        """`prompts` are the texts' first tokens, `floors` (N,) as FLOORS, and `chats` (N,) whether they are dialogues."""
        room = min(max(map(len, prompts), default=0), length)
        ids = torch.full((len(prompts), room), -1)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt[:room], dtype=torch.int64)
        self.ids, self.floors = ids, floors[:, None]
        self.dialogue, self.tails = chats[:, None], tails

    def to(self, device: torch.device) -> Script:
        """On the device that writes, at the start of the texts."""
        self.ids, self.floors = self.ids.to(device), self.floors.to(device)
        self.dialogue = self.dialogue.to(device) & (self.tails is not None)
        if self.tails:
            user, assistant = self.tails.after_user, self.tails.after_assistant
            self._line = torch.tensor([*user, -1, *assistant, -1], device=device)
            self._starts = torch.tensor([0, len(user) + 1], device=device)
            zero = torch.zeros(self.floors.shape, dtype=torch.int64, device=device)
            # whose turn it is (0: the user's), tokens written in it, and where in the line the text is, or -1
            self._side, self._age, self._at = zero.clone(), zero.clone(), zero - 1
        return self

    def likely(self, probabilities: Tensor) -> Tensor:
        """Next-token probabilities (N, V), not normalised, without those that are left out."""
        least = self.floors * probabilities.amax(-1, keepdim=True)
        return torch.where(probabilities < least, 0.0, probabilities)

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
        floors = torch.tensor(FLOORS)[torch.randint(len(FLOORS), (total,), generator=generator)]
        parts = (slice(start, start + batch) for start in range(0, total, batch))
        return [Script(prompts[part], floors[part], chats[part], tails, length) for part in parts]


def varied(texts: Tensor, count: int) -> Tensor:
    """Those `count` of the texts (N, T) that repeat themselves least, in their order.

    A small model may fall into saying one thing without end, from which nothing can be learnt.
    """
    length = min(PASSAGE, texts.shape[1])
    distinct = torch.tensor([len({tuple(row) for row in text.unfold(0, length, 1).tolist()}) for text in texts])
    best = distinct.sort(descending=True, stable=True).indices[:count]
    return texts[best.sort().values]

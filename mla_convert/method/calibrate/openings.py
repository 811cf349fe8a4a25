"""First tokens of self-generated texts, the sampling of each, and the turns of dialogues.

From the start of a document alone a model generates mostly the most common openings of its training data. Other parts of its
distribution need other openings: the chat template's user turn (an instruction-tuned model then writes questions as well as
answers; Magpie, arXiv 2406.08464), code, headings, licences, other languages. Memorised text appears when unlikely tokens are
left out (min-p sampling, arXiv 2407.01082): one of them ends a recitation. Lower temperatures do that too, but make a small
model repeat itself without end (docs/research/calibration-text.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_convert.source.chat import Turns, turns

# Of ten texts: how many begin a document, and a dialogue; the others begin with one of OPENINGS. Without a chat template there
# are no dialogues.
DOCUMENTS, DIALOGUES = 3, 3
# min-p of the texts, in turn: tokens less likely than this fraction of the likeliest one are left out.
MIN_P = (0.0, 0.05, 0.1)
# Additional texts, as a fraction of those needed; the most repetitive ones are dropped.
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
    # documentation and messages of code
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


class Script:
    """Directs N texts that are generated at once, token by token, without reading from the device."""

    def __init__(self, prompts: list[list[int]], min_p: Tensor, chats: Tensor, template: Turns | None, length: int):
        """Pad the prompts.

        Args:
            prompts: first tokens of each text.
            min_p: (N,), as MIN_P.
            chats: bool (N,), which texts are dialogues.
            template: the chat template; None where there is none.
            length: tokens of a text.
        """
        width = min(max(map(len, prompts), default=0), length)
        ids = torch.full((len(prompts), width), -1)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt[:width], dtype=torch.int64)
        self.ids, self.min_p = ids, min_p[:, None]
        self.dialogue, self.template = chats[:, None], template

    def to(self, device: torch.device) -> Script:
        """Move to the device that generates, and go to the start of the texts; returns self."""
        self.ids, self.min_p = self.ids.to(device), self.min_p.to(device)
        self.dialogue = self.dialogue.to(device) & (self.template is not None)
        if self.template:
            user, assistant = self.template.after_user, self.template.after_assistant
            self._line = torch.tensor([*user, -1, *assistant, -1], device=device)
            self._starts = torch.tensor([0, len(user) + 1], device=device)
            zero = torch.zeros(self.min_p.shape, dtype=torch.int64, device=device)
            # whose turn it is (0: the user's), tokens in it, and the next forced token's index in the line, or -1
            self._side, self._age, self._at = zero.clone(), zero.clone(), zero - 1
        return self

    def likely(self, probabilities: Tensor) -> Tensor:
        """Next-token probabilities (N, V) after min-p, not normalised."""
        least = self.min_p * probabilities.amax(-1, keepdim=True)
        return torch.where(probabilities < least, 0.0, probabilities)

    def direct(self, step: int, drawn: Tensor) -> Tensor:
        """The tokens (N, 1) of the texts at `step`: the prompt's, the template's, or else those in `drawn`."""
        if step < self.ids.shape[1]:
            given = self.ids[:, step : step + 1]
            begun = given < 0
        else:
            given, begun = drawn, torch.ones_like(drawn, dtype=torch.bool)
        written = torch.where(begun, drawn, given)
        return self._talk(written, begun) if self.template else written

    def _talk(self, written: Tensor, begun: Tensor) -> Tensor:
        """The tokens after dialogues: where a side ends its turn, the template's tokens follow until the other's begins."""
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
    """Openings of self-generated texts, for one tokenizer and seed."""

    tokenizer: Any
    first: int
    seed: int

    def scripts(self, count: int, batch: int, length: int) -> list[Script]:
        """Scripts for `count` texts of `length` tokens, `batch` texts in each; the last one has more than are needed."""
        template = turns(self.tokenizer, self.first)
        generator = torch.Generator().manual_seed(self.seed)
        total = math.ceil(count / batch) * batch
        encoded = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in OPENINGS]
        order = torch.cat([torch.randperm(len(encoded), generator=generator) for _ in range(total // len(encoded) + 1)])
        prompts: list[list[int]] = []
        chats = torch.zeros(total, dtype=torch.bool)
        for index in range(total):
            kind = index * 7 % 10  # neighbours begin differently
            chats[index] = template is not None and DOCUMENTS <= kind < DOCUMENTS + DIALOGUES
            if chats[index]:
                prompts.append(template.head)
            else:
                prompts.append([] if kind < DOCUMENTS else encoded[int(order[index])])
        min_p = torch.tensor(MIN_P)[torch.randint(len(MIN_P), (total,), generator=generator)]
        parts = (slice(start, start + batch) for start in range(0, total, batch))
        return [Script(prompts[part], min_p[part], chats[part], template, length) for part in parts]


def varied(texts: Tensor, count: int) -> Tensor:
    """The `count` least repetitive of the texts (N, T), in their order.

    A small model may repeat one passage until the end of a text, from which nothing can be learnt.
    """
    length = min(PASSAGE, texts.shape[1])
    distinct = torch.tensor([len({tuple(row) for row in text.unfold(0, length, 1).tolist()}) for text in texts])
    best = distinct.sort(descending=True, stable=True).indices[:count]
    return texts[best.sort().values]

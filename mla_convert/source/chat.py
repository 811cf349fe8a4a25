"""A tokenizer's chat template: its turns in tokens, and conversations in its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turns:
    """A chat template in tokens."""

    head: list[int]  # before the user's first words
    after_user: list[int]  # end the user's turn and begin the assistant's
    after_assistant: list[int]  # end the assistant's turn and begin the user's


def turns(tokenizer: Any, first: int) -> Turns | None:
    """The parts of the tokenizer's chat template; None if there is none, or one that changes the words of a turn.

    Args:
        tokenizer: of the model.
        first: token that is before every text already.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    # A template must leave these words as they are, and must not contain them itself.
    marks = [f"zq{index}zq" for index in range(3)]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may raise anything
        return None
    pieces, rest = [], text
    for mark in marks:
        before, match, rest = rest.partition(mark)
        if not match:
            return None
        pieces.append(tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"])
    head, after_user, after_assistant = pieces
    # Without tokens between turns, nothing would tell where one ends.
    if not (after_user and after_assistant):
        return None
    return Turns(head[1:] if head[:1] == [first] else head, after_user, after_assistant)


def dialogues(conversations: list[list[dict[str, str]]], tokenizer: Any) -> tuple[str, bool]:
    """Conversations in the model's chat template, or as plain text where it has none that accepts them; and whether it has."""
    if getattr(tokenizer, "chat_template", None):
        try:
            return "".join(tokenizer.apply_chat_template(each, tokenize=False) for each in conversations), True
        except Exception:  # a template may raise anything; Gemma's refuses a system turn
            merged = [_without_system(each) for each in conversations]
        try:
            return "".join(tokenizer.apply_chat_template(each, tokenize=False) for each in merged), True
        except Exception:  # the protocol in the report then says plain text
            pass
    turns = ("\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in each) for each in conversations)
    return "\n\n\n".join(turns), False


def _without_system(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation with its system turn joined to the first user turn."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]

"""Conversations of a task: rows of prompts and answers in the words of a model's chat template, with the answers marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.settings import PACKAGE
from mla_convert.core.words import expanded, plain
from mla_convert.source.data_sets import open_named
from mla_convert.source.mixture import HUB, MIXTURES
from mla_convert.source.text_files import is_text_name, read_objects, valid
from mla_convert.source.tokens import first_tokens

Piece = tuple[str, bool]  # text, and whether it is an answer
COLUMNS = ("messages", "prompt", "completion")
WANTED = 'a conversation has "messages", a list of objects with "role" and "content", or "prompt" and "completion"'


def load_conversations(spec: str) -> tuple[Iterable[tuple[Any, str]], str]:
    """The rows of a file of JSON objects, or of a data set, which is streamed; each with its place; and the label.

    Args:
        spec: a `.jsonl` or `.json` file, or a data set NAME:CONFIG@SPLIT.

    Raises:
        InputError, ResourceError: it is not there, or cannot be read.
    """
    if (spec in MIXTURES and not expanded(spec).is_file()) or spec.startswith((HUB, PACKAGE)):
        raise InputError(
            f"{spec} is text, not conversations: give a .jsonl file of conversations, or the name of a data set"
        )
    path = expanded(spec)
    if path.is_file():
        return read_objects(path), plain(path.name)
    if is_text_name(path.name) or spec.startswith((".", "/", "~")):
        raise InputError(f"{spec} not found: give a .jsonl file of conversations, or a data set name")
    rows, columns = open_named(spec, streaming=True)
    if not set(COLUMNS) & set(columns):
        raise InputError(f"data set {spec!r} has no conversations, only the columns {', '.join(columns)}: {WANTED}")
    return ((dict(row), f"row {number} of {spec}") for number, row in enumerate(rows, start=1)), spec


def answers(rows: Iterable[tuple[Any, str]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each conversation, and which of them belong to an answer.

    Args:
        rows: objects, each with its place for messages.
        tokenizer: of the model.

    Raises:
        InputError: a row is no conversation, or the chat template does not take it.
    """
    prefix = first_tokens(tokenizer)
    for row, where in rows:
        pieces = [(valid(text, where), answer) for text, answer in _pieces(row, where, tokenizer)]
        encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [token for part in encoded for token in part]
        marks = [answer for part, (_, answer) in zip(encoded, pieces, strict=True) for _ in part]
        # A template may write the first token itself.
        before = [] if prefix and ids[: len(prefix)] == prefix else prefix
        yield before + ids, [False] * len(before) + marks


def _pieces(row: Any, where: str, tokenizer: Any) -> list[Piece]:
    """A row in pieces."""
    row = row if isinstance(row, dict) else {}
    prompt, completion = row.get("prompt"), row.get("completion")
    templated = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not templated and completion:
            return [(prompt, False), (completion + (tokenizer.eos_token or ""), True)]
        messages: Any = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    elif isinstance(prompt, list) and isinstance(completion, list):
        messages = [*prompt, *completion]
    else:
        messages = row.get("messages")
    if not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise InputError(f"{where} is no conversation: {WANTED}")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise InputError(f"{where} has no answer: no message has the role assistant and a content")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where} begins with an answer: a conversation begins with a question")
    if not templated:
        raise InputError(f'the model has no chat template for {where}: give rows with "prompt" and "completion"')
    try:
        return _rendered(messages, where, tokenizer)
    except InputError:
        raise
    except Exception as error:  # a template may raise anything
        raise InputError(f"the model's chat template refuses {where}: {one_line(error)}") from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _rendered(messages: list[dict[str, str]], where: str, tokenizer: Any) -> list[Piece]:
    """A conversation in pieces: what comes before an answer, and the answer with what ends it."""
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not through.startswith(before):
            raise InputError(
                f"the model's chat template does not begin an answer as it asks for one, so that the answers of {where} cannot "
                f'be told from the rest: write "prompt" and "completion" in the template\'s words as --data'
            )
        if not before.startswith(done):
            # The template rewrites earlier turns, as those with reasoning do: here they are no answers of the model's.
            pieces, done = [], ""
        pieces += [(before[len(done) :], False), (through[len(before) :], True)]
        done = through
    return [piece for piece in pieces if piece[0]]

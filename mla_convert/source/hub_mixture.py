"""The named mixture of texts on the Hub: five kinds, each a public data set at one revision, read in part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mla_convert.core.errors import InputError
from mla_convert.source.chat import dialogues
from mla_convert.source.data_sets import open_data_set
from mla_convert.source.mixture import HUB

# Characters of a kind that a calibration reads, from which its windows are drawn: about a million tokens.
CALIBRATION = 4 << 20


@dataclass(frozen=True)
class HubText:
    """A data set at one revision.

    Attributes:
        name: on the Hub.
        revision: a commit.
        configs: whose rows are taken in turns.
        split: of each.
        column: that holds the text, or a conversation.
    """

    name: str
    revision: str
    configs: tuple[str, ...]
    split: str = "train"
    column: str = "text"

    @property
    def label(self) -> str:
        """The data set in reports and messages."""
        return f"{self.name} at {self.revision[:12]}"


TEXTS = {
    "web": HubText("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", ("sample-10BT",)),
    "code": HubText(
        "code-search-net/code_search_net",
        "bd0cf261e357a3eb5c8fba490d23ec1a1cd59555",
        ("python", "javascript", "java", "go", "php", "ruby"),
        column="whole_func_string",
    ),
    "mathematics": HubText("open-web-math/open-web-math", "fde8ef8de2300f5e778f56261843dab89f230815", ("default",)),
    "dialogue": HubText(
        "HuggingFaceH4/ultrachat_200k",
        "8049631c405ae6576f93f445c6b8166f76f5505a",
        ("default",),
        split="train_sft",
        column="messages",
    ),
    "languages": HubText(
        "wikimedia/wikipedia",
        "b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
        tuple(f"20231101.{language}" for language in ("de", "es", "fr", "ja", "ru", "zh")),
    ),
}


def open_kind(spec: str, tokenizer: Any) -> tuple[Iterator[str], str]:
    """A kind's documents, which are fetched as they are read, and its label.

    Args:
        spec: `hub:KIND`.
        tokenizer: whose chat template conversations are written in; None for plain text.

    Raises:
        InputError: there is no such kind, or a data set is not as it was.
        ResourceError: a data set cannot be fetched.
    """
    kind = spec.removeprefix(HUB)
    text = TEXTS.get(kind)
    if text is None:
        raise InputError(f"there is no text {spec}: the Hub mixture has {', '.join(HUB + name for name in TEXTS)}")
    streams = []
    for config in text.configs:
        rows, columns = open_data_set(text.name, config, text.split, True, text.label, text.revision)
        if text.column not in columns:
            raise InputError(f"data set {text.label!r} has no column {text.column!r}, only {', '.join(columns)}")
        streams.append(iter(rows))
    return _documents(text, streams, tokenizer), text.label


def beginning(documents: Iterable[str], most: int = CALIBRATION) -> list[str]:
    """The first documents, of about `most` characters together."""
    found, size = [], 0
    for document in documents:
        found.append(document)
        size += len(document)
        if size >= most:
            break
    return found


def _documents(text: HubText, streams: list[Iterator[Any]], tokenizer: Any) -> Iterator[str]:
    """Documents of all streams in turns, until each has ended."""
    while streams:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            elif not row[text.column]:
                continue
            elif text.column == "messages":
                yield dialogues([row[text.column]], tokenizer)[0]
            else:
                yield row[text.column]

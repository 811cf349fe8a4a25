"""What a report says of the packaged suite, kind by kind: rows for tables and the words above them. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

# Every kind has a file mla_texts/suite/NAME.txt.gz, dialogue a .jsonl.gz.
KINDS = (
    "prose",
    "dialogue",
    "mathematics",
    "python",
    "c",
    "javascript",
    "rust",
    "licences",
    "french",
    "german",
    "chinese",
)
COLUMNS = ("text", "original", "model", "change", "KL", "KL, 99%", "agree")

Row = tuple[str, ...]


def rows(suite: dict[str, Any]) -> list[Row]:
    """A row of COLUMNS for each kind, the worst first; only the model's perplexity is known where no original was measured."""
    kinds = suite["kinds"]
    order = sorted(kinds, key=lambda name: -_or(kinds[name].get("ratio"), math.inf))
    return [_row(name, kinds[name]) for name in order]


def _row(name: str, entry: dict[str, Any]) -> Row:
    kl, agreement = entry.get("kl") or {}, entry.get("agreement") or {}
    before, ratio = (entry.get("before") or {}).get("value"), entry.get("ratio")
    return (name, _perplexity(before), _perplexity(entry["after"]["value"]), "–" if ratio is None else f"×{ratio:.3f}",
            _number(kl.get("value"), 4), _number(kl.get("p99"), 3), _share(agreement.get("value")))  # fmt: skip


def table(suite: dict[str, Any]) -> Any:
    """The kinds as a table for the terminal."""
    from rich.table import Table

    found = Table()
    shown = range(len(COLUMNS)) if compared(suite) else (0, 2)  # of one model alone there is nothing else
    for index in shown:
        found.add_column(COLUMNS[index], justify="right" if index else "left")
    for row in rows(suite):
        found.add_row(*(row[index] for index in shown))
    return found


def summary_rows(suite: dict[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """Rows of (what, before, after, change) for a report's first table: the worst kind, mean KL and agreement over kinds."""
    if not compared(suite):
        return []
    worst = suite["worst"]["kind"]
    entry = suite["kinds"][worst]
    row = _row(worst, entry)
    return [
        (f"perplexity, worst kind of text: {worst}", row[1], row[2], row[3]),
        ("KL(original ‖ converted), mean over kinds", "", f"{_number(suite['kl']['value'], 4)} nats", ""),
        ("next-token agreement, mean over kinds", "", _share(suite["agreement"]["value"]), ""),
    ]


def compared(suite: dict[str, Any] | None) -> bool:
    """Whether a suite was measured against an original."""
    return bool(suite and suite.get("worst"))


def headline(suite: dict[str, Any]) -> str:
    """The worst kind and the mean KL in a few words."""
    worst = suite["worst"]
    found = "not finite" if worst["ratio"] is None else f"×{worst['ratio']:.3f}"
    return f"{found} on the worst kind of text ({worst['kind']}), KL {_number(suite['kl']['value'], 4)} nats over all kinds"


def conditions(suite: dict[str, Any]) -> str:
    """What the figures were measured on, in sentences."""
    words = f"Kinds of text: {suite['protocol']}"
    if compared(suite):
        words += "; perplexities; KL(original ‖ converted) of the next token in nats, its mean and 99th percentile over tokens; "
        words += "share of tokens at which both find the same next token likeliest"
    return words + "."


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _perplexity(value: float | None) -> str:
    return _number(value, 3 if value is None or value < 1000 else 0)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

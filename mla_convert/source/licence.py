"""The licence in a source's model card, if it can be copied to another card. Imports no torch.

It is read before a conversion begins; no content of it makes the card of the converted model fail at the end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mla_convert.core.files import read_regular

CARD = "README.md"
# A card's metadata are between two lines of dashes at its beginning.
METADATA = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
MOST_BYTES, MOST_CHARACTERS = 1 << 20, 300
LINK = re.compile(r"[^\s()<>\[\]`|\\]+")


def read_licence(folder: Path) -> dict[str, Any]:
    """`license` (a name, a list of names, or None), and `license_name` and `license_link` if the card has them."""
    data = _metadata(folder / CARD)
    named = data.get("license")
    if isinstance(named, list):
        named = named if named and all(map(_is_name, named)) else None
    elif not _is_name(named):
        named = None
    found = {"license": named}
    if _is_name(data.get("license_name")):
        found["license_name"] = data["license_name"]
    if _is_name(data.get("license_link")) and LINK.fullmatch(data["license_link"]):
        found["license_link"] = data["license_link"]
    return found


def _metadata(card: Path) -> dict[Any, Any]:
    try:
        match = METADATA.search(read_regular(card, MOST_BYTES).decode("utf-8-sig", errors="replace"))
        content = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}  # yaml passes on its constructors' errors for invalid dates and numbers
    return content if isinstance(content, dict) else {}


def _is_name(value: Any) -> bool:
    """Whether a value is a single line that a card can contain."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= MOST_CHARACTERS
        and value.isprintable()
        # These would break out of the Markdown that the card puts a value into.
        and not set(value) & set("`|<>[]")
    )

"""Line numbers of the keys of a YAML file, for error messages. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from mla_convert.core.errors import one_line

Location = tuple[str | int, ...]


class Marks:
    """Lines (from 1) of the keys and items of a YAML text."""

    def __init__(self, text: str):
        """Parse the text.

        Raises:
            yaml.YAMLError: The text is not YAML.
        """
        # The nodes, not the values: only nodes know their lines, and a mapping of values has lost the first of two
        # equal keys.
        self._root = yaml.compose(text, Loader=yaml.SafeLoader)

    def line(self, location: Location) -> int | None:
        """Line of a key or item, or of its nearest ancestor in the file; None if that is the whole file.

        Args:
            location: Keys and indices from the top.
        """
        node, line = self._root, None
        for part in location:
            child = next((each for each in _children(node) if each[0] == str(part)), None)
            if child is None:
                break
            _, line, node = child
        return line

    def duplicate(self) -> tuple[str, int] | None:
        """The first key that occurs twice in one mapping, as `outer.key`, and the line of its second occurrence, or None."""
        return _duplicate(self._root, "", set())


class Scalars(yaml.SafeLoader):
    """PyYAML's safe loader, which reports a scalar without a value (a date such as 2024-99-99) as a YAML error with its line."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node.

        Raises:
            yaml.YAMLError: The node has no value.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"no {kind} ({one_line(error)})", problem_mark=node.start_mark
            ) from error


def _children(node: Any) -> Iterator[tuple[str, int, Any]]:
    """Key or index, line and node of each child of a mapping or sequence; nothing for scalars."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield str(index), value.start_mark.line + 1, value


def _duplicate(node: Any, prefix: str, seen: set[int]) -> tuple[str, int] | None:
    if id(node) in seen:  # an alias
        return None
    seen.add(id(node))
    keys = set()
    for key, line, value in _children(node):
        if key in keys:
            return prefix + key, line
        keys.add(key)
        inner = _duplicate(value, f"{prefix}{key}.", seen)
        if inner:
            return inner
    return None

"""Where in a YAML file a key stands, so that a complaint can name its line. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from mla_convert.core.errors import one_line

Location = tuple[str | int, ...]


class Marks:
    """Lines (from 1) of the keys and items of a YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML.
    """

    def __init__(self, text: str):
        self._root = yaml.compose(text, Loader=yaml.SafeLoader)

    def line(self, location: Location) -> int | None:
        """Line of the key or item at `location` (keys and indices from the top), or of the nearest one above it that
        is there; None where only the whole file is."""
        node, line = self._root, None
        for part in location:
            found = next((pair for pair in _children(node) if pair[0] == str(part)), None)
            if found is None:
                break
            _, line, node = found
        return line

    def duplicate(self) -> tuple[str, int] | None:
        """The first key that stands twice in one mapping, as `outer.key`, and the line of the second; None if none."""
        return _duplicate(self._root, "", set())


class Scalars(yaml.SafeLoader):
    """PyYAML's safe loader; a scalar that it cannot make a value of is an error of YAML, with its line."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node.

        Raises:
            yaml.YAMLError: it has none.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"no {kind} ({one_line(error)})", problem_mark=node.start_mark
            ) from error


def _children(node: Any) -> Iterator[tuple[str, int, Any]]:
    """Key or index, line and node of what a mapping or sequence holds; nothing for scalars."""
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
        found = _duplicate(value, f"{prefix}{key}.", seen)
        if found:
            return found
    return None

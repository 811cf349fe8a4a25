"""Writes docs/reference/options.md and the table of options in README.md from the options of the commands.

    python scripts/make_options_page.py

Help, bounds and defaults come from the fields of the settings (core/settings.py, heal/settings.py) and from the options that
the commands declare. tests/cli/test_options.py checks that both are up to date.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, OptionInfo

from mla_convert.cli.main import app
from mla_convert.cli.options import alternatives, default_words
from mla_convert.core.settings import ConvertConfig
from mla_convert.heal.settings import HealConfig

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "reference" / "options.md", ROOT / "README.md"
BEGIN, END = "<!-- options: made by scripts/make_options_page.py -->", "<!-- /options -->"
SETTINGS = {"convert": ConvertConfig, "sweep": ConvertConfig, "plan": ConvertConfig, "heal": HealConfig}
# The options of convert that README shows.
COMMON = (
    "rank",
    "rope_dim",
    "kv_ratio",
    "cache_dtype",
    "engine",
    "calib",
    "eval",
    "heal_tokens",
    "out",
    "device",
)
TYPES = {int: "whole number", float: "number", Path: "path"}
HEAD = """\
# Options

<!-- made by scripts/make_options_page.py -->

Every command and its options, as `mla-convert COMMAND --help` prints them. The options of `convert` are also the settings of a
recipe, with `_` for `-`: `--refine-steps 100` is `refine_steps: 100`, and `--for` is `engine`. Every command also takes `--help`,
and `--verbose` (`-v`), which prints messages of libraries and the place in the code that an error came from.
"""
DEFAULT = re.compile(r"^(.*?)\s*Default: (.*)\.$", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """One parameter of a command: how it is declared, and the settings' field that it is made from, if it is."""

    name: str
    kind: Any
    default: Any
    info: ArgumentInfo | OptionInfo
    field: FieldInfo | None

    @property
    def names(self) -> str:
        """Its names on the command line."""
        first = (
            (self.info.default,) if isinstance(self.info.default, str) else ()
        )  # within Annotated, typer keeps it there
        declared = (*first, *(self.info.param_decls or ())) or (f"--{self.name.replace('_', '-')}",)
        return ", ".join(f"`{name}`" for text in declared for name in text.split("/"))

    @property
    def meaning(self) -> tuple[str, str]:
        """Its help without the default, and the default."""
        if self.field:
            return str(self.field.description), default_words(self.field)
        # Commands that declare an option themselves end its help with the default.
        words, default = self.info.help or "", self.default
        if match := DEFAULT.match(words):
            return match[1], match[2]
        return words, "" if default in (None, "", 0, inspect.Parameter.empty) else str(default)

    @property
    def value(self) -> str:
        """Type and bounds of its value."""
        kinds = [kind for kind in get_args(self.kind) or (self.kind,) if kind is not type(None)]
        if bool in kinds:
            return ""
        name = self.info.metavar or TYPES.get(kinds[0], "text")
        if self.field is None:
            return name
        literal = [kind for kind in alternatives(self.field) if get_origin(kind) is Literal]
        choices = ", ".join(f"`{word}`" for kind in literal for word in get_args(kind))
        if choices:
            return f"whole number or {choices}" if int in alternatives(self.field) else choices
        return ", ".join([name, *bounds(self.field)])


def options_of(command: str, callback: Any) -> list[Option]:
    """The parameters of a command."""
    model, options = SETTINGS.get(command), []
    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items():
        kind, info = get_args(parameter.annotation)
        field = model.model_fields.get(name) if model else None
        # A command may declare an option of its own under a field's name; the help tells which of the two it is.
        made = field is not None and field.description and (info.help or "").startswith(field.description)
        options.append(Option(name, kind, parameter.default, info, field if made else None))
    return options


def bounds(field: FieldInfo) -> Iterator[str]:
    """The bounds of a field in words."""
    for bound in field.metadata:
        if isinstance(bound, Ge):
            yield f"at least {bound.ge:g}"
        elif isinstance(bound, Gt):
            yield f"above {bound.gt:g}"
        elif isinstance(bound, Le):
            yield f"at most {bound.le:g}"
        elif isinstance(bound, Lt):
            yield f"below {bound.lt:g}"


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(cell, cells)) + " |"


def section(name: str, callback: Any) -> str:
    """The part of the page about one command."""
    options = options_of(name, callback)
    summary = " ".join((callback.__doc__ or "").split("\n\n")[0].split())
    lines = [f"## {name}", "", summary, ""]
    for option in options:
        if isinstance(option.info, ArgumentInfo):
            lines += [f"`{option.info.metavar or option.name.upper()}`: {cell(option.info.help or '')}", ""]
    lines += ["| Option | Value | Default | Meaning |", "|---|---|---|---|"]
    for option in options:
        # The head of the page describes --verbose once for all commands.
        if isinstance(option.info, OptionInfo) and not option.info.hidden and option.name != "verbose":
            words, default = option.meaning
            lines.append(row(option.names, option.value, default, words))
    return "\n".join(lines) + "\n"


def commands() -> dict[str, Any]:
    """The functions of all commands by name, in the order of `--help`."""
    return {str(command.name): command.callback for command in app.registered_commands}


def page() -> str:
    """The content of docs/reference/options.md."""
    return "\n".join([HEAD, *(section(name, callback) for name, callback in commands().items())])


def readme_table() -> str:
    """The table in README.md, with its markers."""
    options = {option.name: option for option in options_of("convert", commands()["convert"])}
    rows = [row(options[name].names, *options[name].meaning) for name in COMMON]
    return "\n".join([BEGIN, "| Option | Meaning | Default |", "|---|---|---|", *rows, END])


def with_table(readme: str) -> str:
    """README's text with its table of options made anew."""
    begin, end = readme.index(BEGIN), readme.index(END) + len(END)
    return readme[:begin] + readme_table() + readme[end:]


def main() -> None:
    """Write both."""
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

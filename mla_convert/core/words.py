"""Text that is safe to print: names and messages without control characters, on any console. Imports no torch."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys
from pathlib import Path

from mla_convert.core.errors import InputError, ReaderGone

# Replacements for signs that a console cannot encode; anything else becomes a question mark.
SIGNS = {"→": "->", "×": "x", "±": "+/-", "≥": ">=", "≤": "<=", "–": "-", "—": "-", "−": "-", "…": "...", "‖": "||",
         "’": "'", "‘": "'", "“": '"', "”": '"'}  # fmt: skip
# Control characters, characters that change the direction of text, and surrogates that stand for bytes outside UTF-8.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BREAKS = re.compile("[\t\n]")
ERRORS = "mla_convert.signs"  # name of our error handler for codecs


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shown(text: str) -> str:
    """Text for a terminal: newlines and tabs stay, other control characters are spelled out."""
    return CONTROL.sub(_escaped, text)


def plain(text: str) -> str:
    """A name for messages, reports and cards: valid Unicode on one line, control characters spelled out."""
    return BREAKS.sub(_escaped, shown(text))


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SIGNS.get(sign) or _substitute(sign) for sign in error.object[error.start : error.end]), error.end


def _substitute(sign: str) -> str:
    return CONTROL.sub(_escaped, sign) if CONTROL.match(sign) else "?"


codecs.register_error(ERRORS, _replaced)


def open_streams() -> None:
    """Let stdout and stderr take any text: signs outside their encoding are replaced, and neither stream is closed."""
    # A process may be started with closed standard streams. The next file that it opens would get the number of stdout,
    # and a print would go into that file.
    for _ in range(3):
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # closed, or a test's own
            stream.reconfigure(errors=ERRORS)  # type: ignore[union-attr]


def say(text: str, err: bool = False, end: str = "\n") -> None:
    """Print one text.

    Args:
        text: The text; control characters are spelled out.
        err: Print on stderr instead of stdout.
        end: Printed after the text.

    Raises:
        ReaderGone: The reader of the stream has closed it.
    """
    stream = sys.stderr if err else sys.stdout
    # Python sets a stream to None where its descriptor was closed at the start.
    if stream is None:
        return
    try:
        stream.write(shown(text) + end)
        stream.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def drop_output() -> None:
    """Discard output that stdout did not take, so that the interpreter does not try to flush it again at its end."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def expanded(name: str | Path) -> Path:
    """A path with `~` and `~user` expanded.

    Raises:
        InputError: There is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = str(name).partition("/")[0]
        raise InputError(f"{name} cannot be found: {user} names nobody's home folder; give the path in full") from None


def check_name(path: Path) -> None:
    """Refuse a folder for weights whose name is not Unicode: safetensors opens no file there.

    Raises:
        InputError: The name is not Unicode.
    """
    if any("\ud800" <= sign <= "\udfff" for sign in str(path)):
        raise InputError(f"the name of folder {path} is not UTF-8, and safetensors opens no file in it: rename it")

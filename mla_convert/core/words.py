"""Text that is fit to be shown: names and messages without control characters, on whatever console there is. Imports no torch."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys
from pathlib import Path

from mla_convert.core.errors import InputError, ReaderGone

# What a console cannot show, in characters that every one has; anything else becomes a question mark.
SIGNS = {"→": "->", "×": "x", "±": "+/-", "≥": ">=", "≤": "<=", "–": "-", "—": "-", "−": "-", "…": "...", "‖": "||",
         "’": "'", "‘": "'", "“": '"', "”": '"'}  # fmt: skip
# Control characters, those that turn the direction of text, and what stands for bytes that are no UTF-8.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BREAKS = re.compile("[\t\n]")
ERRORS = "mla_convert.signs"  # our name among the error handlers of codecs


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shown(text: str) -> str:
    """Text as a terminal may have it: lines and tabs stay, other control characters are spelled out."""
    return CONTROL.sub(_escaped, text)


def plain(text: str) -> str:
    """A name as messages, reports and cards may have it: valid Unicode on one line, control characters spelled out."""
    return BREAKS.sub(_escaped, shown(text))


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SIGNS.get(sign) or (_known(sign)) for sign in error.object[error.start : error.end]), error.end


def _known(sign: str) -> str:
    return CONTROL.sub(_escaped, sign) if CONTROL.match(sign) else "?"


codecs.register_error(ERRORS, _replaced)


def open_streams() -> None:
    """Make stdout and stderr fit for any text: what their encoding lacks is replaced, and none of the two is closed."""
    for _ in range(3):
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # closed, or a test's own
            stream.reconfigure(errors=ERRORS)  # type: ignore[union-attr]


def say(text: str, err: bool = False, end: str = "\n") -> None:
    """Print on stdout, or stderr.

    Raises:
        ReaderGone: nobody reads it any more.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:
        return
    try:
        stream.write(shown(text) + end)
        stream.flush()
    except BrokenPipeError:
        raise ReaderGone from None


def drop_output() -> None:
    """Let go of what stdout could not be given, so that the interpreter does not try again when it ends."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def expanded(name: str | Path) -> Path:
    """A path with `~` and `~user` spelled out.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        user = str(name).partition("/")[0]
        raise InputError(f"{name} cannot be found: {user} names nobody's home folder; give the path in full") from None


def check_name(path: Path) -> None:
    """Refuse a folder for weights whose name is no Unicode: safetensors opens no file there.

    Raises:
        InputError: it is one.
    """
    if any("\ud800" <= sign <= "\udfff" for sign in str(path)):
        raise InputError(f"the name of folder {path} is not UTF-8, and safetensors opens no file in it: rename it")

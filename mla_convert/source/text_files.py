"""Documents of a text file: plain text, JSON Lines, CSV or Parquet. Other content is refused, with its kind or line."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_convert.core.errors import InputError, one_line
from mla_convert.core.words import plain

JSON, TABLES, PARQUET = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}, ".parquet"
TEXT_OBJECT = 'a JSON object with a "text" field'
SUFFIXES = (".txt", ".md", *JSON, *TABLES, PARQUET)
KINDS = "text (UTF-8), .jsonl, .csv, .tsv and .parquet are read, all but the last also as .gz"
# Encodings by byte order mark; the longer marks first, because UTF-32's begins with UTF-16's.
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
GZIP = b"\x1f\x8b"
# Signatures of files that are no text.
OTHERS = {b"%PDF": "a PDF", b"PK\x03\x04": "a ZIP archive or an office document", b"\xfd7zXZ": "compressed with xz",
          b"(\xb5/\xfd": "compressed with zstd", b"BZh": "compressed with bzip2", b"PAR1": "Parquet",
          b"ARROW1": "an Arrow file", b"\x89PNG": "a picture", b"GGUF": "a model"}  # fmt: skip


def is_text_name(name: str) -> bool:
    """Whether a name has the suffix of a text file."""
    return name.lower().removesuffix(".gz").endswith(SUFFIXES)


def read_documents(path: Path) -> list[str]:
    """The documents of a file: plain text is one document; of the other kinds, each row's field or column "text" is one.

    Raises:
        InputError: an unsupported kind of file, or an invalid line; names the file and the line.
    """
    name = plain(path.name)
    suffix = _suffix(path)
    try:
        if suffix == PARQUET:
            documents = _parquet(path, name)
        else:
            text = _decoded(_bytes(path, name), name)
            documents = _split(text, suffix, name)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"text file {name} cannot be read ({one_line(error)})") from error
    if not any(document.strip() for document in documents):
        raise InputError(f"text file {name} is empty: there is no text in it")
    return documents


def _suffix(path: Path) -> str:
    lower = path.name.lower()
    # A compressed Parquet file is not read; as ".gz" it comes to `_bytes`, which refuses it by its signature.
    return Path(lower.removesuffix(".gz")).suffix if not lower.endswith(".parquet.gz") else ".gz"


def _bytes(path: Path, name: str) -> bytes:
    raw = path.read_bytes()
    if raw.startswith(GZIP) or path.name.lower().endswith(".gz"):
        raw = gzip.decompress(raw)
    # After decompression, because a .gz may hold any of them.
    for start, kind in OTHERS.items():
        if raw.startswith(start):
            raise InputError(f"text file {name} is {kind}: {KINDS}")
    return raw


def _decoded(raw: bytes, name: str) -> str:
    """Decoded text, with a line feed at each line end."""
    encoding = next((encoding for mark, encoding in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"text file {name}, line {line}, is not {encoding.upper()} ({error.reason}): save it as UTF-8"
        ) from error
    # UTF-16 without a mark, like many binary files, is valid UTF-8 with NULs in it.
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"text file {name}, line {line}, has NUL characters, which no text has: {KINDS}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _split(text: str, suffix: str, name: str) -> list[str]:
    if suffix in JSON:
        return list(_json_rows(text, suffix, name))
    if suffix in TABLES:
        return list(_table_rows(text, TABLES[suffix], name))
    if _is_json(text):
        raise InputError(f"text file {name} holds JSON, which would be read as plain text: name it .jsonl")
    return [text]


def _is_json(text: str) -> bool:
    """Whether the text or its first line is a JSON object, or a list of objects, lists or strings."""
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return False
    # The first line alone is JSON Lines, the whole text is one JSON document.
    for part in (start.partition("\n")[0], start):
        try:
            value = json.loads(part)
        except RecursionError:
            return True
        except ValueError:
            continue
        if isinstance(value, dict) or (value and isinstance(value[0], dict | list | str)):
            return True
    return False


def read_objects(path: Path) -> list[tuple[Any, str]]:
    """The objects of a `.json` or `.jsonl` file, also gzipped, each with its place for messages.

    Raises:
        InputError: it is none.
    """
    name, suffix = plain(path.name), _suffix(path)
    if suffix not in JSON:
        raise InputError(f"{name} is no .jsonl or .json file: conversations are objects of one")
    try:
        objects = list(_json_objects(_decoded(_bytes(path, name), name), suffix, name, "a JSON object"))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"text file {name} cannot be read ({one_line(error)})") from error
    if not objects:
        raise InputError(f"text file {name} is empty: there is no conversation in it")
    return objects


def _json_rows(text: str, suffix: str, name: str) -> Iterator[str]:
    """One document per line; of `.json`, also one per object of a list."""
    for row, where in _json_objects(text, suffix, name):
        yield _text_of(row, where)


def _json_objects(text: str, suffix: str, name: str, wanted: str = TEXT_OBJECT) -> Iterator[tuple[Any, str]]:
    """One object per line; of `.json`, also those of a list."""
    if suffix == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(_parsed(text, f"text file {name}", wanted), start=1):
            yield row, f"object {number} of {name}"
        return
    # Not `splitlines`: it also splits at U+2028, which a JSON string may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {name}"
            yield _parsed(line, where, wanted), where


def _parsed(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is JSON that is nested too deep: {wanted} is wanted") from None
    except ValueError as error:
        raise InputError(f"{where} is not {wanted} ({one_line(error)})") from error


def _text_of(row: Any, where: str) -> str:
    """The text of a row.

    Raises:
        InputError: it has none; the message says what it has instead.
    """
    text = row.get("text") if isinstance(row, dict) else None
    if isinstance(text, str):
        return valid(text, where)
    why = ""
    if isinstance(row, dict) and "text" in row:
        why = f': its "text" is {"null" if text is None else "no string"}'
    elif isinstance(row, dict) and "messages" in row:
        why = ': it has "messages", so write each conversation, in the model\'s chat template, into "text"'
    raise InputError(f"{where} is not {TEXT_OBJECT}{why}")


def valid(text: str, where: str) -> str:
    """The text, if UTF-8 can hold it.

    Raises:
        InputError: it has half of a surrogate pair; names the place `where` it stands.
    """
    try:
        # json.loads takes half of a surrogate pair, such as "\ud800", which UTF-8 cannot hold.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(f"{where} has half of a surrogate pair ({half}), which is no character: mend it") from error
    return text


def _table_rows(text: str, delimiter: str, name: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)  # a field is a document
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames or ()
        if "text" not in names:
            columns = ", ".join(plain(column)[:40] for column in names[:8])
            raise InputError(f'text file {name} has no column "text" in its first line, only {columns}')
        if names.count("text") > 1:
            raise InputError(f'text file {name} has the column "text" twice: leave one')
        for row in rows:
            if row["text"] is None:
                raise InputError(f'line {rows.line_num} of {name} has no field for the column "text"')
            if None in row:
                raise InputError(
                    f"line {rows.line_num} of {name} has more fields than the first line: quote a text that holds {delimiter!r}"
                )
            yield row["text"]
    except csv.Error as error:
        raise InputError(f"line {rows.line_num} of {name} is no row of a table ({error})") from error


def _parquet(path: Path, name: str) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path).names
        if "text" not in columns:
            raise InputError(f'text file {name} has no column "text", only {", ".join(columns[:8])}')
        found = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"text file {name} is not Parquet that can be read ({one_line(error)})") from error
    for number, text in enumerate(found, start=1):
        if not isinstance(text, str):
            raise InputError(f'row {number} of {name} has no string in its column "text"')
    return found

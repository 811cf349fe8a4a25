"""The header of a GGUF file: metadata, and the place, type and shape of every tensor.

Long arrays (the vocabulary and its merges) are skipped: the package gguf makes several objects for each of their strings, which
takes half a minute for a vocabulary of 150,000 tokens. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Longest array that is read; of longer ones only the length is.
LONGEST = 4096
ALIGNMENT = 32
# struct's formats by GGUF's value types; a string is 8, an array 9.
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# numpy's dtypes of the types that are not quantised; the others are read as bytes.
PLAIN = {
    GGMLQuantizationType.F16: np.float16, GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8, GGMLQuantizationType.I16: np.int16, GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One stored tensor. `shape`: in torch's order; `offset`, `size`: of its data in the file, bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file.

    Attributes:
        path: Of the file.
        metadata: Numbers, strings and short lists by key; of a list longer than LONGEST, its length.
        tensors: By name.
        pairs: The stored bytes of each key with its value, as (first, end) in the file; long lists are not among them.
        alignment: That data begin at, in bytes.
        pairs_end: End of all pairs in the file.
        count: Number of all pairs.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    pairs: dict[str, tuple[int, int]]
    alignment: int
    pairs_end: int
    count: int

    def data(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The stored data of one tensor, or of some of its rows: quantised ones as bytes (..., bytes in a row)."""
        tensor = self.tensors[name]
        dtype = np.dtype(PLAIN.get(tensor.kind, np.uint8))
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        width = tensor.shape[-1] // block * block_bytes // dtype.itemsize
        mapped = np.memmap(self.path, dtype, "r", tensor.offset, (*tensor.shape[:-1], width))
        return np.asarray(mapped[rows])


class _Cursor:
    """Reads values one after another."""

    def __init__(self, content: mmap.mmap):
        """Start at the beginning of `content`."""
        self.content, self.place = content, 0

    def skip(self, size: int) -> None:
        """Move on by `size` bytes.

        Raises:
            ValueError: the file ends before.
        """
        self.place += size
        if self.place > len(self.content):
            raise ValueError("the file ends within its header")

    def number(self, form: str) -> Any:
        """A number of that struct format."""
        return self.numbers(form, 1)[0]

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        """`count` numbers of that struct format."""
        place = self.place
        self.skip(count * struct.calcsize(f"<{form}"))
        return struct.unpack_from(f"<{count}{form}", self.content, place)

    def string(self) -> str:
        """A string."""
        size = self.number("Q")
        place = self.place
        self.skip(size)
        return str(self.content[place : self.place], "utf-8")

    def value(self, kind: int) -> Any:
        """A value of that type; of an array longer than LONGEST, its length."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(FORMATS[kind])
        inner, count = self.numbers("I", 1)[0], self.number("Q")
        if count <= LONGEST:
            return list(self.numbers(FORMATS[inner], count)) if inner in FORMATS else list(self._values(inner, count))
        if inner in FORMATS:
            self.skip(count * struct.calcsize(f"<{FORMATS[inner]}"))
        elif inner == STRING:
            self._skip_strings(count)
        else:
            # The size of nested arrays is known only when they have been read.
            for _ in self._values(inner, count):
                pass
        return count

    def _skip_strings(self, count: int) -> None:
        place, content, read = self.place, self.content, struct.Struct("<Q").unpack_from  # a vocabulary has 300,000
        for _ in range(count):
            place += 8 + read(content, place)[0]
        # This checks the end of the file, once for all strings.
        self.skip(place - self.place)

    def _values(self, kind: int, count: int) -> Iterator[Any]:
        return (self.value(kind) for _ in range(count))


def read_header(path: Path) -> GgufHeader:
    """Read the header of one file.

    Raises:
        OSError: the file cannot be read.
        ValueError: damaged, cut off, or of another format or version; as is KeyError, struct.error or UnicodeDecodeError.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        cursor = _Cursor(content)
        if bytes(content[:4]) != MAGIC:
            raise ValueError("GGUF magic invalid")
        cursor.skip(4)
        version = cursor.number("I")
        # A small number in the other byte order has an empty lower half.
        if version and not version & 0xFFFF:
            raise ValueError("it is for computers of the other byte order")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}, not {' or '.join(map(str, VERSIONS))}")
        tensors, count = cursor.numbers("Q", 2)
        metadata, pairs = _read_pairs(cursor, count)
        pairs_end = cursor.place
        described = _read_tensors(cursor, tensors)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, no power of two")
        start = -(-cursor.place // alignment) * alignment
        placed = {name: _place(name, start, len(content), *rest) for name, rest in described.items()}
    return GgufHeader(path, metadata, placed, pairs, alignment, pairs_end, count)


def _read_pairs(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Metadata, and the bytes of each pair that is no long array."""
    metadata: dict[str, Any] = {}
    pairs: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        first = cursor.place
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"key {key} stands in it twice")
        kind = cursor.number("I")
        metadata[key] = cursor.value(kind)
        if kind != ARRAY or isinstance(metadata[key], list):
            pairs[key] = (first, cursor.place)
    return metadata, pairs


def _read_tensors(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]:
    """Shape, type and offset behind the header of each tensor."""
    tensors = {}
    for _ in range(count):
        name = cursor.string()
        if name in tensors:
            raise ValueError(f"tensor {name} stands in it twice")
        # GGUF states the fastest dimension first, torch last.
        shape = tuple(reversed(cursor.numbers("Q", cursor.number("I"))))
        tensors[name] = (shape, GGMLQuantizationType(cursor.number("I")), cursor.number("Q"))
    return tensors


def _place(
    name: str, start: int, end: int, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> GgufTensor:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise ValueError(f"tensor {name} has rows of {shape[-1]}, not whole blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if not shape or start + offset + size > end:
        raise ValueError(f"tensor {name} reaches beyond the end of the file")
    return GgufTensor(name, shape, kind, start + offset, size)

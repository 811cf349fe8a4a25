"""A GGUF file, or the parts of a split one: metadata, names and shapes, checked before they are used.

Only headers are read here. `described` is a file that transformers reads the configuration from: without the vocabulary, which
takes it half a minute, and without the tensors' values. `whole` joins the parts of a split file, because transformers reads
only the first part and initialises the other tensors at random.
"""

from __future__ import annotations

import contextlib
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from mla_convert.core.errors import InputError, ResourceError, one_line
from mla_convert.source.checkpoint.files import refuse_adapter
from mla_convert.source.checkpoint.gguf_header import GgufHeader, read_header

SUFFIX = ".gguf"
# Names of the parts by gguf-split.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
VOCABULARY = "tokenizer.ggml.tokens"


def is_gguf(path: Path) -> bool:
    """Whether a path has the suffix of a GGUF file, in upper or lower case."""
    return path.suffix.lower() == SUFFIX


@dataclass(frozen=True)
class GgufFile:
    """One model. `metadata`: by key; `tensors`: shape, in torch's order, by name; `headers`: one for each part."""

    path: Path
    headers: tuple[GgufHeader, ...]
    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """Name of the file, for messages."""
        return self.path.name

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return self.metadata["general.architecture"]

    def numbers(self, tensor: str) -> list[float]:
        """The values of a small F32 tensor.

        Raises:
            InputError: it has another type.
        """
        if self.kind(tensor) != GGMLQuantizationType.F32:
            raise InputError(
                f"tensor {tensor} of {self.name} is stored as {self.kind(tensor).name}, not F32: it is not read"
            )
        return [float(number) for number in self.data(tensor).flatten()]

    def kind(self, tensor: str) -> GGMLQuantizationType:
        """The type that a tensor is stored as."""
        return self._header_of(tensor).tensors[tensor].kind

    def data(self, tensor: str, rows: slice = slice(None)) -> np.ndarray:
        """The stored data of a tensor, or of some of its rows, mapped into memory; quantised blocks as bytes."""
        return self._header_of(tensor).data(tensor, rows)

    def _header_of(self, tensor: str) -> GgufHeader:
        return next(header for header in self.headers if tensor in header.tensors)

    @contextlib.contextmanager
    def described(self) -> Iterator[Path]:
        """A temporary file with the metadata but its long arrays, and with the tensors but their values.

        Raises:
            ResourceError: no disk space for it.
        """
        with tempfile.TemporaryDirectory(prefix="mla-convert-") as folder:
            path = Path(folder) / self.name
            try:
                _describe(self.headers, path)
            except OSError as error:
                raise ResourceError(f"{self.name} cannot be put together: {one_line(error)}") from error
            yield path


def gguf_parts(path: Path) -> list[Path]:
    """Paths of all files of the model whose first or only file is `path`, whether or not they exist."""
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{number:05d}-of-{count}{path.suffix}") for number in range(1, int(count) + 1)]


def read_gguf(path: Path) -> GgufFile:
    """Read the headers of a GGUF file and, if it is the first of several parts, of all parts.

    Raises:
        InputError: damaged, an incomplete split file, or without an architecture.
    """
    refuse_adapter(path.parent, path.name)
    first = _read(path)
    metadata = dict(first.metadata)
    headers = (first, *_further(path, metadata))
    tensors: dict[str, tuple[int, ...]] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise InputError(f"tensor {name} stands in two parts of {path.name}: fetch them again")
            tensors[name] = tensor.shape
    stated = metadata.get("split.tensors.count")
    if len(headers) > 1 and stated != len(tensors):
        raise InputError(
            f"the parts of {path.name} hold {len(tensors)} tensors and should hold {stated}: fetch them again"
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{path.name} has general.architecture = {architecture!r}, no name: fetch it again")
    return GgufFile(path, headers, metadata, tensors)


def _read(path: Path) -> GgufHeader:
    try:
        header = read_header(path)
    except (OSError, MemoryError) as error:
        raise InputError(f"{path.name} cannot be read as GGUF: {one_line(error)}") from error
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{path.name} cannot be read as GGUF: {one_line(error)}; fetch it again") from error
    # The header keeps only the length of a long vocabulary; a short one is brought into the same form.
    tokens = header.metadata.get(VOCABULARY)
    header.metadata[VOCABULARY] = len(tokens) if isinstance(tokens, list) else tokens
    return header


def _further(path: Path, metadata: dict[str, Any]) -> list[GgufHeader]:
    """Headers of the second and later parts."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        raise InputError(
            f"{path.name} has split.count = {count!r} and split.no = {number!r}, no numbers: fetch it again"
        )
    if count <= 1:
        return []
    match = PART.fullmatch(path.name)
    if number or not match or int(match[2]) != 1 or int(match[3]) != count:
        raise InputError(
            f"{path.name} is part {number + 1} of a GGUF file in {count} parts: give the first of them, "
            f"NAME-00001-of-{count:05d}.gguf, with the others beside it"
        )
    headers = []
    for index, part in enumerate(gguf_parts(path)[1:], start=1):
        if not part.is_file():
            raise InputError(
                f"part {part.name} of a split GGUF file is missing: fetch it into the folder of {path.name}"
            )
        headers.append(_read(part))
        if headers[-1].metadata.get("split.no") != index:
            raise InputError(f"{part.name} is not part {index + 1} of {path.name}: fetch it again")
    return headers


def _describe(headers: tuple[GgufHeader, ...], path: Path) -> None:
    """Write all parts as one sparse file, without long arrays and without the tensors' values."""
    first = headers[0]
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    with path.open("wb") as file, first.path.open("rb") as source:
        # The pairs begin behind magic, version and two counts, 24 bytes that are written anew.
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(first.pairs)))
        for begin, end in first.pairs.values():
            source.seek(begin)
            file.write(source.read(end - begin))
        place = 0
        for tensor in tensors:
            name, shape = tensor.name.encode(), tuple(reversed(tensor.shape))
            file.write(struct.pack(f"<Q{len(name)}sI{len(shape)}Q", len(name), name, len(shape), *shape))
            file.write(struct.pack("<IQ", tensor.kind, place))
            place += _aligned(tensor.size, first.alignment)
        file.truncate(_aligned(file.tell(), first.alignment) + place)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment

"""A GGUF file, or the parts of a split one: metadata, names and shapes, checked before they are used.

Only headers are read here. `whole` joins the parts of a split file, because transformers reads only the first part and
initialises the other tensors at random.
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
from gguf import GGUFReader

from mla_convert.core.errors import InputError, ResourceError, one_line
from mla_convert.source.checkpoint.files import refuse_adapter

SUFFIX = ".gguf"
# Names of the parts by gguf-split.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# Longest metadata array that is read; of longer ones (the vocabulary) only the length is.
LONGEST = 4096


def is_gguf(path: Path) -> bool:
    """Whether a path has the suffix of a GGUF file, in upper or lower case."""
    return path.suffix.lower() == SUFFIX


@dataclass(frozen=True)
class GgufFile:
    """One model. `metadata`: by key; `tensors`: shape, in torch's order, by name; `readers`: one for each part."""

    path: Path
    readers: tuple[GGUFReader, ...]
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
        (stored,) = (t for reader in self.readers for t in reader.tensors if t.name == tensor)
        if stored.data.dtype != np.float32:
            raise InputError(
                f"tensor {tensor} of {self.name} is stored as {stored.tensor_type.name}, not F32: it is not read"
            )
        return [float(number) for number in stored.data.flatten()]

    @contextlib.contextmanager
    def whole(self, weights: bool = True) -> Iterator[Path]:
        """A single file with the complete model: this one, or a temporary one that joins the parts.

        Args:
            weights: whether the temporary file contains the values of the tensors.

        Raises:
            ResourceError: no disk space for it.
        """
        if len(self.readers) == 1:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="mla-convert-") as folder:
            path = Path(folder) / self.name
            try:
                _join(self.readers, path, weights)
            except OSError as error:
                raise ResourceError(f"the parts of {self.name} cannot be put together: {one_line(error)}") from error
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
    first = _reader(path)
    metadata = _metadata(first)
    readers = (first, *_further(path, metadata))
    tensors: dict[str, tuple[int, ...]] = {}
    for reader in readers:
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise InputError(f"tensor {tensor.name} stands in two parts of {path.name}: fetch them again")
            tensors[tensor.name] = tuple(reversed(tensor.shape.tolist()))
    stated = metadata.get("split.tensors.count")
    if len(readers) > 1 and stated != len(tensors):
        raise InputError(
            f"the parts of {path.name} hold {len(tensors)} tensors and should hold {stated}: fetch them again"
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{path.name} has general.architecture = {architecture!r}, no name: fetch it again")
    return GgufFile(path, readers, metadata, tensors)


def _reader(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (OSError, MemoryError) as error:
        raise InputError(f"{path.name} cannot be read as GGUF: {one_line(error)}") from error
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{path.name} cannot be read as GGUF: {one_line(error)}; fetch it again") from error


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """Metadata by key: numbers, strings and short lists; of a long list, its length."""
    content: dict[str, Any] = {}
    for key, entry in reader.fields.items():
        try:
            content[key] = entry.contents() if len(entry.data) <= LONGEST else len(entry.data)
        except Exception as error:  # as above
            raise InputError(
                f"{key} in the metadata of a GGUF file is damaged ({one_line(error)}): fetch it again"
            ) from error
    content["tokenizer.ggml.tokens"] = (
        len(tokens.data) if (tokens := reader.fields.get("tokenizer.ggml.tokens")) else None
    )
    return content


def _further(path: Path, metadata: dict[str, Any]) -> list[GGUFReader]:
    """Readers of the second and later parts."""
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
    readers = []
    for index, part in enumerate(gguf_parts(path)[1:], start=1):
        if not part.is_file():
            raise InputError(
                f"part {part.name} of a split GGUF file is missing: fetch it into the folder of {path.name}"
            )
        readers.append(_reader(part))
        if _metadata(readers[-1]).get("split.no") != index:
            raise InputError(f"{part.name} is not part {index + 1} of {path.name}: fetch it again")
    return readers


def _join(readers: tuple[GGUFReader, ...], path: Path, weights: bool) -> None:
    """Write all parts as one file; without `weights`, a sparse file without the tensors' values."""
    first = readers[0]
    settings = [entry for entry in first.fields.values() if not entry.name.startswith("GGUF.")]
    start, align = 24, int(first.alignment)
    end = max(entry.offset + sum(part.nbytes for part in entry.parts) for entry in settings)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings)))
        file.write(first.data[start:end].tobytes())
        place = 0
        for tensor in tensors:
            # the description of a tensor, except its offset
            file.writelines(part.tobytes() for part in tensor.field.parts[:-1])
            file.write(struct.pack("<Q", place))
            place += -(-tensor.n_bytes // align) * align
        begin = -(-file.tell() // align) * align
        if weights:
            for tensor in tensors:
                file.seek(begin)
                tensor.data.tofile(file)
                begin += -(-tensor.n_bytes // align) * align
            file.truncate(begin)
        else:
            file.truncate(begin + place)

"""A GGUF file, or the parts that gguf-split made of one: its metadata and what its tensors are, checked before they are used.

Only headers are read here. `whole` gives transformers one file where there are parts, since it reads the first and makes up
what the others hold.
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
# Names that gguf-split gives.
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# Longest array of metadata that is read: those of the vocabulary are only counted.
LONGEST = 4096


def is_gguf(path: Path) -> bool:
    """Whether a path is named as a GGUF file, in whatever case."""
    return path.suffix.lower() == SUFFIX


@dataclass(frozen=True)
class GgufFile:
    """One model: `metadata` by key, and the `tensors`' shapes, as torch has them, by name."""

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
        """What llama.cpp calls the family."""
        return self.metadata["general.architecture"]

    def numbers(self, tensor: str) -> list[float]:
        """The numbers of a small tensor of floats.

        Raises:
            InputError: it is stored as something else.
        """
        (found,) = (t for reader in self.readers for t in reader.tensors if t.name == tensor)
        if found.data.dtype != np.float32:
            raise InputError(
                f"tensor {tensor} of {self.name} is stored as {found.tensor_type.name}, not F32: it is not read"
            )
        return [float(number) for number in found.data.flatten()]

    @contextlib.contextmanager
    def whole(self, weights: bool = True) -> Iterator[Path]:
        """A single file with everything: this one, or one that is made of its parts and taken away afterwards.

        Raises:
            ResourceError: no room for it.
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
    """All files of the model whose first or only file is `path`, by their names; missing ones are not looked for."""
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    return [path.with_name(f"{stem}-{number:05d}-of-{count}{path.suffix}") for number in range(1, int(count) + 1)]


def read_gguf(path: Path) -> GgufFile:
    """Read the headers of a GGUF file and, if it is the first of several parts, of all of them.

    Raises:
        InputError: damaged, a part alone, or without what every file says.
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
    told = metadata.get("split.tensors.count")
    if len(readers) > 1 and told != len(tensors):
        raise InputError(
            f"the parts of {path.name} hold {len(tensors)} tensors and should hold {told}: fetch them again"
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
    except Exception as error:  # a damaged header runs into anything
        raise InputError(f"{path.name} cannot be read as GGUF: {one_line(error)}; fetch it again") from error


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """Metadata by key: numbers, strings and short lists; of a long list its length."""
    found: dict[str, Any] = {}
    for key, entry in reader.fields.items():
        try:
            found[key] = entry.contents() if len(entry.data) <= LONGEST else len(entry.data)
        except Exception as error:  # as above
            raise InputError(
                f"{key} in the metadata of a GGUF file is damaged ({one_line(error)}): fetch it again"
            ) from error
    found["tokenizer.ggml.tokens"] = (
        len(tokens.data) if (tokens := reader.fields.get("tokenizer.ggml.tokens")) else None
    )
    return found


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
    """Write all parts as one file; without `weights` their place is left empty, which takes no room on disk."""
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
            # all that describes a tensor but its place
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

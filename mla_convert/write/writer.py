"""Writes a converted checkpoint shard by shard into a staging folder, and renames that folder when it is complete.

The staging folder is beside the output and contains a journal: one line for each finished shard, with its checksum. After a
kill, the next run continues from these shards. The output gets its name only when every file is in place.

Beside a GPU a shard is written in the background, while the next layer is converted: at most one, which bounds memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla_convert.core import runtime
from mla_convert.core.errors import InputError, PeerLost, ResourceError
from mla_convert.core.files import disk_error, on_disk, permissions, publish, recover, remove, write_file
from mla_convert.core.processes import Processes, alone
from mla_convert.core.report_file import REPORT
from mla_convert.core.sums import seal, sha256
from mla_convert.source.checkpoint.reader import INDEX, Reader
from mla_convert.write.revise import lock_file, staging_folder

JOURNAL = "journal.jsonl"
MARK = "mla_convert"


def is_ours(folder: Path) -> bool:
    """Whether a folder is a finished output of mla_convert, by its report."""
    try:
        return MARK in json.loads((folder / REPORT).read_text(encoding="utf-8")).get("versions", {})
    except (OSError, ValueError, AttributeError):
        return False


def check_output(out: Path, source: Path | None, overwrite: bool | None) -> None:
    """Refuse an output folder that must not be replaced, or that cannot be written.

    Args:
        out: the output folder.
        source: folder of the source, if it is local.
        overwrite: whether a folder that is no output of mla_convert may be replaced; None: never.

    Raises:
        InputError: it is or contains the source, the working or the home folder, it is in a converted model, or it is no output
            of mla_convert.
        ResourceError: its parent is not writable.
    """
    resolved = out.resolve()
    keep = [Path.cwd().resolve(), Path.home().resolve(), *([source.resolve()] if source else [])]
    if any(path == resolved or resolved in path.parents for path in keep):
        raise InputError(
            f"output folder {out} is or contains the source, the working or the home folder: choose another"
        )
    if any(is_ours(parent) for parent in resolved.parents):
        raise InputError(f"output folder {out} is inside a converted model, which lists its files: choose another")
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out} is a file: choose another name with --out")
    if out.is_dir() and any(out.iterdir()) and not is_ours(out) and not overwrite:
        option = "" if overwrite is None else ", or give --overwrite"
        raise InputError(f"output folder {out} exists and is not a converted model: choose another{option}")
    try:
        # without a name, if the system supports that: nothing remains, and several processes can test at once
        with tempfile.TemporaryFile(dir=existing_parent(out)):
            pass
    except OSError as error:
        raise ResourceError(f"cannot write in {out.parent} ({error.strerror}): choose another --out") from error


def existing_parent(out: Path) -> Path:
    """The nearest existing folder above `out`; the others are made with the first shard."""
    return next(path for path in out.absolute().parents if path.exists())


class Writer:
    """A context that writes shards into a staging folder beside `out`, and removes that folder if the block fails.

    `finished`: journal entry of each finished shard, by file name. `drafts`: the same of files that layers can be finished from,
    which are no part of the output. Of several processes the first one writes; the others call
    the same methods, and read what is written.
    """

    def __init__(self, out: Path, identity: dict[str, Any], processes: Processes | None = None):
        """Prepare a writer; the staging folder is made on entry.

        Args:
            out: the output folder.
            identity: everything that finished shards depend on (settings, source), as JSON. A staging folder with another
                identity is discarded.
            processes: of the run, if there may be several.
        """
        self.processes = processes or alone(torch.device("cpu"))
        self.out = out
        self.folder = out.parent / f".{out.name}.partial"
        self._identity = json.dumps(identity, sort_keys=True, default=str)
        self._lock = FileLock(lock_file(out))
        # A failed run removes the parents that it made, and no others.
        self._new_parents = [path for path in out.absolute().parents if not path.exists()]
        self.finished: dict[str, dict[str, Any]] = {}
        self.drafts: dict[str, dict[str, Any]] = {}
        self._in_background = runtime.in_background(self.processes.device)
        self._thread = ThreadPoolExecutor(1, "writer")
        self._pending: tuple[str, Future[dict[str, Any]]] | None = None

    def __enter__(self) -> Writer:
        """Lock the output and open the staging folder."""
        if self.processes.first:
            self._enter()
        self.finished, self.drafts = self.processes.told(lambda: (self.finished, self.drafts))
        return self

    def _enter(self) -> None:
        try:
            with on_disk("the output", self.out.parent):
                self._open()
        except BaseException:
            # `__exit__` is not called after an error here.
            self._close(keep=False, failed=True)
            raise

    def _open(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                f"another conversion is writing {self.out}: wait for it, or choose another --out"
            ) from None
        # Under the lock, which revisions take as well, these leftovers can only be those of a killed run.
        recover(self.out)
        remove(staging_folder(self.out))
        self._resume()
        if not self.finished and not self.drafts:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        self._sweep()
        # Written anew: the last line of a killed run may be cut off, and entries behind a damaged shard do not count.
        lines = [{"identity": self._identity}, *self.finished.values(), *self.drafts.values()]
        write_file(self.folder / JOURNAL, "".join(f"{json.dumps(line)}\n" for line in lines))

    def _sweep(self) -> None:
        """Remove the unfinished files of a killed run."""
        for path in self.folder.iterdir():
            if path.name not in (JOURNAL, *self.finished, *self.drafts):
                remove(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the staging folder, unless an interrupted run can continue from it."""
        if not self.processes.first:
            return
        with contextlib.suppress(Exception):  # after an error that counts more
            self.settle()
        self._thread.shutdown()
        # Only shards of layers have a note; what else is written takes little time to write again.
        shards = {file for file, entry in self.finished.items() if entry["note"]}
        layers = len(shards.union(*(entry["draft_of"] for entry in self.drafts.values())))
        keep = isinstance(error, (KeyboardInterrupt, PeerLost)) and layers > 0
        if isinstance(error, KeyboardInterrupt) and keep:
            error.args = (f"{layers} layers are kept in {self.folder}: run the same command to go on, or delete it",)
        self._close(keep, failed=kind is not None)

    def _close(self, keep: bool, failed: bool) -> None:
        held = self._lock.is_locked
        if held and not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._lock.release()
        if held:  # else the lock belongs to another run
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
        if failed:
            with contextlib.suppress(OSError):
                for path in self._new_parents:
                    path.rmdir()

    def _resume(self) -> None:
        """Read the journal up to the first shard that does not match; nothing if the identity differs."""
        lines = []
        with contextlib.suppress(OSError, ValueError):  # the last line may be incomplete
            for line in (self.folder / JOURNAL).read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        if not lines or lines[0].get("identity") != self._identity:
            return
        for entry in lines[1:]:
            file = self.folder / entry["file"]
            # Each layer was calibrated behind those before it, so nothing behind a damaged shard can be kept.
            draft = "draft_of" in entry
            if not file.is_file() or sha256(file) != entry["sha256"]:
                if draft:  # they are deleted when their layers are written
                    continue
                break
            (self.drafts if draft else self.finished)[entry["file"]] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def write_shard(self, file: str, tensors: dict[str, Tensor], note: dict[str, Any] | None = None) -> None:
        """Write one shard and its journal entry, or begin to; its tensors must not change from now on.

        Args:
            file: name of the shard.
            tensors: by name.
            note: JSON that `finished` returns to a run that resumes.

        Raises:
            ResourceError: the disk does not suffice, for this shard or for the one before.
        """
        note = note or {}
        self.settle()
        if self.processes.first and not self._in_background:
            self.finished[file] = self._write(file, tensors, note)
            return
        self.finished[file] = {"note": note}
        if self.processes.first:
            self._pending = file, self._thread.submit(self._write, file, tensors, note)

    def settle(self) -> None:
        """Wait until the shard that is being written is complete.

        Raises:
            ResourceError: the disk does not suffice.
        """
        if self._pending is None:
            return
        file, written = self._pending
        wait([written])  # an interruption here leaves it pending, for `__exit__`
        self._pending = None
        del self.finished[file]
        self.finished[file] = written.result()

    def _write(self, file: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> dict[str, Any]:
        """Write one shard; its journal entry."""
        path = self.folder / file
        with self._disk(file):
            # safetensors refuses tensors that are not contiguous.
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
            self._seal(path)
            entry = {
                "file": file,
                "sha256": sha256(path),
                "bytes": path.stat().st_size,
                "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
                "note": note,
            }
            # Last: a line in the journal says that the shard is complete and on the disk.
            self._append(entry)
        return entry

    def write_draft(self, file: str, tensors: dict[str, Tensor], shards: list[str], note: Any) -> None:
        """Write a file that layers can be finished from if the run is interrupted.

        Args:
            file: its name.
            tensors: by name.
            shards: names of the shards that will hold these layers.
            note: JSON that `drafts` returns to a run that resumes.

        Raises:
            ResourceError: the disk does not suffice.
        """
        if not self.processes.first:
            return
        self.settle()  # one writes the journal at a time
        path = self.folder / file
        with self._disk(file):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            self._seal(path)
            entry = {"file": file, "sha256": sha256(path), "draft_of": shards, "note": note}
            self._append(entry)
        self.drafts[file] = entry

    def drop_drafts(self) -> None:
        """Delete all drafts: their layers are written."""
        if self.drafts:
            self.settle()
        if self.processes.first:
            for file in self.drafts:
                (self.folder / file).unlink()
        self.drafts = {}

    @contextlib.contextmanager
    def _disk(self, file: str) -> Iterator[None]:
        """Convert write errors to ResourceError; safetensors fails for no other reason."""
        with on_disk(file, self.out.parent):
            try:
                yield
            except SafetensorError as error:
                if disk_error(error) is not None:
                    raise
                raise ResourceError(
                    f"could not write {file} in {self.out.parent} ({error}): free disk space"
                ) from error

    def spill(self, file: str, tensor: Tensor) -> None:
        """Keep a tensor, equal in all processes, in the staging folder until `load_spilled`; it is no part of the output."""
        if self.processes.first:
            with self._disk(file):
                save_file({"tensor": tensor.contiguous()}, self.folder / file)

    def load_spilled(self, file: str) -> Tensor:
        """Read a spilled tensor and delete its file."""
        self.processes.wait()
        tensor = load_file(self.folder / file)["tensor"]
        self.processes.wait()
        if self.processes.first:
            (self.folder / file).unlink()
        return tensor

    @staticmethod
    def _seal(path: Path) -> None:
        # safetensors ignores the umask (mode 0600) and does not sync
        path.chmod(permissions())
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def load_shard(self, file: str) -> dict[str, Tensor]:
        """Tensors of a finished shard."""
        self.settle()
        return load_file(self.folder / file)

    def write_index(self) -> None:
        """Write the index of all finished shards."""
        self.settle()
        shards = [self.finished[file] for file in sorted(self.finished)]
        weight_map = {name: shard["file"] for shard in shards for name in shard["tensors"]}
        total = sum(size for shard in shards for size in shard["tensors"].values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def checksums(self) -> dict[str, str]:
        """sha256 of every shard; none in other processes than the first."""
        self.settle()
        return {file: self.finished[file]["sha256"] for file in sorted(self.finished) if self.processes.first}

    def publish(self) -> None:
        """Write SHA256SUMS and atomically rename the staging folder to `out`.

        Raises:
            ResourceError: the disk does not suffice.
        """
        with on_disk("the output", self.out.parent):
            # SHA256SUMS lists every file, and the journal is no part of the output.
            (self.folder / JOURNAL).unlink()
            seal(self.folder, self.checksums())
            publish(self.folder, self.out)


def check_space(out: Path, needed: int) -> None:
    """Refuse an output of `needed` bytes if the disk has less free space.

    Raises:
        ResourceError: states both numbers.
    """
    free = shutil.disk_usage(existing_parent(out)).free
    if free < needed:
        raise ResourceError(
            f"{out.parent} has {free / 1e9:.1f} GB free and the converted model needs about {needed / 1e9:.1f} GB: "
            f"free space or choose another --out"
        )


def stored_bytes(reader: Reader, itemsize: int | None) -> int:
    """Bytes of all tensors of a source, with `itemsize` bytes an element (None: as stored)."""
    total = 0
    for name in reader.names():
        total += math.prod(reader.shape(name)) * (itemsize or reader.dtype(name).itemsize)
    return total

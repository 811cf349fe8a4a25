"""Files and folders that change whole or not at all. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mla_convert.core.errors import MlaConvertError, ResourceError

# What a disk says when it is full or failing: the command may work later or elsewhere.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
RUST = re.compile(r"os error (\d+)|code: (\d+)")
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file whole, under its name only when every byte is on the disk. A link of that name is replaced, not followed."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, permissions())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_regular(path: Path, most: int = -1) -> bytes:
    """What a regular file holds, at most so many bytes. A pipe or device is refused: reading it may wait for ever.

    Raises:
        OSError: it is none, or cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with open(path, "rb") as file:
        return file.read(most)


def permissions() -> int:
    """What a new file may be used for, by the umask."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the platform can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in DISK:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def on_disk(what: str, folder: Path) -> Iterator[None]:
    """Turns what the disk has against writing `what` in `folder` into one line, whichever library says it.

    Raises:
        ResourceError: the disk is full or failing.
    """
    try:
        yield
    except Exception as error:
        code = disk_error(error)
        if code is None:
            raise
        advice = "the disk is failing: try another" if code == errno.EIO else "free disk space"
        raise ResourceError(f"could not write {what} in {folder} ({os.strerror(code)}): {advice}") from error


def disk_error(error: BaseException) -> int | None:
    """The number of the disk's error behind an exception; None where it is about something else.

    Libraries in Rust say it in words, and torch only that its writer failed, with no number.
    """
    if isinstance(error, MlaConvertError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK else None
    said = str(error)
    if match := RUST.search(said):
        code = int(match[1] or match[2])
        return code if code in DISK else None
    short = isinstance(error, OSError) and " requested and " in said  # numpy's, of a file not written whole
    return errno.ENOSPC if short or any(name in said for name in TORCH_WRITER) else None


def publish(made: Path, out: Path) -> None:
    """Give a finished folder its name. What stood there is replaced at once: at no moment is nothing under the name.

    Where the platform cannot exchange two names, the old folder is put aside for the moment of a rename, and put back if
    that fails; `recover` finds it after a kill.
    """
    sync_folder(made)
    old = aside(out)
    remove(old)
    if not os.path.lexists(out):
        made.rename(out)
    elif exchange(made, out):
        remove(made)  # which is the old folder now
    else:
        out.rename(old)
        try:
            made.rename(out)
        except BaseException:
            old.rename(out)
            raise
    with contextlib.suppress(OSError):
        sync_folder(out.parent)
    remove(old)


def aside(out: Path) -> Path:
    """Where the folder that is being replaced lies for a moment."""
    return out.parent / f".{out.name}.old"


def recover(out: Path) -> None:
    """Put back what a run that was killed between two renames has left aside; away with what it had replaced already."""
    old = aside(out)
    if os.path.lexists(old):
        if os.path.lexists(out):
            remove(old)
        else:
            old.rename(out)


def remove(path: Path) -> None:
    """Away with a file or folder, if it is there; what cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where the platform or the file system cannot.

    Raises:
        OSError: it can, and failed.
    """
    names = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, ctypes.c_uint(RENAME_SWAP))
        else:
            failed = libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE))
    except (AttributeError, OSError, TypeError):
        return False
    if failed:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
            return False
        raise OSError(code, os.strerror(code), str(other))
    return True

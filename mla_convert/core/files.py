"""Atomic replacement of files and folders: a change happens completely or not at all. Imports no torch."""

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

# Errors of a full or failing disk: the command may succeed later or elsewhere.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# The two forms in which Rust prints an errno: `os error 28` for users, `code: 28` in debugging output.
RUST = re.compile(r"os error (\d+)|code: (\d+)")
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
# Constants of renameat2(2) on Linux and of renamex_np(2) on macOS, for which Python has no function.
AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file that gets its name only when every byte is on the disk. A link of that name is replaced, not followed."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    # In the same folder, because a rename is atomic only within one file system. The name is cut, because the temporary
    # one is longer and a file system takes 255 bytes.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes a file that only its owner can read, whatever the umask is.
        os.chmod(name, permissions())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_regular(path: Path, most: int = -1) -> bytes:
    """The content of a regular file. A pipe or device is refused, because reading it may block for ever.

    Args:
        path: of the file.
        most: bytes to read; -1: all.

    Raises:
        OSError: not a regular file, or it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with open(path, "rb") as file:
        return file.read(most)


def permissions() -> int:
    """Permissions of a new file, by the umask."""
    # The umask cannot be read without setting it.
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the platform supports that."""
    # Windows opens no folder as a file.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems refuse to sync a folder. Only an error of the disk means that the names may be lost.
        if error.errno in DISK:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def on_disk(what: str, folder: Path) -> Iterator[None]:
    """Convert the disk's errors while `what` is written in `folder` into one line, whichever library raises them.

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
    """The errno behind an exception if it is one of `DISK`, else None.

    Libraries in Rust give the number only in the message, and torch only reports that its writer failed.
    """
    # Its message is final, and may quote words that the searches below look for.
    if isinstance(error, MlaConvertError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in DISK else None
    message = str(error)
    if match := RUST.search(message):
        code = int(match[1] or match[2])
        return code if code in DISK else None
    short = isinstance(error, OSError) and " requested and " in message  # numpy's, if a file is not written completely
    return errno.ENOSPC if short or any(name in message for name in TORCH_WRITER) else None


@contextlib.contextmanager
def staged(staging: Path, out: Path) -> Iterator[None]:
    """A block that fills the folder `staging`, which replaces `out` at the end of the block and is removed if it fails.

    A leftover of a killed run is removed first.
    """
    recover(out)
    remove(staging)
    try:
        yield
        publish(staging, out)
    finally:
        remove(staging)


def publish(staging: Path, out: Path) -> None:
    """Atomically rename the finished folder `staging` to `out`, which is replaced if it exists.

    If the platform cannot exchange two names, the old folder gets another name between two renames, and its own again if the
    second one fails; after a kill between the two, `recover` restores it.
    """
    sync_folder(staging)
    old = aside(out)
    # A rename cannot replace a folder that holds files, and a killed run may have left one of this name.
    remove(old)
    if not os.path.lexists(out):
        staging.rename(out)
    elif exchange(staging, out):
        remove(staging)  # the old folder has this name now
    else:
        out.rename(old)
        try:
            staging.rename(out)
        except BaseException:
            old.rename(out)
            raise
    # The new folder is in its place: that its name could not be flushed is no failure of the command.
    with contextlib.suppress(OSError):
        sync_folder(out.parent)
    remove(old)


def aside(out: Path) -> Path:
    """Name of the folder that is being replaced, between two renames."""
    return out.parent / f".{out.name}.old"


def recover(out: Path) -> None:
    """Restore the folder of a run that was killed between two renames, or remove it if the run had replaced it."""
    old = aside(out)
    if os.path.lexists(old):
        if os.path.lexists(out):
            remove(old)
        else:
            old.rename(out)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; errors are ignored."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False if the platform or the file system does not support that.

    Raises:
        OSError: it is supported, and failed.
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

"""Changes in a finished folder, which at any moment is completely the old or the new one. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mla_convert.core import sums
from mla_convert.core.errors import InputError, ResourceError
from mla_convert.core.files import aside, on_disk, recover, remove, staged, write_file
from mla_convert.core.sums import SUMS

# Errors of a file system without hard links, or of a file that has as many as it can have: a copy serves as well.
NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV)


def staging_folder(folder: Path) -> Path:
    """Name of the copy of a folder while it is revised."""
    return folder.parent / f".{folder.name}.revised"


@contextlib.contextmanager
def revised(folder: Path) -> Iterator[Path]:
    """A copy of a finished folder to change; it replaces the folder at the end of the block, and is removed if it fails.

    Files of the copy are hard links if the file system supports them: replace them (`write_file`), never write into them.

    Raises:
        ResourceError: the disk does not suffice, or another command is writing there.
    """
    folder = Path(os.path.realpath(folder))
    staging = staging_folder(folder)
    # The lock first: `staged` removes the leftovers of a killed run, which must not be the work of a running one.
    with locked(folder), on_disk(folder.name, folder.parent), staged(staging, folder):
        _copy(folder, staging)
        yield staging


def tidy(folder: Path) -> None:
    """Remove the files that a killed run left beside a folder; restore the folder if it was being replaced."""
    folder = Path(os.path.realpath(folder))
    if any(map(os.path.lexists, (staging_folder(folder), aside(folder), lock_file(folder)))) and can_exchange(folder):
        with locked(folder), on_disk(folder.name, folder.parent):
            recover(folder)
            remove(staging_folder(folder))


def lock_file(folder: Path) -> Path:
    """The file that is locked while a folder is written."""
    return folder.parent / f".{folder.name}.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude other commands of mla_convert from writing to a folder.

    Raises:
        ResourceError: another command is writing there, or the parent folder is not writable.
    """
    lock = FileLock(lock_file(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResourceError(f"another command is writing {folder}: wait for it") from None
    except OSError as error:
        remove(Path(lock.lock_file))
        raise ResourceError(f"cannot write in {folder.parent} ({error.strerror})") from error
    try:
        yield
    finally:
        lock.release()
        remove(Path(lock.lock_file))


def _copy(folder: Path, staging: Path) -> None:
    """Copy a folder, with hard links to its files if the file system supports them."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LINKS:
                raise
            shutil.copy2(source, target, follow_symlinks=False)

    try:
        shutil.copytree(folder, staging, symlinks=True, copy_function=link)
    except shutil.Error as error:  # its argument is a list of (source, target, message)
        raise OSError(errno.EIO, f"cannot copy {Path(error.args[0][0][0]).name}") from error


def replace_files(folder: Path, contents: dict[str, str]) -> None:
    """Replace files of a finished folder, and their lines in its SHA256SUMS if it has one, in one step.

    If the folder cannot be replaced (it is the working folder, or its parent is not writable), the files are replaced one by
    one, SHA256SUMS last; `verify` detects a kill between two of them.

    Args:
        folder: converted, healed or exported.
        contents: new text of each file.

    Raises:
        InputError: its SHA256SUMS is damaged.
        ResourceError: the disk does not suffice.
    """
    folder = Path(os.path.realpath(folder))
    stated = sums.read(folder) if os.path.lexists(folder / SUMS) else None
    if can_exchange(folder):
        with revised(folder) as staging:
            _write(staging, contents, stated)
        return
    with on_disk(folder.name, folder):
        _write(folder, contents, stated)


def _write(folder: Path, contents: dict[str, str], stated: dict[str, str] | None) -> None:
    for name, content in contents.items():
        write_file(folder / name, content)
    if stated is not None:
        # Only the changed files are hashed again: hashing the weights of a large model takes long.
        write_file(folder / SUMS, sums.text({**stated, **{name: sums.sha256(folder / name) for name in contents}}))


def can_exchange(folder: Path) -> bool:
    """Whether this folder can be replaced: it does not contain the working folder, and its parent is writable."""
    folder = Path(os.path.realpath(folder))
    try:
        # getcwd fails where the working folder was deleted.
        here = Path(os.path.realpath(os.getcwd()))
    except OSError:
        return False
    return (
        here != folder
        and folder not in here.parents
        and os.access(folder.parent, os.W_OK)
        and not os.path.ismount(folder)
    )


def check_exchange(folder: Path) -> None:
    """Refuse a folder that cannot be replaced in one step.

    Raises:
        InputError: it is, or contains, the working folder, or is a mount point.
        ResourceError: its parent is not writable.
    """
    if can_exchange(folder):
        return
    if not os.access(Path(os.path.realpath(folder)).parent, os.W_OK):
        raise ResourceError(f"cannot write in the folder that holds {folder}: the folder is replaced as a whole")
    raise InputError(
        f"{folder} is or holds the working folder, or is a mount: call this from outside of it, by its path"
    )

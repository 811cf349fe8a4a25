"""Changes files of a finished folder so that at any moment the folder is the old or the new one. Imports no torch."""

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
from mla_convert.core.files import aside, on_disk, publish, recover, remove, write_file
from mla_convert.core.sums import SUMS

NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV)


def staging_folder(folder: Path) -> Path:
    """Where the revised copy of a folder is made."""
    return folder.parent / f".{folder.name}.revised"


@contextlib.contextmanager
def revised(folder: Path) -> Iterator[Path]:
    """A copy of a finished folder to change, which takes the folder's place when the block ends, and goes when it fails.

    Files in it are the same ones by other names where the file system has links: replace them (`write_file`), never write
    into them.

    Raises:
        ResourceError: the disk does not suffice, or somebody else is writing there.
    """
    folder = Path(os.path.realpath(folder))
    staging = staging_folder(folder)
    with locked(folder), on_disk(folder.name, folder.parent):
        recover(folder)
        remove(staging)
        try:
            _copy(folder, staging)
            yield staging
            publish(staging, folder)
        finally:
            remove(staging)


def tidy(folder: Path) -> None:
    """Away with what a run that was killed has left beside a folder; a folder that it had put aside comes back."""
    folder = Path(os.path.realpath(folder))
    if any(map(os.path.lexists, (staging_folder(folder), aside(folder), lock_file(folder)))) and can_exchange(folder):
        with locked(folder), on_disk(folder.name, folder.parent):
            recover(folder)
            remove(staging_folder(folder))


def lock_file(folder: Path) -> Path:
    """What is locked while a folder is written."""
    return folder.parent / f".{folder.name}.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else of ours writes to that folder meanwhile.

    Raises:
        ResourceError: somebody does, or its parent cannot be written.
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
    """All files once more, as links to the same content where that is possible."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LINKS:
                raise
            shutil.copy2(source, target, follow_symlinks=False)

    try:
        shutil.copytree(folder, staging, symlinks=True, copy_function=link)
    except shutil.Error as error:  # a list of (source, target, words)
        raise OSError(errno.EIO, f"cannot copy {Path(error.args[0][0][0]).name}") from error


def replace_files(folder: Path, contents: dict[str, str]) -> None:
    """Replace some files of a finished folder, and their lines in its SHA256SUMS if it has one, all at once.

    Where the folder cannot be exchanged (it is the working folder, or its parent cannot be written), they are replaced one by
    one, SHA256SUMS last: a kill between two of them is found by `verify`.

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
        write_file(folder / SUMS, sums.text({**stated, **{name: sums.sha256(folder / name) for name in contents}}))


def can_exchange(folder: Path) -> bool:
    """Whether another folder may take this one's place: nobody stands in it, and its parent can be written."""
    folder = Path(os.path.realpath(folder))
    try:
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
    """Refuse a folder that cannot be replaced at once.

    Raises:
        InputError: it is, or holds, the working folder, or is a mount.
        ResourceError: its parent cannot be written.
    """
    if can_exchange(folder):
        return
    if not os.access(Path(os.path.realpath(folder)).parent, os.W_OK):
        raise ResourceError(f"cannot write in the folder that holds {folder}: the folder is replaced as a whole")
    raise InputError(
        f"{folder} is or holds the working folder, or is a mount: call this from outside of it, by its path"
    )

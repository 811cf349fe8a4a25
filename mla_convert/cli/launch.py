"""`--gpus N`: start one process for each GPU, and end them together. Imports no torch.

torchrun and `accelerate launch` start the processes as well, on several hosts too. They report a failure with a table and a
traceback; here it is one line and its exit code, and after Ctrl-C the first process has the time to say what it kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from mla_convert.core.errors import Interrupted, ResourceError, UsageError
from mla_convert.core.world import world_rank, world_size

STARTED = "MLA_CONVERT_STARTED_BY"
# Seconds for the first process to clean up when it is interrupted, and for the others when one has failed.
PATIENCE, GRACE = 60, 10
AGAIN = 10  # seconds after which the first process is interrupted again
POLL = 0.05
# Exit code of a process that was waiting for another one, which has ended: that one's code counts.
LOST = 76
PR_SET_PDEATHSIG = 1


def launched() -> bool:
    """Whether this process is one of several, by the environment."""
    return world_size() > 1


def follows() -> bool:
    """Whether this is one of several processes, and not the first, which alone prints."""
    return launched() and world_rank() != 0


def started() -> bool:
    """Whether this process was started by `launch`."""
    return STARTED in os.environ


def settle_signals() -> None:
    """Let Ctrl-C reach the first process alone: the others end when it has cleaned up."""
    if follows():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not started():
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent passes it on
    if not follows():
        # `_interrupt` sends SIGTERM, because SIGINT is ignored above.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ[STARTED] != str(os.getppid()):  # the parent ended before
        os.kill(os.getpid(), signal.SIGKILL)


def check_count(gpus: int | None) -> bool:
    """Whether to start `gpus` processes: not if this is one of them.

    Raises:
        UsageError: another number of processes was started, or more than this host can have any use for.
    """
    most = max(os.cpu_count() or 1, 8)
    if gpus is not None and gpus > most:
        raise UsageError(f"--gpus {gpus} is more than this host has cores: give {most} at most")
    if gpus is None or not launched():
        return gpus is not None and gpus > 1
    if world_size() != gpus:
        raise UsageError(f"--gpus {gpus} in {world_size()} processes: the launcher has chosen their number")
    return False


class Said(int):
    """The exit code of a process that has said why."""


def launch(count: int) -> Said:
    """Run this command in `count` processes; returns its exit code.

    Raises:
        ResourceError: a process was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    common = {
        # else a process whose first one has ended prints a trace of C++ beside that one's line
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # The environment comes behind the number of threads, so that a user's own number counts.
        "OMP_NUM_THREADS": threads, **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), STARTED: str(os.getpid()),
    }  # fmt: skip
    command = [sys.executable, "-m", "mla_convert", *sys.argv[1:]]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    processes: list[subprocess.Popen] = []
    try:
        # One by one inside of the `try`, so that an interruption also ends those that are started already.
        for rank in map(str, range(count)):
            processes.append(subprocess.Popen(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}))
        return Said(_wait(processes))
    except KeyboardInterrupt:
        return Said(_interrupt(processes))
    finally:
        _end(processes)
        signal.signal(signal.SIGTERM, before)


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """Wait until all have ended or one has failed; returns the exit code of the one that failed, or 0.

    Raises:
        ResourceError: it was killed.
    """
    lost_since = None
    while True:
        codes = [process.poll() for process in processes]
        killed = [index for index, code in enumerate(codes) if code is not None and code < 0]
        if killed:
            name = signal.Signals(-codes[killed[0]]).name
            raise ResourceError(
                f"process {killed[0] + 1} of {len(codes)} was killed ({name}): run the same command again; layers that "
                f"were written are kept"
            )
        if failed := [code for code in codes if code not in (None, 0, LOST)]:
            return failed[0]
        if None not in codes and LOST not in codes:
            return 0
        if LOST in codes:  # of the process that it has lost, the end is about to be seen
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > GRACE or None not in codes:
                raise ResourceError("the processes lost each other: run the same command again")
        time.sleep(POLL)


def _interrupt(processes: list[subprocess.Popen]) -> int:
    """Interrupt the first process, and give it time to clean up; returns its exit code."""
    if not processes:
        raise Interrupted("interrupted")
    with contextlib.suppress(KeyboardInterrupt):  # once more: now
        for _ in range(PATIENCE // AGAIN):
            processes[0].terminate()  # Python drops the exception of a signal where a destructor runs
            with contextlib.suppress(subprocess.TimeoutExpired):
                return processes[0].wait(AGAIN)
    return Interrupted.exit_code


def _end(processes: list[subprocess.Popen]) -> None:
    """End the processes that are left: the first one, which may have to clean up, as if it were interrupted."""
    until = time.monotonic() + GRACE
    # those that wait for a process that has failed notice that themselves, unless they wait for their GPU
    while any(process.poll() is None for process in processes[:1]) and time.monotonic() < until:
        time.sleep(POLL)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()

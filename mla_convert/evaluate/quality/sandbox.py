"""Runs a Python program that a model wrote: in a process of its own, with limits; leaving early does not pass.

The program runs in `python -I` in an empty temporary folder, without environment and without stdin, as the leader of
a process group that is killed when it ends. Limits of the operating system hold its memory, CPU time, files and
processes down, and an audit hook, which no Python code can take away, refuses processes, sockets, signals and writing
outside the folder (the limit on processes does not hold for root). This contains accidents. It is no wall against an
attacker: for those take a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from mla_convert.core.errors import ResourceError

PASSED, TIMED_OUT, ENDED = "passed", "timed out", "ended early"
# Characters of an outcome that are kept: the name of an exception.
LONGEST = 60

# The program of the child process. It reads the program to run, its limits and a word that only parent and child know. It says the
# word if the program ran to its end; a program that leaves by sys.exit or os._exit did not. It imports nothing of this package.
_CHILD = r"""
import json, os, resource, sys

def guard(folder):
    reading = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr", "os.putenv"}
    refused = ("os.", "subprocess.", "socket.", "shutil.", "pty.", "signal.", "syslog.", "fcntl.")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside, realpath, fsdecode, null = folder + os.sep, os.path.realpath, os.fsdecode, os.devnull

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            if not flags & writing or isinstance(path, int) or path == null:
                return
            if not realpath(fsdecode(path)).startswith(inside):
                raise PermissionError("writing outside the folder is refused")
        elif event == "ctypes.dlopen":
            if args[0] is not None:
                raise PermissionError("loading a library is refused")
        elif event.startswith(refused) and event not in reading:
            raise PermissionError(event + " is refused")

    sys.addaudithook(hook)

def main():
    order = json.loads(sys.stdin.buffer.read())
    verdict, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    for name, (soft, hard) in order["limits"].items():
        limit = getattr(resource, name)
        most = resource.getrlimit(limit)[1]
        hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(limit, (min(soft, hard), hard))
    write, leave, word = os.write, os._exit, order["word"]
    guard(os.path.realpath(os.getcwd()))
    sys.argv = ["program.py"]
    try:
        exec(compile(order["program"], "program.py", "exec"), {"__name__": "__main__"})
        said = word
    except BaseException as error:
        said = type(error).__name__
    write(verdict, said.encode("utf-8", "replace"))
    leave(0)

main()
"""


@dataclass(frozen=True)
class Limits:
    """Limits of a program: seconds by the clock and of CPU time, bytes of memory and of each file that it writes."""

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 4 << 30
    file_bytes: int = 1 << 20

    @property
    def resources(self) -> dict[str, tuple[int, int]]:
        """As the operating system names them, soft and hard: the signal of a soft limit says what ended a program."""
        return {
            "RLIMIT_AS": (self.memory,) * 2, "RLIMIT_CPU": (self.cpu_seconds, self.cpu_seconds + 1),
            "RLIMIT_FSIZE": (self.file_bytes,) * 2, "RLIMIT_NPROC": (0, 0), "RLIMIT_NOFILE": (64, 64),
            "RLIMIT_CORE": (0, 0),
        }  # fmt: skip


def run_program(program: str, limits: Limits) -> str:
    """Runs a program in a sandboxed process of its own.

    Args:
        program: the source of the program.
        limits: what it may use.

    Returns:
        PASSED if the program ran to its end, TIMED_OUT, ENDED if its process ended before the program did (by os._exit
        or a signal), or the name of the exception that left the program: SystemExit is one.

    Raises:
        ResourceError: the system is not Linux, or no process can be started.
    """
    if sys.platform != "linux":
        raise ResourceError(f"code that a model wrote is run under the limits of Linux, which {sys.platform} has not")
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "limits": limits.resources, "word": word}).encode()
    with tempfile.TemporaryDirectory(prefix="mla-convert-", ignore_cleanup_errors=True) as folder:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _CHILD], cwd=folder, env={}, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:
            raise ResourceError(f"no process can be started to run code in: {error}") from error
        try:
            said = process.communicate(order, timeout=limits.seconds)[0].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            # After a regular end, too: other processes of its group may still run.
            _end(process)
    if said == word:
        return PASSED
    # The signal of the soft limit on CPU time.
    if not said and process.returncode == -signal.SIGXCPU:
        return TIMED_OUT
    return said[:LONGEST] or ENDED


def _end(process: subprocess.Popen) -> None:
    """Kills a process and the group that it leads, and waits for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()

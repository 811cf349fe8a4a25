"""Worker processes that run jobs on the GPU, so that a faulty kernel ends only its own process.

After an illegal memory access, every later GPU operation of a process fails. The pool replaces such a process, one that died
and one that hangs, and reports its job with the error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch


def short(error: Exception) -> str:
    """An error as one line of at most 300 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str | None, bool]:
    """Call a function: (result, problem, whether the process can still use the GPU)."""
    result = problem = None
    try:
        result = function(*args)
    except Exception as error:
        problem = short(error)
    try:
        # A kernel's error shows at the next synchronisation, which must not be that of another job.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        return None, problem or short(error), False
    return result, problem, True


def serve(pipe: Connection) -> None:
    """Run the jobs from a pipe until the CUDA context is broken."""
    sound = True
    while sound:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        result, problem, sound = attempt(function, args)
        pipe.send((result, problem, sound))
    os._exit(1)  # a regular exit would wait for the GPU


@dataclass
class Worker:
    """A process, the pipe to it, its job and the time by which the job must end."""

    process: BaseProcess
    pipe: Connection
    job: object = None
    until: float = 0.0


class Pool:
    """Worker processes with one job each."""

    def __init__(self, processes: int, seconds_per_job: float = 90):
        """Start the workers.

        Args:
            processes: number of workers; 0 runs every job in this process (Triton's interpreter, debugging).
            seconds_per_job: a worker that takes longer is replaced.
        """
        self.seconds_per_job = seconds_per_job
        # A forked process cannot use CUDA once its parent has used it.
        self.context = get_context("spawn")
        self.idle = [self._worker() for _ in range(processes)]
        self.busy: list[Worker] = []
        self.processes = processes
        self.done: list[tuple[Any, Any, str | None]] = []

    def _worker(self) -> Worker:
        here, there = self.context.Pipe()
        process = self.context.Process(target=serve, args=(there,), daemon=True)
        process.start()
        there.close()  # so that the end of the process closes the pipe
        return Worker(process, here)

    @property
    def room(self) -> bool:
        """Whether a job can start."""
        return bool(self.idle) or (not self.processes and not self.done)

    def start(self, job: object, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(*args)`, if there is room; `finished` returns its result with `job`."""
        if not self.processes:
            result, problem, _ = attempt(function, args)
            self.done.append((job, result, problem))
            return
        worker = self.idle.pop()
        worker.job, worker.until = job, time.monotonic() + self.seconds_per_job
        worker.pipe.send((function, args))
        self.busy.append(worker)

    def finished(self, timeout: float = 0.05) -> list[tuple[Any, Any, str | None]]:
        """(job, result, problem) of the jobs that have ended since the last call; waits up to `timeout` seconds for one."""
        done, self.done = self.done, []
        ready = set(wait([worker.pipe for worker in self.busy], timeout)) if self.busy else set()
        for worker in list(self.busy):
            if worker.pipe in ready:
                try:
                    result, problem, sound = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    result, problem, sound = None, "its process died", False
            elif time.monotonic() > worker.until:
                result, problem, sound = None, "took too long", False
            else:
                continue
            done.append((worker.job, result, problem))
            self.busy.remove(worker)
            if not sound:
                worker.process.kill()
                worker = self._worker()
            self.idle.append(worker)
        return done

    def close(self) -> None:
        """Kill all workers."""
        for worker in self.idle + self.busy:
            worker.process.kill()

"""Processes that run jobs on the GPU, so that a kernel that breaks one takes nothing else along.

After an illegal memory access everything that a process does on the GPU fails. Such a process, one that died and one that
hangs are replaced, and the job that they had is reported with what went wrong.
"""

import os
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch


def short(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def attempt(function, args):
    """(result, problem, whether the process can still use the GPU)."""
    result = problem = None
    try:
        result = function(*args)
    except Exception as error:
        problem = short(error)
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        return None, problem or short(error), False
    return result, problem, True


def serve(pipe: Connection):
    """Run what comes through the pipe until the context is broken."""
    sound = True
    while sound:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        result, problem, sound = attempt(function, args)
        pipe.send((result, problem, sound))
    os._exit(1)  # the usual way out would wait for the GPU


@dataclass
class Worker:
    process: BaseProcess
    pipe: Connection
    job: object = None
    until: float = 0.0


class Pool:
    """`processes` workers; 0 runs every job at once in this process (Triton's interpreter, debugging)."""

    def __init__(self, processes, seconds_per_job=90):
        self.seconds_per_job = seconds_per_job
        self.context = get_context("spawn")
        self.idle = [self._worker() for _ in range(processes)]
        self.busy: list[Worker] = []
        self.processes = processes
        self.done = []

    def _worker(self):
        here, there = self.context.Pipe()
        process = self.context.Process(target=serve, args=(there,), daemon=True)
        process.start()
        there.close()  # so that a process that dies ends the pipe
        return Worker(process, here)

    @property
    def room(self):
        return bool(self.idle) or (not self.processes and not self.done)

    def start(self, job, function, *args):
        """Begin `function(*args)`; `job` comes back with its outcome. Only where there is room."""
        if not self.processes:
            result, problem, _ = attempt(function, args)
            self.done.append((job, result, problem))
            return
        worker = self.idle.pop()
        worker.job, worker.until = job, time.monotonic() + self.seconds_per_job
        worker.pipe.send((function, args))
        self.busy.append(worker)

    def finished(self, timeout=0.05):
        """(job, result, problem) of jobs that ended since; waits up to `timeout` for the first."""
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

    def close(self):
        for worker in self.idle + self.busy:
            worker.process.kill()

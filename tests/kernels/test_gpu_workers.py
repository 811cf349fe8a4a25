"""The benchmark's pool of processes: it reports a job that breaks its process, and runs the next jobs."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "kernels_gpu"))

import torch
from gpu_workers import Pool


def outcomes(pool, jobs):
    waiting, done = list(jobs), {}
    while len(done) < len(jobs):
        while waiting and pool.room:
            name, function, argument = waiting.pop(0)
            pool.start(name, function, argument)
        done |= {name: (result, problem) for name, result, problem in pool.finished(0.2)}
    return done


def test_a_broken_process_is_replaced():
    pool = Pool(1, seconds_per_job=20)
    try:
        done = outcomes(pool, [("dies", os._exit, 3), ("raises", int, "x"), ("works", abs, -2)])
        assert done["dies"] == (None, "its process died")
        assert done["raises"][1].startswith("ValueError: invalid literal") and done["works"] == (2, None)
        pool.seconds_per_job = 0.5
        assert outcomes(pool, [("hangs", time.sleep, 60)])["hangs"] == (None, "took too long")
        pool.seconds_per_job = 20
        assert outcomes(pool, [("works", abs, -3)])["works"] == (3, None)
    finally:
        pool.close()


def lose_the_gpu(_):
    """Leave CUDA as after an illegal memory access: every use raises."""

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fail


def test_a_process_that_lost_its_gpu_is_replaced():
    pool = Pool(1, seconds_per_job=20)
    try:
        done = outcomes(pool, [("breaks", lose_the_gpu, None), ("works", abs, -2)])
        assert "illegal memory access" in done["breaks"][1] and done["works"] == (2, None)
    finally:
        pool.close()


def test_without_processes():
    pool = Pool(0)
    assert outcomes(pool, [("works", abs, -2), ("raises", int, "x")])["works"] == (2, None)

"""Progress in a log: a line from time to time, with an estimate that follows the steps."""

import io

import pytest
from rich.console import Console

from mla_convert.core import progress as module
from mla_convert.core.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def progress(clock, log):
    return Progress(Console(file=log, width=200))


def test_a_block_of_layers_shows_its_steps(progress, clock, log):
    progress.start(layers=2, steps=10)
    for second in range(1, 21):  # twenty steps of the two layers together
        clock[0] = 1.5 * second
        progress.step()
    assert log.getvalue() == (
        "layer 0/2, step 7/22  10 s elapsed, about 22 s left\nlayer 0/2, step 14/22  21 s elapsed, about 12 s left\n"
    )
    clock[0] = 31
    progress.layer_done({"residual_error": 0.25})
    clock[0] = 33
    progress.layer_done({"residual_error": 0.5})
    assert log.getvalue().splitlines()[2:] == ["layer 2/2  residual error 5.00e-01  33 s elapsed, about 0 s left"]


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(progress, clock, log):
    progress.start(layers=4, steps=9)
    progress.skip(20)
    clock[0] = 12
    progress.step(10)
    assert log.getvalue() == "layer 0/4, step 30/40  12 s elapsed, about 12 s left\n"


def test_a_loop_over_steps_prints_less_often_as_time_passes(progress, clock, log):
    progress.begin("generate", steps=1000)
    for second in range(1, 1001):
        clock[0] = second
        progress.advance(second)
    lines = log.getvalue().splitlines()
    assert lines[0] == "generate, step 11/1000  11 s elapsed, about 989 s left"
    assert 20 < len(lines) < 60


def test_measured_layers_and_quiet(clock, log):
    progress = Progress(Console(file=log), quiet=True)
    progress.start(layers=3, steps=0, label="measuring step")
    clock[0] = 40
    progress.layer_measured()
    assert not log.getvalue()
